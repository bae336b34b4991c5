// The kernel of attention_jvp for one tile of kQueries queries; a body of foreach_isa.h. Lanes are
// queries: the row statistics m, l, r, c are vectors and nothing is reduced across lanes.
//
// For each tile of keys, with S, tS, P, H stored keys by queries:
//   m' = max(m, max_j S)    alpha = exp(m - m')    P = exp(S - m')    l' = alpha l + sum_j P
//   c' = c + sum_j P (tS - c) / l'                 H = P (tS - c')
//   r  = alpha (r - (c' - c) l) + sum_j H
//   T  = alpha (T - (c' - c) O) + P t_v + H v      O = alpha O + P v
// and at the end o = O / l, mu = c + r / l, t_o = T / l - (r / l) o, lse = m + log l.
// c is the mean of tS under P over all keys so far, and r what rounding leaves of it. The result
// does not depend on c in exact arithmetic; with it, what keys have in common in their tangent
// never enters H, where it would have to cancel against (r / l) o. For the same reason tS is made
// of t_k - z, with z about the mean of t_k over all keys: that takes scale q z from mu, and nothing
// else. m needs no tangent: the shift is exact. Several directions share S, P, l, m and O; each has
// its own z, tS, H, c, r and T. Tiles of keys that no query of the tile meets are not visited.

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
        const Vec<Acc> kept = first ? Vec<Acc>{} : alpha * load(w.l + lane);
        store(w.m + lane, m);
        store(w.alpha + lane, alpha);
        store(w.kept + lane, kept);
        store(w.l + lane, kept + sum);
    }
}

// tS of direction d becomes H in place, and c, r and T move on to the new mean. After softmax_tile,
// and before O takes in the tile.
template <typename Acc>
void centre_tile(const Workspace<Acc>& w, std::int64_t d, std::int64_t keys, std::int64_t lanes,
                 std::int64_t dv, bool first) {
    constexpr int kWidth = Lanes<Acc>::kCount;
    Acc* const t_s = w.t_s + d * kKeys * kQueries;
    Acc* const t_o = w.t_o + d * dv * kQueries;
    for (std::int64_t query = 0; query < lanes; query += kWidth) {
        const std::int64_t lane = d * kQueries + query;
        const Vec<Acc> before = first ? Vec<Acc>{} : load(w.c + lane);
        Vec<Acc> weighted = {};
        for (std::int64_t j = 0; j < keys; ++j) {
            const std::int64_t at = j * kQueries + query;
            weighted += load(w.s + at) * (load(t_s + at) - before);
        }
        const Vec<Acc> l = load(w.l + query);
        const Vec<Acc> c = before + (l == Acc{0} ? Vec<Acc>{} : weighted / l);
        const Vec<Acc> moved = c - before;
        Vec<Acc> sum = {};
        for (std::int64_t j = 0; j < keys; ++j) {
            const std::int64_t at = j * kQueries + query;
            const Vec<Acc> h = load(w.s + at) * (load(t_s + at) - c);
            store(t_s + at, h);
            sum += h;
        }
        if (!first) sum += load(w.alpha + query) * load(w.r + lane) - load(w.kept + query) * moved;
        store(w.c + lane, c);
        store(w.r + lane, sum);
        for (std::int64_t i = 0; !first && i < dv; ++i) {
            const std::int64_t at = i * kQueries + query;
            store(t_o + at, load(t_o + at) - moved * load(w.o + at));
        }
    }
}

// z of every direction, and scale q z: about the mean of t_k over the keys that some query meets.
template <typename T, typename Acc>
void common_mode(const AttentionTile<T>& x, const Workspace<Acc>& w) {
    const std::int64_t step = (x.sequence_keys + kSamples - 1) / kSamples;
    for (std::int64_t r = 0; r < x.directions; ++r) {
        Acc* const z = w.z + r * x.d;
        Acc* const shift = w.shift + r * kQueries;
        std::fill_n(z, x.d, Acc{0});
        std::fill_n(shift, kQueries, Acc{0});
        Acc count = 0;
        for (std::int64_t j = 0; j < x.keys; j += step) {
            if (!meets(x.mask.at(0, 0, j), x.queries, 1)) continue;
            const T* row = x.t_k.at(r).data + j * x.t_k.stride;
            for (std::int64_t i = 0; i < x.d; ++i) z[i] += to_acc(row[i]);
            count += 1;
        }
        for (std::int64_t i = 0; count > 0 && i < x.d; ++i) {
            z[i] /= count;
            for (std::int64_t m = 0; m < kQueries; ++m) shift[m] += z[i] * w.q[i * kQueries + m];
        }
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
        const Acc* t_k = has_tk ? w.t_k : nullptr;
        if (has_tk) subtract_rows(x.t_k.at(d), j, keys, x.d, w.z + d * x.d, w.t_k);
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
        const Acc inverse = 1 / w.l[m], log_l = std::log(w.l[m]);
        T* const o = x.o.data + m * x.o.stride;
        x.lse[m] = w.m[m] + log_l;
        if (x.lse_rest != nullptr) x.lse_rest[m] = empty ? 0 : log_l - (x.lse[m] - w.m[m]);
        for (std::int64_t i = 0; i < x.dv; ++i) {
            o[i] = Convert<T>::from(empty ? 0 : w.o[i * kQueries + m] * inverse);
        }
        for (std::int64_t d = 0; d < x.directions; ++d) {
            const Acc ratio = has_ts && !empty ? w.r[d * kQueries + m] * inverse : 0;
            const Acc shift = x.t_k.data != nullptr ? w.shift[d * kQueries + m] : 0;
            x.mu[d * x.mu_direction + m] =
                has_ts && !empty ? w.c[d * kQueries + m] + ratio + shift : 0;
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
    if (has_ts && has_tk) common_mode(x, w);
    std::fill_n(w.m, kQueries, -std::numeric_limits<Acc>::infinity());
    std::fill_n(w.l, kQueries, Acc{0});

    bool first = true;
    for (std::int64_t j = 0; j < x.keys; j += kKeys) {
        const std::int64_t keys = std::min<std::int64_t>(kKeys, x.keys - j);
        const Mask<T> mask = x.mask.at(0, 0, j);
        if (!meets(mask, x.queries, keys)) continue;
        // Direction 0 rides along with the primal: one product of dual matrices.
        const Acc* k = tile_rows(x.k, j, keys, x.d, x.d, Acc{1}, w.k);
        const Acc* t_k = has_ts && has_tk ? w.t_k : nullptr;
        if (t_k != nullptr) subtract_rows(x.t_k, j, keys, x.d, w.z, w.t_k);
        dual_matmul<Acc>(
            {k, t_k, x.d, 1, w.q, has_ts && has_tq ? w.t_q : nullptr, x.d, w.s, w.t_s, kQueries},
            keys, lanes);
        mask_block(w.s, kQueries, keys, x.queries, mask, mask.key, mask.query);
        if (x.causal) mask_causal(w.s, j - x.first_query, keys, x.queries);
        softmax_tile(w, keys, lanes, first);
        for (std::int64_t d = 0; has_ts && d < x.directions; ++d) {
            tangent_scores(x, w, k, d, j, keys, lanes);
            centre_tile(w, d, keys, lanes, x.dv, first);
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
        first = false;
    }
    finish_tile(x, w, has_ts, has_t);
}
