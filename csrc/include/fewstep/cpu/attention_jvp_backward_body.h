// The kernel of attention_jvp_backward for one range of keys; a body of foreach_isa.h. Blocks of
// scores are queries by keys, lanes are keys: everything that is transposed belongs to a tile of
// keys and is prepared once, rows of queries are read as they are.
//
// Evaluated on dual numbers the backward is five products of dual matrices (dual_matmul_body.h),
// each three matmuls with everything present, and each shrinks with what is absent or not wanted:
//   (S, tS)       = (q, t_q) (k, t_k)^T            P, tP, dS0, dS1 from these, elementwise
//   (X0, X1)      = (dt_o, d_o) (v, t_v)^T
//   (dt_q, d_q)  += (dS0, dS1) (k, t_k)
//   (dt_k, d_k)  += (dS0, dS1)^T (q, t_q)
//   (dt_v, d_v)  += (P, tP)^T (dt_o, d_o)

#include "fewstep/cpu/attention_rows_body.h"
#include "fewstep/cpu/dual_matmul_body.h"

// -inf for keys behind their query; `ahead` is the first query's index less the first key's.
template <typename Acc>
void mask_ahead(Acc* s, std::int64_t ahead, std::int64_t queries, std::int64_t keys) {
    for (std::int64_t m = 0; m < queries; ++m) {
        const std::int64_t seen = std::clamp<std::int64_t>(ahead + m + 1, 0, keys);
        std::fill_n(s + m * kKeys + seen, keys - seen, -std::numeric_limits<Acc>::infinity());
    }
}

// S, tS, X0, X1 become P, tP, dS0, dS1 in place.
template <typename Acc>
void score_gradients(const Workspace<Acc>& w, const RowStats<Acc>& stats, const Plan& plan,
                     std::int64_t rows, std::int64_t lanes) {
    constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    for (std::int64_t m = 0; m < rows; ++m) {
        // A query that met no key has P = 0 everywhere.
        const Acc shift = stats.lse[m] == -kInfinity ? kInfinity : stats.lse[m];
        const Acc rest = stats.lse_rest == nullptr ? 0 : stats.lse_rest[m];
        const Acc mu = stats.mu == nullptr ? 0 : stats.mu[m];
        const Acc delta0 = plan.has0 ? stats.delta0[m] : 0, delta1 = stats.delta1[m];
        for (std::int64_t at = m * kKeys; at < m * kKeys + lanes; at += kWidth) {
            const Vec<Acc> p = exp_nonpositive<Acc>((load(w.s + at) - shift) - rest);
            store(w.s + at, p);
            Vec<Acc> ds1 = {}, t_p = {};
            if (plan.ds1) ds1 = p * ((plan.x1 ? load(w.x1 + at) : Vec<Acc>{}) - delta1);
            if (plan.t_p) {
                t_p = p * (load(w.t_s + at) - mu);
                store(w.t_s + at, t_p);
            }
            if (plan.has0 && (plan.ds0 || plan.ds1)) {
                const Vec<Acc> e = (plan.x0 ? load(w.x0 + at) : Vec<Acc>{}) - delta0;
                store(w.x0 + at, p * e);
                if (plan.t_p) ds1 += t_p * e;
            }
            if (plan.ds1) store(w.x1 + at, ds1);
        }
    }
}

// What belongs to one tile of keys: columns [D, kKeys] for the scores, rows for their gradients.
template <typename T>
void pack_keys(const KeyHead<T>& x, const Plan& plan, std::int64_t j, std::int64_t keys,
               Workspace<acc_t<T>>& w) {
    using Acc = acc_t<T>;
    constexpr Acc kOne = 1;
    const std::int64_t d = plan.d, dv = plan.dv;
    pack_columns(x.k, j, keys, d, kKeys, kOne, w.k_columns);
    if (plan.t_p && plan.has_tk) pack_columns(x.t_k, j, keys, d, kKeys, kOne, w.t_k_columns);
    if (plan.x0 || plan.x1) pack_columns(x.v, j, keys, dv, kKeys, kOne, w.v_columns);
    if (plan.x1 && plan.has_tv) pack_columns(x.t_v, j, keys, dv, kKeys, kOne, w.t_v_columns);
    w.k = plan.d_q || plan.dt_q ? tile_rows(x.k, j, keys, d, plan.ld, kOne, w.k_rows) : nullptr;
    w.t_k = plan.d_q ? tile_rows(x.t_k, j, keys, d, plan.ld, kOne, w.t_k_rows) : nullptr;
}

// One tile of queries with the packed tile of keys: everything it adds to the gradients.
template <typename T>
void backward_pair(const QueryHead<T>& x, const Plan& plan, const Workspace<acc_t<T>>& w,
                   std::int64_t i, std::int64_t rows, std::int64_t j, std::int64_t keys) {
    using Acc = acc_t<T>;
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    const std::int64_t lanes = (keys + kWidth - 1) / kWidth * kWidth;
    const std::int64_t ld = plan.ld, ldv = plan.ldv;
    // The scale goes where the forward has it, so that S has the bits that lse is made of.
    const Acc scale = static_cast<Acc>(plan.scale);
    const Acc* q = tile_rows(x.q, i, rows, plan.d, ld, scale, w.q);
    const Acc* t_q = tile_rows(x.t_q, i, rows, plan.d, ld, scale, w.t_q);
    const Acc* d_o = tile_rows(x.d_o, i, rows, plan.dv, ldv, Acc{1}, w.d_o);
    const Acc* dt_o = tile_rows(x.dt_o, i, rows, plan.dv, ldv, Acc{1}, w.dt_o);

    if (plan.t_p && t_q == nullptr && !plan.has_tk) std::fill_n(w.t_s, rows * kKeys, Acc{0});
    dual_matmul<Acc>({q, t_q, ld, 1, w.k_columns, plan.has_tk ? w.t_k_columns : nullptr, plan.d,
                      w.s, plan.t_p ? w.t_s : nullptr, kKeys},
                     rows, lanes);
    dual_matmul<Acc>({dt_o, d_o, ldv, 1, w.v_columns, plan.has_tv ? w.t_v_columns : nullptr,
                      plan.dv, plan.x0 ? w.x0 : nullptr, plan.x1 ? w.x1 : nullptr, kKeys},
                     rows, lanes);
    const Mask<T> mask = x.mask.at(0, i, j), t_mask = x.t_mask.at(0, i, j);
    mask_block(w.s, kKeys, rows, keys, mask, mask.query, mask.key);
    if (plan.t_p) mask_block(w.t_s, kKeys, rows, keys, t_mask, t_mask.query, t_mask.key);
    if (plan.causal) mask_ahead(w.s, i - j, rows, keys);
    score_gradients(w, x.stats.at(i), plan, rows, lanes);

    const Acc* const ds0 = plan.ds0 ? w.x0 : nullptr;
    const Acc* const ds1 = plan.ds1 ? w.x1 : nullptr;
    const auto partial = [&](Acc* base) { return base == nullptr ? nullptr : base + i * ld; };
    dual_matmul<Acc>(
        {ds0, ds1, kKeys, 1, w.k, w.t_k, keys, partial(x.dt_q), partial(x.d_q), ld, true}, rows,
        ld);
    dual_matmul<Acc>({ds0, ds1, 1, kKeys, q, t_q, rows, w.dt_k, w.d_k, ld, true}, keys, ld);
    dual_matmul<Acc>(
        {w.s, plan.t_p ? w.t_s : nullptr, 1, kKeys, dt_o, d_o, rows, w.dt_v, w.d_v, ldv, true},
        keys, ldv);
}

// Keys [first, end) of one key head with all the queries that read it. `heads` are these queries'.
template <typename T>
void backward_keys(const KeyHead<T>& x, const QueryHead<T>* heads, std::int64_t count,
                   const Plan& plan, std::int64_t queries, std::int64_t first, std::int64_t end,
                   Workspace<acc_t<T>> w) {
    using Acc = acc_t<T>;
    for (std::int64_t j = first; j < end; j += kKeys) {
        const std::int64_t keys = std::min(kKeys, end - j);
        bool packed = false;
        for (Acc* sums : {w.d_k, w.dt_k}) {
            if (sums != nullptr) std::fill_n(sums, keys * plan.ld, Acc{0});
        }
        for (Acc* sums : {w.d_v, w.dt_v}) {
            if (sums != nullptr) std::fill_n(sums, keys * plan.ldv, Acc{0});
        }
        for (std::int64_t h = 0; h < count; ++h) {
            for (std::int64_t i = plan.first_query(j); i < queries; i += kQueries) {
                const std::int64_t rows = std::min(kQueries, queries - i);
                for (Acc* sums : {heads[h].d_q, heads[h].dt_q}) {
                    if (j == first && sums != nullptr) {
                        std::fill_n(sums + i * plan.ld, rows * plan.ld, Acc{0});
                    }
                }
                if (!meets(heads[h].mask.at(0, i, j), rows, keys)) continue;
                if (!packed) pack_keys(x, plan, j, keys, w);
                packed = true;
                backward_pair(heads[h], plan, w, i, rows, j, keys);
            }
        }
        store_rows(x.d_k, j, keys, plan.d, w.d_k, plan.ld);
        store_rows(x.dt_k, j, keys, plan.d, w.dt_k, plan.ld);
        store_rows(x.d_v, j, keys, plan.dv, w.d_v, plan.ldv);
        store_rows(x.dt_v, j, keys, plan.dv, w.dt_v, plan.ldv);
    }
}
