// The kernel of attention_jvp for one tile of kQueries queries; a body of foreach_isa.h. Lanes are
// queries: the row statistics m, l, r, c are vectors and nothing is reduced across lanes.
//
// For each tile of keys, with S, tS, P, H stored keys by queries:
//   m' = max(m, max_j S)    alpha = exp(m - m')    P = exp(S - m')    H = P * (tS - c)
//   l = alpha l + sum_j P   r = alpha r + sum_j H
//   O = alpha O + P v       T = alpha T + P t_v + H v
// and at the end o = O / l, mu = c + r / l, t_o = T / l - (r / l) o, lse = m + log l.
// c is the mean of tS under P over the first tile in which the row meets a key. The result does not
// depend on it in exact arithmetic; with it, a component of the tangent that is common to all keys
// never enters H, where it would have to cancel against (r / l) o. m needs no tangent: the shift is
// exact. Several directions share S, P, l, m and O; each has its own tS, H, c, r and T.

#include "fewstep/cpu/attention_rows_body.h"
#include "fewstep/cpu/dual_matmul_body.h"

// S becomes P in place, and m, l and alpha move on.
template <typename Acc>
void softmax_tile(const Workspace<Acc>& w, std::int64_t keys, std::int64_t lanes, bool first) {
    constexpr int kWidth = Lanes<Acc>::kCount;
    constexpr Acc kNever = -std::numeric_limits<Acc>::infinity();
    for (std::int64_t lane = 0; lane < lanes; lane += kWidth) {
        const Vec<Acc> before = load(w.m + lane);
        Vec<Acc> m = before;
        for (std::int64_t j = 0; j < keys; ++j) {
            const Vec<Acc> s = load(w.s + j * kQueries + lane);
            m = s > m ? s : m;
        }
        // A row that has met no key: -inf minus anything finite keeps its P and alpha at zero.
        const Vec<Acc> shift = m == kNever ? Vec<Acc>{} : m;
        const Vec<Acc> alpha = exp_nonpositive<Acc>(before - shift);
        Vec<Acc> sum = {};
        for (std::int64_t j = 0; j < keys; ++j) {
            const std::int64_t at = j * kQueries + lane;
            const Vec<Acc> p = exp_nonpositive<Acc>(load(w.s + at) - shift);
            store(w.s + at, p);
            sum += p;
        }
        store(w.m + lane, m);
        store(w.alpha + lane, alpha);
        store(w.l + lane, first ? sum : alpha * load(w.l + lane) + sum);
    }
}

// tS of direction d becomes H in place, and c and r move on. After softmax_tile.
template <typename Acc>
void centre_tile(const Workspace<Acc>& w, std::int64_t d, std::int64_t keys, std::int64_t lanes,
                 bool first) {
    constexpr int kWidth = Lanes<Acc>::kCount;
    Acc* const t_s = w.t_s + d * kKeys * kQueries;
    for (std::int64_t lane = d * kQueries; lane < d * kQueries + lanes; lane += kWidth) {
        const std::int64_t query = lane - d * kQueries;
        const Vec<Acc> alpha = load(w.alpha + query);
        // Where alpha is zero nothing before this tile counts, so c may be chosen anew.
        bool starts = false;
        for (int i = 0; i < kWidth; ++i) starts |= w.alpha[query + i] == 0;
        Vec<Acc> c = first ? Vec<Acc>{} : load(w.c + lane);
        if (starts) {
            Vec<Acc> weighted = {};
            for (std::int64_t j = 0; j < keys; ++j) {
                const std::int64_t at = j * kQueries + query;
                weighted += load(w.s + at) * load(t_s + at);
            }
            const Vec<Acc> l = load(w.l + query);
            const Vec<Acc> mean = l == Acc{0} ? Vec<Acc>{} : weighted / l;
            c = alpha == Acc{0} ? mean : c;
        }
        Vec<Acc> sum = {};
        for (std::int64_t j = 0; j < keys; ++j) {
            const std::int64_t at = j * kQueries + query;
            const Vec<Acc> h = load(w.s + at) * (load(t_s + at) - c);
            store(t_s + at, h);
            sum += h;
        }
        store(w.c + lane, c);
        store(w.r + lane, first ? sum : alpha * load(w.r + lane) + sum);
    }
}

// tS of direction d, keys [j, j + keys). Direction 0 with the primal's product has come with S.
template <typename T, typename Acc>
void tangent_scores(const AttentionTile<T>& x, const Workspace<Acc>& w, const Acc* k,
                    std::int64_t d, std::int64_t j, std::int64_t keys, std::int64_t lanes) {
    Acc* const t_s = w.t_s + d * kKeys * kQueries;
    const bool has_tq = x.t_q.data != nullptr, has_tk = x.t_k.data != nullptr;
    if (!has_tq && !has_tk) {
        std::fill_n(t_s, keys * kQueries, Acc{0});
    } else if (d > 0) {
        const Acc* t_k = tile_rows(x.t_k.at(d), j, keys, x.d, x.d, Acc{1}, w.t_k);
        const Acc* t_q = has_tq ? w.t_q + d * x.d * kQueries : nullptr;
        dual_matmul<Acc>({k, t_k, x.d, 1, w.q, t_q, x.d, nullptr, t_s, kQueries}, keys, lanes);
    }
    const Mask<T> t_mask = x.t_mask.at(d, 0, j);
    mask_block(t_s, kQueries, keys, x.queries, t_mask, t_mask.key, t_mask.query);
}

// -inf for keys behind their query; `j` counts from the first query of the tile.
template <typename Acc>
void mask_causal(Acc* s, std::int64_t j, std::int64_t keys, std::int64_t queries) {
    for (std::int64_t i = std::max<std::int64_t>(0, -j); i < keys; ++i) {
        const std::int64_t hidden = std::min(queries, i + j);
        std::fill_n(s + i * kQueries, hidden, -std::numeric_limits<Acc>::infinity());
    }
}

// The results of the tile, from the accumulators [Dv, kQueries].
template <typename T, typename Acc>
void finish_tile(const AttentionTile<T>& x, const Workspace<Acc>& w, bool has_ts, bool has_t) {
    for (std::int64_t m = 0; m < x.queries; ++m) {
        const bool empty = w.l[m] == 0;
        const Acc inverse = 1 / w.l[m];
        T* const o = x.o.data + m * x.o.stride;
        x.lse[m] = w.m[m] + std::log(w.l[m]);
        for (std::int64_t i = 0; i < x.dv; ++i) {
            o[i] = Convert<T>::from(empty ? 0 : w.o[i * kQueries + m] * inverse);
        }
        for (std::int64_t d = 0; d < x.directions; ++d) {
            const Acc ratio = has_ts && !empty ? w.r[d * kQueries + m] * inverse : 0;
            x.mu[d * x.mu_direction + m] = has_ts ? w.c[d * kQueries + m] + ratio : 0;
            T* const t_o = x.t_o.at(d).data + m * x.t_o.stride;
            const Acc* const sums = w.t_o + d * x.dv * kQueries + m;
            for (std::int64_t i = 0; i < x.dv; ++i) {
                const Acc value = w.o[i * kQueries + m] * inverse;
                const Acc tangent = sums[i * kQueries] * inverse - ratio * value;
                t_o[i] = Convert<T>::from(has_t && !empty ? tangent : 0);
            }
        }
    }
}

template <typename T>
void attend_tile(const AttentionTile<T>& x, const Workspace<acc_t<T>>& w) {
    using Acc = acc_t<T>;
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    const std::int64_t lanes = (x.queries + kWidth - 1) / kWidth * kWidth;
    const bool has_tq = x.t_q.data != nullptr, has_tk = x.t_k.data != nullptr;
    const bool has_ts = x.directions > 0 && (has_tq || has_tk || x.t_mask);
    const bool has_t = x.directions > 0 && (has_ts || x.t_v.data != nullptr);
    const Acc scale = static_cast<Acc>(x.scale);
    pack_columns(x.q, 0, x.queries, x.d, kQueries, scale, w.q);
    for (std::int64_t d = 0; has_tq && d < x.directions; ++d) {
        pack_columns(x.t_q.at(d), 0, x.queries, x.d, kQueries, scale, w.t_q + d * x.d * kQueries);
    }
    std::fill_n(w.m, kQueries, -std::numeric_limits<Acc>::infinity());

    for (std::int64_t j = 0; j < x.keys; j += kKeys) {
        const bool first = j == 0;
        const std::int64_t keys = std::min<std::int64_t>(kKeys, x.keys - j);
        // Direction 0 rides along with the primal: one product of dual matrices.
        const Acc* k = tile_rows(x.k, j, keys, x.d, x.d, Acc{1}, w.k);
        const Acc* t_k = has_ts ? tile_rows(x.t_k, j, keys, x.d, x.d, Acc{1}, w.t_k) : nullptr;
        dual_matmul<Acc>(
            {k, t_k, x.d, 1, w.q, has_ts && has_tq ? w.t_q : nullptr, x.d, w.s, w.t_s, kQueries},
            keys, lanes);
        const Mask<T> mask = x.mask.at(0, 0, j);
        mask_block(w.s, kQueries, keys, x.queries, mask, mask.key, mask.query);
        if (x.causal) mask_causal(w.s, j - x.first_query, keys, x.queries);
        softmax_tile(w, keys, lanes, first);
        for (std::int64_t d = 0; has_ts && d < x.directions; ++d) {
            tangent_scores(x, w, k, d, j, keys, lanes);
            centre_tile(w, d, keys, lanes, first);
        }

        const Acc* v = tile_rows(x.v, j, keys, x.dv, x.dv, Acc{1}, w.k);
        for (std::int64_t d = 0; d < std::max<std::int64_t>(1, x.directions); ++d) {
            const Acc* t_v =
                has_t ? tile_rows(x.t_v.at(d), j, keys, x.dv, x.dv, Acc{1}, w.t_k) : nullptr;
            const Acc* h = has_ts ? w.t_s + d * kKeys * kQueries : nullptr;
            Acc* const t_o = has_t ? w.t_o + d * x.dv * kQueries : nullptr;
            dual_matmul<Acc>({v, t_v, 1, x.dv, w.s, h, keys, d == 0 ? w.o : nullptr, t_o, kQueries,
                              !first, w.alpha},
                             x.dv, lanes);
        }
    }
    finish_tile(x, w, has_ts, has_t);
}
