// attention_jvp on the CPU: tiles of 32 queries by 64 keys, nothing of size Nq x Nk. FLOPs:
// 2 Nq Nk (D + Dv) per head for the primal and as many again for each of the two sides of the
// tangent; keys and values are read once per 32 queries, so it is compute-bound.
//
// One task is one tile of queries of one head; tasks don't share anything, so the result depends
// neither on the number of threads nor on scheduling. The kernel is attention_jvp_body.h.
#include "fewstep/ops/attention_jvp.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {
namespace {

constexpr std::int64_t kQueries = 32;  // a multiple of every vector width
constexpr std::int64_t kKeys = 64;

// Rows of one head: unit stride within a row. Null where a tangent is absent.
template <typename T>
struct Rows {
    const T* data = nullptr;
    std::int64_t stride = 0;
};
template <typename T>
struct OutputRows {
    T* data;
    std::int64_t stride;
};

template <typename T>
struct AttentionTile {
    Rows<T> q, k, v, t_q, t_k, t_v;  // q and t_q start at the first query of the tile
    OutputRows<T> o, t_o;
    std::uintptr_t lse, mu;
    std::int64_t queries, keys, d, dv;
    double scale;

    template <typename Acc>
    static Acc* stat(std::uintptr_t data) {
        return reinterpret_cast<Acc*>(data);
    }
};

struct Free {
    void operator()(void* data) const { ::operator delete(data, std::align_val_t(64)); }
};

// The scratch of one thread, carved from one allocation.
template <typename Acc>
struct Workspace {
    Acc *m, *l, *r, *c, *alpha;  // [kQueries]
    Acc *q, *t_q;                // [D, kQueries]
    Acc *s, *t_s;                // [kKeys, kQueries]
    Acc *o, *t_o;                // [Dv, kQueries]
    Acc *k, *t_k;                // [kKeys, max(D, Dv)]

    static std::int64_t elements(std::int64_t d, std::int64_t dv) {
        return kQueries * (5 + 2 * d + 2 * kKeys + 2 * dv) + 2 * kKeys * std::max(d, dv);
    }
    Workspace(Acc* base, std::int64_t d, std::int64_t dv) {
        const auto take = [&base](std::int64_t n) {
            Acc* const block = base;
            base += n;
            return block;
        };
        for (Acc** stat : {&m, &l, &r, &c, &alpha}) *stat = take(kQueries);
        for (Acc** block : {&q, &t_q}) *block = take(d * kQueries);
        for (Acc** block : {&s, &t_s}) *block = take(kKeys * kQueries);
        for (Acc** block : {&o, &t_o}) *block = take(dv * kQueries);
        for (Acc** block : {&k, &t_k}) *block = take(kKeys * std::max(d, dv));
    }
};

}  // namespace
}  // namespace fewstep::cpu

#define FEWSTEP_ISA_BODY "fewstep/cpu/attention_jvp_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
using Kernel = void (*)(const AttentionTile<T>&, const Workspace<acc_t<T>>&);

template <typename T>
Kernel<T> choose_kernel() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::attend_tile<T>;
    if (isa() == Isa::kAvx2) return avx2::attend_tile<T>;
#endif
    return portable::attend_tile<T>;
}

struct Call {
    const TensorView &q, &k, &v;
    const TensorView *t_q, *t_k, *t_v;
    const TensorView &o, &t_o, &lse, &mu;
    double scale;

    template <typename T>
    AttentionTile<T> tile(std::int64_t b, std::int64_t h, std::int64_t first) const {
        const auto rows = [&](const TensorView* x, std::int64_t row) -> Rows<T> {
            if (x == nullptr) return {};
            return {x->ptr<T>() + b * x->stride(0) + h * x->stride(1) + row * x->stride(2),
                    x->stride(2)};
        };
        const auto output = [&](const TensorView& x) -> OutputRows<T> {
            return {const_cast<T*>(rows(&x, first).data), x.stride(2)};
        };
        const std::int64_t stat = (b * q.size(1) + h) * q.size(2) + first;
        const std::int64_t offset = stat * static_cast<std::int64_t>(sizeof(acc_t<T>));
        return {rows(&q, first),
                rows(&k, 0),
                rows(&v, 0),
                rows(t_q, first),
                rows(t_k, 0),
                rows(t_v, 0),
                output(o),
                output(t_o),
                lse.data + offset,
                mu.data + offset,
                std::min(kQueries, q.size(2) - first),
                k.size(2),
                q.size(3),
                v.size(3),
                scale};
    }
};

// Nk = 0: a sum over nothing.
template <typename T>
void fill_empty(const AttentionTile<T>& x) {
    using Acc = acc_t<T>;
    for (std::int64_t m = 0; m < x.queries; ++m) {
        x.template stat<Acc>(x.lse)[m] = -std::numeric_limits<Acc>::infinity();
        x.template stat<Acc>(x.mu)[m] = 0;
        std::fill_n(x.o.data + m * x.o.stride, x.dv, Convert<T>::from(0));
        std::fill_n(x.t_o.data + m * x.t_o.stride, x.dv, Convert<T>::from(0));
    }
}

template <typename T>
void attend(const Call& call) {
    using Acc = acc_t<T>;
    const Kernel<T> kernel = choose_kernel<T>();
    const std::int64_t heads = call.q.size(1), d = call.q.size(3), dv = call.v.size(3);
    const std::int64_t tiles = (call.q.size(2) + kQueries - 1) / kQueries;
    const std::int64_t tasks = call.q.size(0) * heads * tiles;
    const int threads = static_cast<int>(std::min<std::int64_t>(omp_get_max_threads(), tasks));
    if (threads == 0) return;
    // Rounded up to whole cache lines, so that threads don't share one.
    const std::int64_t elements = (Workspace<Acc>::elements(d, dv) + 15) / 16 * 16;
    const std::unique_ptr<void, Free> scratch(
        ::operator new(threads * elements * sizeof(Acc), std::align_val_t(64)));
#pragma omp parallel num_threads(threads)
    {
        Acc* base = static_cast<Acc*>(scratch.get()) + omp_get_thread_num() * elements;
        const Workspace<Acc> workspace(base, d, dv);
#pragma omp for schedule(dynamic)
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::int64_t head = task / tiles;
            const AttentionTile<T> tile =
                call.tile<T>(head / heads, head % heads, task % tiles * kQueries);
            if (tile.keys == 0) {
                fill_empty(tile);
            } else {
                kernel(tile, workspace);
            }
        }
    }
}

}  // namespace

void attention_jvp(const TensorView& q, const TensorView& k, const TensorView& v,
                   const TensorView* t_q, const TensorView* t_k, const TensorView* t_v,
                   const TensorView& o, const TensorView& t_o, const TensorView& lse,
                   const TensorView& mu, double scale) {
    const std::int64_t b = q.size(0), h = q.size(1), nq = q.size(2), nk = k.size(2);
    const std::int64_t d = q.size(3), dv = v.size(3);
    FEWSTEP_CHECK(d % 8 == 0 && dv % 8 == 0,
                  "q, v: expected head dims that are multiples of 8, got ", d, " and ", dv);
    const DType stat = q.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    expect_rows(q, "q", q.dtype, {b, h, nq, d});
    expect_rows(k, "k", q.dtype, {b, h, nk, d});
    expect_rows(v, "v", q.dtype, {b, h, nk, dv});
    if (t_q != nullptr) expect_rows(*t_q, "t_q", q.dtype, {b, h, nq, d});
    if (t_k != nullptr) expect_rows(*t_k, "t_k", q.dtype, {b, h, nk, d});
    if (t_v != nullptr) expect_rows(*t_v, "t_v", q.dtype, {b, h, nk, dv});
    expect_rows(o, "o", q.dtype, {b, h, nq, dv});
    expect_rows(t_o, "t_o", q.dtype, {b, h, nq, dv});
    expect_contiguous(lse, "lse", stat, {b, h, nq});
    expect_contiguous(mu, "mu", stat, {b, h, nq});
    const Call call{q, k, v, t_q, t_k, t_v, o, t_o, lse, mu, scale};
    dispatch_float(q.dtype, "q", [&](auto tag) { attend<decltype(tag)>(call); });
}

}  // namespace fewstep::cpu
