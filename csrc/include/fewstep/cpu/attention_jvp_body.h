// The kernel of attention_jvp for one tile of kQueries queries; a body of foreach_isa.h. Lanes are
// queries: the row statistics m, l, r, c are vectors and nothing is reduced across lanes.
//
// For each tile of keys, with S, tS, P, H stored keys by queries:
//   m' = max(m, max_j S)    alpha = exp(m - m')    P = exp(S - m')    H = P * (tS - c)
//   l = alpha l + sum_j P   r = alpha r + sum_j H
//   O = alpha O + P v       T = alpha T + P t_v + H v
// and at the end o = O / l, mu = c + r / l, t_o = T / l - (r / l) o, lse = m + log l.
// c is the mean of tS under P over the first tile. The result does not depend on it in exact
// arithmetic; with it, a component of the tangent that is common to all keys never enters H, where
// it would have to cancel against (r / l) o. m needs no tangent: the shift is exact.

#include "fewstep/cpu/dual_matmul_body.h"

// Row statistics and scores of one tile of keys. S becomes P and tS becomes H in place.
template <typename Acc>
struct SoftmaxState {
    Acc *m, *l, *r, *c, *alpha;
    Acc *s, *t_s;  // [keys, kQueries]; t_s is null where there is no tangent
};

template <typename Acc>
void softmax_tile(const SoftmaxState<Acc>& x, std::int64_t keys, std::int64_t lanes, bool first) {
    constexpr int kWidth = Lanes<Acc>::kCount;
    for (std::int64_t lane = 0; lane < lanes; lane += kWidth) {
        const Vec<Acc> before = load(x.m + lane);
        Vec<Acc> m = before;
        for (std::int64_t j = 0; j < keys; ++j) {
            const Vec<Acc> s = load(x.s + j * kQueries + lane);
            m = s > m ? s : m;
        }
        const Vec<Acc> alpha = exp_nonpositive<Acc>(before - m);
        Vec<Acc> sum = {}, weighted = {};
        for (std::int64_t j = 0; j < keys; ++j) {
            const std::int64_t at = j * kQueries + lane;
            const Vec<Acc> p = exp_nonpositive<Acc>(load(x.s + at) - m);
            store(x.s + at, p);
            sum += p;
            if (first && x.t_s != nullptr) weighted += p * load(x.t_s + at);
        }
        store(x.m + lane, m);
        store(x.alpha + lane, alpha);
        store(x.l + lane, first ? sum : alpha * load(x.l + lane) + sum);
        if (x.t_s == nullptr) continue;
        const Vec<Acc> c = first ? weighted / sum : load(x.c + lane);
        Vec<Acc> t_sum = {};
        for (std::int64_t j = 0; j < keys; ++j) {
            const std::int64_t at = j * kQueries + lane;
            const Vec<Acc> h = load(x.s + at) * (load(x.t_s + at) - c);
            store(x.t_s + at, h);
            t_sum += h;
        }
        store(x.c + lane, c);
        store(x.r + lane, first ? t_sum : alpha * load(x.r + lane) + t_sum);
    }
}

// Queries [count, D] to lanes [D, kQueries], times `scale`; lanes past `count` are zero.
template <typename T, typename Acc>
void pack_queries(const Rows<T>& from, std::int64_t count, std::int64_t d, Acc scale, Acc* to) {
    for (std::int64_t i = 0; i < d; ++i) {
        for (std::int64_t m = 0; m < count; ++m) {
            to[i * kQueries + m] = to_acc(from.data[m * from.stride + i]) * scale;
        }
        for (std::int64_t m = count; m < kQueries; ++m) to[i * kQueries + m] = 0;
    }
}

// The rows of a tile as accumulation-type values, d apart: where they lie, or widened into
// `scratch`. Rows that lie further apart are gathered too: strides of some kilobytes would map to
// one cache set. Null stays null.
template <typename T, typename Acc>
const Acc* tile_rows(const Rows<T>& from, std::int64_t first, std::int64_t count, std::int64_t d,
                     Acc* scratch) {
    if (from.data == nullptr) return nullptr;
    const T* rows = from.data + first * from.stride;
    if constexpr (std::is_same_v<T, Acc>) {
        if (from.stride == d) return rows;
    }
    for (std::int64_t j = 0; j < count; ++j) {
        const T* row = rows + j * from.stride;
        for (std::int64_t i = 0; i < d; ++i) scratch[j * d + i] = to_acc(row[i]);
    }
    return scratch;
}

// o and t_o of the tile, from the accumulators [Dv, kQueries].
template <typename T, typename Acc>
void finish_tile(const AttentionTile<T>& x, const Workspace<Acc>& w, bool has_ts, bool has_t) {
    for (std::int64_t m = 0; m < x.queries; ++m) {
        const Acc inverse = 1 / w.l[m];
        const Acc ratio = has_ts ? w.r[m] * inverse : 0;
        x.template stat<Acc>(x.lse)[m] = w.m[m] + std::log(w.l[m]);
        x.template stat<Acc>(x.mu)[m] = has_ts ? w.c[m] + ratio : 0;
        T* o = x.o.data + m * x.o.stride;
        T* t_o = x.t_o.data + m * x.t_o.stride;
        for (std::int64_t i = 0; i < x.dv; ++i) {
            const Acc value = w.o[i * kQueries + m] * inverse;
            o[i] = Convert<T>::from(value);
            const Acc tangent = has_t ? w.t_o[i * kQueries + m] * inverse - ratio * value : 0;
            t_o[i] = Convert<T>::from(tangent);
        }
    }
}

template <typename T>
void attend_tile(const AttentionTile<T>& x, const Workspace<acc_t<T>>& w) {
    using Acc = acc_t<T>;
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    const std::int64_t lanes = (x.queries + kWidth - 1) / kWidth * kWidth;
    const bool has_tq = x.t_q.data != nullptr, has_ts = has_tq || x.t_k.data != nullptr;
    const Acc scale = static_cast<Acc>(x.scale);
    pack_queries(x.q, x.queries, x.d, scale, w.q);
    if (has_tq) pack_queries(x.t_q, x.queries, x.d, scale, w.t_q);
    const SoftmaxState<Acc> state{w.m, w.l, w.r, w.c, w.alpha, w.s, has_ts ? w.t_s : nullptr};
    for (std::int64_t m = 0; m < kQueries; ++m) w.m[m] = -std::numeric_limits<Acc>::infinity();

    for (std::int64_t j = 0; j < x.keys; j += kKeys) {
        const std::int64_t keys = std::min<std::int64_t>(kKeys, x.keys - j);
        const Acc* k = tile_rows(x.k, j, keys, x.d, w.k);
        const Acc* t_k = tile_rows(x.t_k, j, keys, x.d, w.t_k);
        const DualProduct<Acc> scores{k,   t_k,     x.d, 1,     w.q,     has_tq ? w.t_q : nullptr,
                                      x.d, nullptr, w.s, w.t_s, kQueries};
        dual_matmul(scores, keys, lanes);
        // Masks and biases act here: on S and tS, before the statistics are taken.
        softmax_tile(state, keys, lanes, j == 0);
        const Acc* v = tile_rows(x.v, j, keys, x.dv, w.k);
        const Acc* t_v = tile_rows(x.t_v, j, keys, x.dv, w.t_k);
        const DualProduct<Acc> output{v,       t_v,
                                      1,       x.dv,
                                      w.s,     has_ts ? w.t_s : nullptr,
                                      keys,    j == 0 ? nullptr : w.alpha,
                                      w.o,     w.t_o,
                                      kQueries};
        dual_matmul(output, x.dv, lanes);
    }
    finish_tile(x, w, has_ts, has_ts || x.t_v.data != nullptr);
}
