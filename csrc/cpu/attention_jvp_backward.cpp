// attention_jvp_backward on the CPU: tiles of 64 queries by 64 keys, nothing of size Nq x Nk.
// FLOPs: 2 Nq Nk times 9 D + 6 Dv per head with everything present, so it is compute-bound.
//
// One task is one range of keys of one key head, with all the queries that read it: gradients of
// keys and values are finished there. Those of queries are summed over ranges: each range leaves
// its part, and a second pass adds them in order. How many ranges there are depends on shapes
// alone, so bits depend neither on the number of threads nor on scheduling. The kernel is
// attention_jvp_backward_body.h.
#include "fewstep/ops/attention_jvp_backward.h"

#include <omp.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "fewstep/cpu/attention_tile.h"
#include "fewstep/cpu/isa.h"

namespace fewstep::cpu {
namespace {

constexpr std::int64_t kQueries = 64, kKeys = 64;
// Enough tasks for many threads, from ranges that are worth a task, in bounded memory: a range
// keeps a part of d_q and dt_q.
constexpr std::int64_t kTasks = 32, kLeastRange = 4 * kKeys, kMostRanges = 8;
constexpr std::int64_t kPad = 16;  // rows are padded to this: a multiple of every vector width

// What is computed: intermediate blocks by name, and sizes.
struct Plan {
    bool has0;                             // delta0 is there: dS0 is not zero
    bool ds0, ds1;                         // needed in products
    bool t_p, x0, x1;                      // needed and not zero
    bool d_q, d_k, d_v, dt_q, dt_k, dt_v;  // wanted
    bool has_tk, has_tv;                   // t_k, t_v are there
    bool causal;
    std::int64_t d, dv, ld, ldv;
    double scale;

    // The first tile of queries that sees key j.
    std::int64_t first_query(std::int64_t j) const { return causal ? j / kQueries * kQueries : 0; }
};

template <typename Acc>
struct RowStats {
    const Acc *lse, *mu, *lse_rest, *delta0, *delta1;

    RowStats at(std::int64_t i) const {
        const auto moved = [i](const Acc* x) { return x == nullptr ? nullptr : x + i; };
        return {moved(lse), moved(mu), moved(lse_rest), moved(delta0), moved(delta1)};
    }
};

// One query head of a sequence, and one key head.
template <typename T>
struct QueryHead {
    HeadRows<const T> q, t_q, d_o, dt_o;
    Mask<T> mask, t_mask;
    RowStats<acc_t<T>> stats;
    acc_t<T>*d_q, *dt_q;  // this range's part, rows `ld` apart; null where not wanted
};
template <typename T>
struct KeyHead {
    HeadRows<const T> k, v, t_k, t_v;
    HeadRows<T> d_k, d_v, dt_k, dt_v;
};

// The scratch of one thread.
template <typename Acc>
struct Workspace {
    Acc *k_columns, *t_k_columns, *v_columns, *t_v_columns;  // [D, kKeys]
    Acc *k_rows, *t_k_rows, *q, *t_q, *d_o, *dt_o;           // [tile, ld]
    Acc *s, *t_s, *x0, *x1;                                  // [kQueries, kKeys]
    Acc *d_k, *dt_k, *d_v, *dt_v;                            // [kKeys, ld]; null where not wanted
    const Acc *k = nullptr, *t_k = nullptr;                  // rows of the tile: copied or in place

    Workspace(Carver<Acc>& from, const Plan& plan) {
        for (Acc** columns : {&k_columns, &t_k_columns}) *columns = from.take(plan.d * kKeys);
        for (Acc** columns : {&v_columns, &t_v_columns}) *columns = from.take(plan.dv * kKeys);
        for (Acc** rows : {&k_rows, &t_k_rows}) *rows = from.take(kKeys * plan.ld);
        for (Acc** rows : {&q, &t_q}) *rows = from.take(kQueries * plan.ld);
        for (Acc** rows : {&d_o, &dt_o}) *rows = from.take(kQueries * plan.ldv);
        for (Acc** block : {&s, &t_s, &x0, &x1}) *block = from.take(kQueries * kKeys);
        d_k = plan.d_k ? from.take(kKeys * plan.ld) : nullptr;
        dt_k = plan.dt_k ? from.take(kKeys * plan.ld) : nullptr;
        d_v = plan.d_v ? from.take(kKeys * plan.ldv) : nullptr;
        dt_v = plan.dt_v ? from.take(kKeys * plan.ldv) : nullptr;
    }
};

}  // namespace
}  // namespace fewstep::cpu

#define FEWSTEP_ISA_BODY "fewstep/cpu/attention_jvp_backward_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
using Kernel = void (*)(const KeyHead<T>&, const QueryHead<T>*, std::int64_t, const Plan&,
                        std::int64_t, std::int64_t, std::int64_t, Workspace<acc_t<T>>);

template <typename T>
Kernel<T> choose_kernel() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::backward_keys<T>;
    if (isa() == Isa::kAvx2) return avx2::backward_keys<T>;
#endif
    return portable::backward_keys<T>;
}

struct Call {
    const TensorView *d_o, *dt_o, *delta0, &delta1, &q, &k, &v, *t_q, *t_k, *t_v;
    const TensorView &lse, *mu, *lse_rest;
    const TensorView *mask, *t_mask;
    bool causal;
    const TensorView *d_q, *d_k, *d_v, *dt_q, *dt_k, *dt_v;
    double scale;

    std::int64_t rows() const { return q.size(0) * q.size(1) * q.size(2); }
    std::int64_t row(const Sequence& sequence, std::int64_t h) const {
        return (sequence.batch * q.size(1) + h) * q.size(2) + sequence.first_query;
    }

    Plan plan() const {
        const auto padded = [](std::int64_t n) { return (n + kPad - 1) / kPad * kPad; };
        Plan x{};
        const bool has_ts = t_q != nullptr || t_k != nullptr || t_mask != nullptr;
        x.d_q = d_q != nullptr;
        x.d_k = d_k != nullptr;
        x.d_v = d_v != nullptr;
        x.dt_q = dt_q != nullptr;
        x.dt_k = dt_k != nullptr;
        x.dt_v = dt_v != nullptr;
        x.has_tk = t_k != nullptr;
        x.has_tv = t_v != nullptr;
        x.has0 = delta0 != nullptr;
        x.ds1 = x.d_q || x.d_k;
        x.ds0 = x.has0 && (x.dt_q || x.dt_k || (x.d_q && x.has_tk) || (x.d_k && t_q != nullptr));
        x.t_p = x.has0 && has_ts && (x.ds1 || (x.d_v && dt_o != nullptr));
        x.x0 = dt_o != nullptr && (x.ds0 || (x.ds1 && x.t_p));
        x.x1 = x.ds1 && (d_o != nullptr || (dt_o != nullptr && x.has_tv));
        x.causal = causal;
        x.d = q.size(3);
        x.dv = v.size(3);
        x.ld = padded(x.d);
        x.ldv = padded(x.dv);
        x.scale = scale;
        return x;
    }

    // `d_q` and `dt_q` are the parts of the range that the head is for.
    template <typename T>
    QueryHead<T> queries(const Sequence& sequence, std::int64_t h, std::int64_t ld,
                         acc_t<T>* part_d_q, acc_t<T>* part_dt_q) const {
        using Acc = acc_t<T>;
        const std::int64_t b = sequence.batch, first = sequence.first_query;
        const std::int64_t at = row(sequence, h);
        const auto stat = [at](const TensorView* x) {
            return x == nullptr ? nullptr : x->ptr<const Acc>() + at;
        };
        QueryHead<T> x;
        x.q = head_rows<const T>(&q, b, h, first);
        x.t_q = head_rows<const T>(t_q, b, h, first);
        x.d_o = head_rows<const T>(d_o, b, h, first);
        x.dt_o = head_rows<const T>(dt_o, b, h, first);
        x.mask = head_mask<T>(mask, b, h);  // masks and packed sequences exclude each other
        x.t_mask = head_mask<T>(t_mask, b, h);
        x.stats = {stat(&lse), stat(mu), stat(lse_rest), stat(delta0), stat(&delta1)};
        x.d_q = part_d_q == nullptr ? nullptr : part_d_q + at * ld;
        x.dt_q = part_dt_q == nullptr ? nullptr : part_dt_q + at * ld;
        return x;
    }

    template <typename T>
    KeyHead<T> keys(const Sequence& sequence, std::int64_t g) const {
        const std::int64_t b = sequence.batch, first = sequence.first_key;
        KeyHead<T> x;
        x.k = head_rows<const T>(&k, b, g, first);
        x.v = head_rows<const T>(&v, b, g, first);
        x.t_k = head_rows<const T>(t_k, b, g, first);
        x.t_v = head_rows<const T>(t_v, b, g, first);
        x.d_k = head_rows<T>(d_k, b, g, first);
        x.d_v = head_rows<T>(d_v, b, g, first);
        x.dt_k = head_rows<T>(dt_k, b, g, first);
        x.dt_v = head_rows<T>(dt_v, b, g, first);
        return x;
    }
};

// Keys per range: whole tiles, the same in every sequence.
std::int64_t range_of_keys(const std::vector<Sequence>& sequences, std::int64_t groups) {
    std::int64_t longest = 0;
    for (const Sequence& sequence : sequences) longest = std::max(longest, sequence.keys);
    const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
    const std::int64_t heads = static_cast<std::int64_t>(sequences.size()) * groups;
    const std::int64_t wanted = heads == 0 ? 1 : ceil_div(kTasks, heads);
    const std::int64_t ranges = std::min({wanted, kMostRanges, ceil_div(longest, kLeastRange)});
    return ceil_div(ceil_div(longest, std::max<std::int64_t>(1, ranges)), kKeys) * kKeys;
}

// Rows [first, first + count) of d_q (or dt_q) of a head: the parts of the ranges that see them.
template <typename T>
void sum_parts(const HeadRows<T>& to, const acc_t<T>* parts, std::int64_t distance,
               const Plan& plan, std::int64_t first, std::int64_t count, std::int64_t range,
               std::int64_t keys, acc_t<T>* sum) {
    if (to.data == nullptr) return;
    const acc_t<T> scale = static_cast<acc_t<T>>(plan.scale);
    for (std::int64_t i = first; i < first + count; ++i) {
        std::fill_n(sum, plan.d, acc_t<T>{0});
        const acc_t<T>* part = parts + i * plan.ld;
        for (std::int64_t j = 0; j < keys && plan.first_query(j) <= first; j += range) {
            for (std::int64_t c = 0; c < plan.d; ++c) sum[c] += part[c];
            part += distance;
        }
        T* const row = to.data + i * to.stride;
        for (std::int64_t c = 0; c < plan.d; ++c) row[c] = Convert<T>::from(sum[c] * scale);
    }
}

template <typename T>
void backward(const Call& call, const std::vector<Sequence>& sequences) {
    using Acc = acc_t<T>;
    const Kernel<T> kernel = choose_kernel<T>();
    const Plan plan = call.plan();
    const std::int64_t heads = call.q.size(1), groups = call.k.size(1);
    const std::int64_t shared = groups == 0 ? 0 : heads / groups, count = sequences.size();
    const std::int64_t range = range_of_keys(sequences, groups);
    std::int64_t ranges = 0;
    for (const Sequence& x : sequences) {
        if (x.keys > 0) ranges = std::max(ranges, (x.keys + range - 1) / range);
    }
    // Range by range: of causal ones the first is the longest and should not be the last to start.
    const std::int64_t tasks = ranges * count * groups;
    const std::int64_t distance = call.rows() * plan.ld;
    const auto parts_d_q = allocate<Acc>(plan.d_q ? ranges * distance : 0);
    const auto parts_dt_q = allocate<Acc>(plan.dt_q ? ranges * distance : 0);
    Carver<Acc> sizes(nullptr);
    const Workspace<Acc> counted(sizes, plan);
    const std::int64_t tiles = (call.q.size(2) + kQueries - 1) / kQueries;
    const int threads = static_cast<int>(
        std::min<std::int64_t>(omp_get_max_threads(), std::max(tasks, count * heads * tiles)));
    if (threads == 0) return;
    const auto scratch = allocate<Acc>(threads * sizes.taken());
#pragma omp parallel num_threads(threads)
    {
        Carver<Acc> carver(scratch.get() + omp_get_thread_num() * sizes.taken());
        const Workspace<Acc> workspace(carver, plan);
        std::vector<QueryHead<T>> readers(shared);
#pragma omp for schedule(dynamic)
        for (std::int64_t task = 0; task < tasks; ++task) {
            const Sequence& sequence = sequences[task / groups % count];
            const std::int64_t g = task % groups, r = task / groups / count, first = r * range;
            if (first >= sequence.keys) continue;
            for (std::int64_t h = 0; h < shared; ++h) {
                const auto part = [&](bool wanted, const auto& parts) {
                    return wanted ? parts.get() + r * distance : nullptr;
                };
                readers[h] =
                    call.queries<T>(sequence, g * shared + h, plan.ld, part(plan.d_q, parts_d_q),
                                    part(plan.dt_q, parts_dt_q));
            }
            kernel(call.keys<T>(sequence, g), readers.data(), shared, plan, sequence.queries, first,
                   std::min(first + range, sequence.keys), workspace);
        }
#pragma omp for schedule(dynamic)
        for (std::int64_t task = 0; task < count * heads; ++task) {
            const Sequence& sequence = sequences[task / heads];
            const std::int64_t h = task % heads, row = call.row(sequence, h) * plan.ld;
            const auto to = [&](const TensorView* x) {
                return head_rows<T>(x, sequence.batch, h, sequence.first_query);
            };
            for (std::int64_t i = 0; i < sequence.queries; i += kQueries) {
                const std::int64_t rows = std::min(kQueries, sequence.queries - i);
                sum_parts(to(call.d_q), parts_d_q.get() + row, distance, plan, i, rows, range,
                          sequence.keys, workspace.q);
                sum_parts(to(call.dt_q), parts_dt_q.get() + row, distance, plan, i, rows, range,
                          sequence.keys, workspace.q);
            }
        }
    }
}

}  // namespace

void attention_jvp_backward(const TensorView* d_o, const TensorView* dt_o, const TensorView* delta0,
                            const TensorView& delta1, const TensorView& q, const TensorView& k,
                            const TensorView& v, const TensorView* t_q, const TensorView* t_k,
                            const TensorView* t_v, const TensorView& lse, const TensorView* mu,
                            const TensorView* lse_rest, const TensorView* attn_mask,
                            const TensorView* t_attn_mask, const TensorView* cu_seqlens_q,
                            const TensorView* cu_seqlens_k, bool is_causal, const TensorView* d_q,
                            const TensorView* d_k, const TensorView* d_v, const TensorView* dt_q,
                            const TensorView* dt_k, const TensorView* dt_v, double scale) {
    const std::int64_t b = q.size(0), h = q.size(1), nq = q.size(2), g = k.size(1), nk = k.size(2);
    const std::int64_t d = q.size(3), dv = v.size(3);
    FEWSTEP_CHECK(d % 8 == 0 && dv % 8 == 0,
                  "q, v: expected head dims that are multiples of 8, got ", d, " and ", dv);
    FEWSTEP_CHECK(g == h || (g > 0 && h % g == 0), "k: expected heads that divide those of q, ", h,
                  ", got ", g);
    FEWSTEP_CHECK(dt_o == nullptr || delta0 != nullptr, "delta0: expected beside dt_o, got none");
    const DType stat = q.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    const auto rows = [&](const TensorView* x, const char* argument,
                          std::initializer_list<std::int64_t> sizes) {
        if (x != nullptr) expect_rows(*x, argument, q.dtype, sizes);
    };
    const auto stats = [&](const TensorView* x, const char* argument) {
        if (x != nullptr) expect_contiguous(*x, argument, stat, {b, h, nq});
    };
    rows(&q, "q", {b, h, nq, d});
    rows(&k, "k", {b, g, nk, d});
    rows(&v, "v", {b, g, nk, dv});
    rows(t_q, "t_q", {b, h, nq, d});
    rows(t_k, "t_k", {b, g, nk, d});
    rows(t_v, "t_v", {b, g, nk, dv});
    rows(d_o, "d_o", {b, h, nq, dv});
    rows(dt_o, "dt_o", {b, h, nq, dv});
    rows(d_q, "d_q", {b, h, nq, d});
    rows(d_k, "d_k", {b, g, nk, d});
    rows(d_v, "d_v", {b, g, nk, dv});
    rows(dt_q, "dt_q", {b, h, nq, d});
    rows(dt_k, "dt_k", {b, g, nk, d});
    rows(dt_v, "dt_v", {b, g, nk, dv});
    stats(delta0, "delta0");
    stats(&delta1, "delta1");
    stats(&lse, "lse");
    stats(mu, "mu");
    stats(lse_rest, "lse_rest");
    expect_masks(attn_mask, t_attn_mask, q, k, cu_seqlens_q != nullptr);
    if (t_attn_mask != nullptr) {
        expect_shape(*t_attn_mask, "t_attn_mask", q.dtype, {b, h, nq, nk});
    }
    const Call call{d_o, dt_o, delta0, delta1, q,        k,         v,           t_q,
                    t_k, t_v,  lse,    mu,     lse_rest, attn_mask, t_attn_mask, is_causal,
                    d_q, d_k,  d_v,    dt_q,   dt_k,     dt_v,      scale};
    const auto sequences = list_sequences(q, k, cu_seqlens_q, cu_seqlens_k);
    dispatch_float(q.dtype, "q", [&](auto tag) { backward<decltype(tag)>(call, sequences); });
}

}  // namespace fewstep::cpu
