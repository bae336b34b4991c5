// The two passes of linear_attention_jvp_backward over the tokens of one task; a body of
// foreach_isa.h. In reverse, tangents play the primal: what reaches a tangent is a plain product,
// and what reaches a primal is the tangent of that product, so every pair of products is one
// product of dual matrices with the cotangent S in the place of the primal and R in that of the
// tangent.

#include "fewstep/cpu/linear_attention_tile.h"

// f as rows of masked gradients: zero where x <= 0. `from` is [count, d_pad].
template <typename T, typename Acc>
void store_masked(Acc* from, const Rows<const T>& x, std::int64_t first, std::int64_t count,
                  const LinearDims& dims, const Rows<T>& to) {
    for (std::int64_t row = 0; row < count; ++row) {
        const T* primal = x[first + row];
        Acc* gradient = from + row * dims.d_pad;
        for (std::int64_t i = 0; i < dims.d; ++i) {
            gradient[i] = to_acc(primal[i]) <= 0 ? 0 : gradient[i];
        }
        store_row(gradient, dims.d, to[first + row]);
    }
}

// S and R of one query: their first Dv columns in place of dt_o and d_o, the last ones as results.
template <typename Acc>
struct LastColumns {
    Acc s, r;
};
template <typename Acc>
LastColumns<Acc> pull_back_quotient(Acc* num, Acc* t_num, Acc den, Acc t_den, Acc* dt_o, Acc* d_o,
                                    std::int64_t padded) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    const Acc inverse = 1 / den, ratio = t_den * inverse;
    for (std::int64_t i = 0; i < padded; i += kWidth) {  // o and t_o
        const Vec<Acc> o = load(num + i) * inverse;
        store(num + i, o);
        store(t_num + i, load(t_num + i) * inverse - o * ratio);
    }
    const Acc b_o = dot(dt_o, num, padded);
    const Acc last = dot(d_o, num, padded) + dot(dt_o, t_num, padded) - ratio * b_o;
    for (std::int64_t i = 0; i < padded; i += kWidth) {
        const Vec<Acc> b = load(dt_o + i);
        store(d_o + i, (load(d_o + i) - b * ratio) * inverse);
        store(dt_o + i, b * inverse);
    }
    return {-b_o * inverse, -last * inverse};
}

// d_q and d_t_q of x.count queries, and their part of d_A and d_tA, added to `d_state` (whose
// primal is d_tA and whose tangent is d_A).
template <typename T>
void pull_back_queries(const LinearQueries<T>& x, const LinearWorkspace<acc_t<T>>& w,
                       const LinearState<acc_t<T>>& state, const LinearState<acc_t<T>>& d_state) {
    using Acc = acc_t<T>;
    const LinearDims& dims = x.dims;
    for (std::int64_t first = 0; first < x.count; first += kTile) {
        const std::int64_t count = std::min(kTile, x.count - first);
        load_features(x.q, x.t_q, first, count, dims.d, dims.d_pad, w.f, w.t_f);
        const DualProduct<Acc> numerators{w.f,          w.t_f,          dims.d_pad, 1,
                                          state.matrix, state.t_matrix, dims.d,     w.num,
                                          w.t_num,      dims.dv_pad};
        dual_matmul(numerators, count, dims.dv_pad);
        load_values(x.d_o, first, count, dims.dv, dims.dv_pad, w.r);
        load_values(x.dt_o, first, count, dims.dv, dims.dv_pad, w.s);
        if (!x.d_o) std::fill_n(w.r, count * dims.dv_pad, Acc(0));
        for (std::int64_t row = 0; row < count; ++row) {
            const Acc* f = w.f + row * dims.d_pad;
            const Acc* t_f = w.t_f + row * dims.d_pad;
            const std::int64_t at = row * dims.dv_pad;
            const Acc den = dot(f, state.sum, dims.d_pad) + static_cast<Acc>(x.eps);
            const Acc t_den = dot(f, state.t_sum, dims.d_pad) + dot(t_f, state.sum, dims.d_pad);
            const LastColumns<Acc> last = pull_back_quotient(w.num + at, w.t_num + at, den, t_den,
                                                             w.s + at, w.r + at, dims.dv_pad);
            w.s_last[row] = last.s;
            w.r_last[row] = last.r;
            add_scaled(f, last.s, dims.d_pad, d_state.sum);
            add_scaled(f, last.r, dims.d_pad, d_state.t_sum);
            add_scaled(t_f, last.s, dims.d_pad, d_state.t_sum);
        }
        const DualProduct<Acc> states{
            w.f,         w.t_f, 1, dims.d_pad, w.s, w.r, count, d_state.matrix, d_state.t_matrix,
            dims.dv_pad, true};
        dual_matmul(states, dims.d, dims.dv_pad);
        if (!x.d_q && !x.d_t_q) continue;
        const DualProduct<Acc> features{
            w.s,     w.r,     dims.dv_pad, 1,         w.transposed, w.t_transposed,
            dims.dv, w.d_t_f, w.d_f,       dims.d_pad};
        dual_matmul(features, count, dims.d_pad);
        for (std::int64_t row = 0; row < count; ++row) {
            Acc* d_f = w.d_f + row * dims.d_pad;
            add_scaled(state.sum, w.s_last[row], dims.d_pad, w.d_t_f + row * dims.d_pad);
            add_scaled(state.sum, w.r_last[row], dims.d_pad, d_f);
            add_scaled(state.t_sum, w.s_last[row], dims.d_pad, d_f);
        }
        if (x.d_t_q) store_masked(w.d_t_f, x.q, first, count, dims, x.d_t_q);
        if (x.d_q) store_masked(w.d_f, x.q, first, count, dims, x.d_q);
    }
}

// The gradients of x.count keys and values, given d_tA (the primal of `d_state`) and d_A.
template <typename T>
void pull_back_keys(const LinearKeys<T>& x, const LinearWorkspace<acc_t<T>>& w,
                    const LinearState<acc_t<T>>& d_state) {
    using Acc = acc_t<T>;
    const LinearDims& dims = x.dims;
    for (std::int64_t first = 0; first < x.count; first += kTile) {
        const std::int64_t count = std::min(kTile, x.count - first);
        if (x.d_k || x.d_t_k) {
            load_values(x.v, first, count, dims.dv, dims.dv_pad, w.s);
            load_values(x.t_v, first, count, dims.dv, dims.dv_pad, w.r);
            const DualProduct<Acc> features{w.s,          x.t_v ? w.r : nullptr,
                                            dims.dv_pad,  1,
                                            w.transposed, w.t_transposed,
                                            dims.dv,      w.d_t_f,
                                            w.d_f,        dims.d_pad};
            dual_matmul(features, count, dims.d_pad);
            for (std::int64_t row = 0; row < count; ++row) {
                add_scaled(d_state.sum, Acc(1), dims.d_pad, w.d_t_f + row * dims.d_pad);
                add_scaled(d_state.t_sum, Acc(1), dims.d_pad, w.d_f + row * dims.d_pad);
            }
            if (x.d_t_k) store_masked(w.d_t_f, x.k, first, count, dims, x.d_t_k);
            if (x.d_k) store_masked(w.d_f, x.k, first, count, dims, x.d_k);
        }
        if (!x.d_v && !x.d_t_v) continue;
        load_features(x.k, x.t_k, first, count, dims.d, dims.d_pad, w.f, w.t_f);
        const DualProduct<Acc> values{w.f,
                                      x.t_k ? w.t_f : nullptr,
                                      dims.d_pad,
                                      1,
                                      d_state.matrix,
                                      d_state.t_matrix,
                                      dims.d,
                                      w.t_num,
                                      w.num,
                                      dims.dv_pad};
        dual_matmul(values, count, dims.dv_pad);
        for (std::int64_t row = 0; row < count; ++row) {
            const std::int64_t at = row * dims.dv_pad;
            if (x.d_t_v) store_row(w.t_num + at, dims.dv, x.d_t_v[first + row]);
            if (x.d_v) store_row(w.num + at, dims.dv, x.d_v[first + row]);
        }
    }
}
