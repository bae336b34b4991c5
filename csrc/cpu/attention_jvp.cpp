// attention_jvp on the CPU: tiles of 32 queries by 64 keys, nothing of size Nq x Nk. FLOPs:
// 2 Nq Nk (D + Dv) per head for the primal and as many again for each of the two sides of each
// tangent; keys and values are read once per 32 queries, so it is compute-bound.
//
// One task is one tile of queries of one head; tasks don't share anything, so the result depends
// neither on the number of threads nor on scheduling. The kernel is attention_jvp_body.h.
#include "fewstep/ops/attention_jvp.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "fewstep/cpu/attention_tile.h"
#include "fewstep/cpu/isa.h"

namespace fewstep::cpu {
namespace {

constexpr std::int64_t kQueries = 32;  // a multiple of every vector width
constexpr std::int64_t kKeys = 64;
constexpr std::int64_t kSamples = 16;  // keys at equal distances that a mean is taken of

template <typename T>
struct AttentionTile {
    HeadRows<const T> q, k, v, t_q, t_k, t_v;  // q and t_q start at the first query of the tile
    Mask<T> mask, t_mask;                      // likewise
    HeadRows<T> o, t_o;
    acc_t<T>*lse, *mu, *lse_rest;  // lse_rest: null where not wanted
    std::int64_t mu_direction;
    std::int64_t queries, keys, d, dv, directions;
    std::int64_t sequence_keys;  // with those that causal hides from the whole tile
    std::int64_t first_query;    // counted from the start of its sequence, for causal
    bool causal;
    double scale;
};

// The scratch of one thread.
template <typename Acc>
struct Workspace {
    Acc *m, *l, *alpha, *kept;  // [kQueries]; kept: alpha l, with l of the tiles before
    Acc *r, *c, *shift;         // [R, kQueries]; shift: scale q z
    Acc* z;                     // [R, D]
    Acc *q, *t_q;               // [D, kQueries]; tangents have R in front here too
    Acc *s, *t_s;               // [kKeys, kQueries]
    Acc *o, *t_o;               // [Dv, kQueries]
    Acc *k, *t_k;               // [kKeys, max(D, Dv)]

    Workspace(Carver<Acc>& from, std::int64_t d, std::int64_t dv, std::int64_t directions) {
        for (Acc** stat : {&m, &l, &alpha, &kept}) *stat = from.take(kQueries);
        for (Acc** stat : {&r, &c, &shift}) *stat = from.take(directions * kQueries);
        z = from.take(directions * d);
        q = from.take(d * kQueries);
        t_q = from.take(directions * d * kQueries);
        s = from.take(kKeys * kQueries);
        t_s = from.take(directions * kKeys * kQueries);
        o = from.take(dv * kQueries);
        t_o = from.take(directions * dv * kQueries);
        for (Acc** rows : {&k, &t_k}) *rows = from.take(kKeys * std::max(d, dv));
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
    const TensorView *t_q, *t_k, *t_v, *mask, *t_mask;
    bool causal;
    const TensorView &o, &t_o, &lse, &mu, *lse_rest;
    double scale;

    template <typename T>
    AttentionTile<T> tile(const Sequence& sequence, std::int64_t h, std::int64_t first) const {
        const std::int64_t b = sequence.batch, g = h / (q.size(1) / k.size(1));
        const std::int64_t query = sequence.first_query + first, key = sequence.first_key;
        AttentionTile<T> x;
        x.q = head_rows<const T>(&q, b, h, query);
        x.k = head_rows<const T>(&k, b, g, key);
        x.v = head_rows<const T>(&v, b, g, key);
        x.t_q = head_rows<const T>(t_q, b, h, query);
        x.t_k = head_rows<const T>(t_k, b, g, key);
        x.t_v = head_rows<const T>(t_v, b, g, key);
        x.mask = head_mask<T>(mask, b, h).at(0, query, 0);
        x.t_mask = head_mask<T>(t_mask, b, h).at(0, query, 0);
        x.o = head_rows<T>(&o, b, h, query);
        x.t_o = head_rows<T>(&t_o, b, h, query);
        const std::int64_t stat = (b * q.size(1) + h) * q.size(2) + query;
        x.lse = lse.ptr<acc_t<T>>() + stat;
        x.mu = mu.ptr<acc_t<T>>() + stat;
        x.lse_rest = lse_rest == nullptr ? nullptr : lse_rest->ptr<acc_t<T>>() + stat;
        x.mu_direction = lse.numel();
        x.queries = std::min(kQueries, sequence.queries - first);
        x.sequence_keys = sequence.keys;
        x.keys = causal ? std::min(sequence.keys, first + x.queries) : sequence.keys;
        x.d = q.size(3);
        x.dv = v.size(3);
        x.directions = t_o.size(0);
        x.first_query = first;
        x.causal = causal;
        x.scale = scale;
        return x;
    }
};

// No key: a sum over nothing.
template <typename T>
void fill_empty(const AttentionTile<T>& x) {
    for (std::int64_t m = 0; m < x.queries; ++m) {
        x.lse[m] = -std::numeric_limits<acc_t<T>>::infinity();
        if (x.lse_rest != nullptr) x.lse_rest[m] = 0;
        std::fill_n(x.o.data + m * x.o.stride, x.dv, Convert<T>::from(0));
        for (std::int64_t d = 0; d < x.directions; ++d) {
            x.mu[d * x.mu_direction + m] = 0;
            std::fill_n(x.t_o.at(d).data + m * x.t_o.stride, x.dv, Convert<T>::from(0));
        }
    }
}

template <typename T>
void attend(const Call& call, const std::vector<Sequence>& sequences) {
    using Acc = acc_t<T>;
    const Kernel<T> kernel = choose_kernel<T>();
    const std::int64_t heads = call.q.size(1), d = call.q.size(3), dv = call.v.size(3);
    // ends[s]: tasks of sequences 0 ... s. Tiles of a head follow each other: they share its keys.
    std::vector<std::int64_t> ends;
    for (const Sequence& sequence : sequences) {
        const std::int64_t tiles = (sequence.queries + kQueries - 1) / kQueries;
        ends.push_back((ends.empty() ? 0 : ends.back()) + heads * tiles);
    }
    const std::int64_t tasks = ends.empty() ? 0 : ends.back();
    const int threads = static_cast<int>(std::min<std::int64_t>(omp_get_max_threads(), tasks));
    if (threads == 0) return;
    Carver<Acc> count(nullptr);
    const Workspace<Acc> sizes(count, d, dv, call.t_o.size(0));
    const auto scratch = allocate<Acc>(threads * count.taken());
#pragma omp parallel num_threads(threads)
    {
        Carver<Acc> carver(scratch.get() + omp_get_thread_num() * count.taken());
        const Workspace<Acc> workspace(carver, d, dv, call.t_o.size(0));
#pragma omp for schedule(dynamic)
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::size_t s = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
            const std::int64_t local = task - (s == 0 ? 0 : ends[s - 1]);
            const std::int64_t tiles = (sequences[s].queries + kQueries - 1) / kQueries;
            const AttentionTile<T> tile =
                call.tile<T>(sequences[s], local / tiles, local % tiles * kQueries);
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
                   const TensorView* attn_mask, const TensorView* t_attn_mask,
                   const TensorView* cu_seqlens_q, const TensorView* cu_seqlens_k, bool is_causal,
                   const TensorView& o, const TensorView& t_o, const TensorView& lse,
                   const TensorView& mu, const TensorView* lse_rest, double scale) {
    const std::int64_t b = q.size(0), h = q.size(1), nq = q.size(2), g = k.size(1), nk = k.size(2);
    const std::int64_t d = q.size(3), dv = v.size(3), r = t_o.size(0);
    FEWSTEP_CHECK(d % 8 == 0 && dv % 8 == 0,
                  "q, v: expected head dims that are multiples of 8, got ", d, " and ", dv);
    FEWSTEP_CHECK(g == h || (g > 0 && h % g == 0), "k: expected heads that divide those of q, ", h,
                  ", got ", g);
    const DType stat = q.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    expect_rows(q, "q", q.dtype, {b, h, nq, d});
    expect_rows(k, "k", q.dtype, {b, g, nk, d});
    expect_rows(v, "v", q.dtype, {b, g, nk, dv});
    if (t_q != nullptr) expect_rows(*t_q, "t_q", q.dtype, {r, b, h, nq, d});
    if (t_k != nullptr) expect_rows(*t_k, "t_k", q.dtype, {r, b, g, nk, d});
    if (t_v != nullptr) expect_rows(*t_v, "t_v", q.dtype, {r, b, g, nk, dv});
    expect_masks(attn_mask, t_attn_mask, q, k, cu_seqlens_q != nullptr);
    if (t_attn_mask != nullptr) {
        expect_shape(*t_attn_mask, "t_attn_mask", q.dtype, {r, b, h, nq, nk});
    }
    expect_rows(o, "o", q.dtype, {b, h, nq, dv});
    expect_rows(t_o, "t_o", q.dtype, {r, b, h, nq, dv});
    expect_contiguous(lse, "lse", stat, {b, h, nq});
    expect_contiguous(mu, "mu", stat, {r, b, h, nq});
    if (lse_rest != nullptr) expect_contiguous(*lse_rest, "lse_rest", stat, {b, h, nq});
    const Call call{q,         k, v,   t_q, t_k, t_v,      attn_mask, t_attn_mask,
                    is_causal, o, t_o, lse, mu,  lse_rest, scale};
    const auto sequences = list_sequences(q, k, cu_seqlens_q, cu_seqlens_k);
    dispatch_float(q.dtype, "q", [&](auto tag) { attend<decltype(tag)>(call, sequences); });
}

}  // namespace fewstep::cpu
