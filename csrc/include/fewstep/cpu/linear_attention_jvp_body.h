// The two passes of linear_attention_jvp over the tokens of one task; a body of foreach_isa.h.

#include "fewstep/cpu/linear_attention_tile.h"

// The state of x.count keys. `state` holds zeros.
template <typename T>
void sum_state(const LinearKeys<T>& x, const LinearWorkspace<acc_t<T>>& w,
               const LinearState<acc_t<T>>& state) {
    using Acc = acc_t<T>;
    const LinearDims& dims = x.dims;
    for (std::int64_t first = 0; first < x.count; first += kTile) {
        const std::int64_t count = std::min(kTile, x.count - first);
        load_features(x.k, x.t_k, first, count, dims.d, dims.d_pad, w.f, w.t_f);
        load_values(x.v, first, count, dims.dv, dims.dv_pad, w.v);
        load_values(x.t_v, first, count, dims.dv, dims.dv_pad, w.t_v);
        const DualProduct<Acc> product{w.f,
                                       x.t_k ? w.t_f : nullptr,
                                       1,
                                       dims.d_pad,
                                       w.v,
                                       x.t_v ? w.t_v : nullptr,
                                       count,
                                       state.matrix,
                                       state.t_matrix,
                                       dims.dv_pad,
                                       true};
        dual_matmul(product, dims.d, dims.dv_pad);
        for (std::int64_t row = 0; row < count; ++row) {
            add_scaled(w.f + row * dims.d_pad, Acc(1), dims.d_pad, state.sum);
            if (x.t_k) add_scaled(w.t_f + row * dims.d_pad, Acc(1), dims.d_pad, state.t_sum);
        }
    }
}

// o and t_o of x.count queries, given the state of all keys.
template <typename T>
void apply_state(const LinearQueries<T>& x, const LinearWorkspace<acc_t<T>>& w,
                 const LinearState<acc_t<T>>& state) {
    using Acc = acc_t<T>;
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    const LinearDims& dims = x.dims;
    const bool tangent = x.t_q || x.state_has_tangent;
    for (std::int64_t first = 0; first < x.count; first += kTile) {
        const std::int64_t count = std::min(kTile, x.count - first);
        load_features(x.q, x.t_q, first, count, dims.d, dims.d_pad, w.f, w.t_f);
        const DualProduct<Acc> product{w.f,          x.t_q ? w.t_f : nullptr,
                                       dims.d_pad,   1,
                                       state.matrix, x.state_has_tangent ? state.t_matrix : nullptr,
                                       dims.d,       w.v,
                                       w.t_v,        dims.dv_pad};
        dual_matmul(product, count, dims.dv_pad);
        for (std::int64_t row = 0; row < count; ++row) {
            const Acc* f = w.f + row * dims.d_pad;
            Acc* num = w.v + row * dims.dv_pad;
            Acc* t_num = w.t_v + row * dims.dv_pad;
            const Acc inverse = 1 / (dot(f, state.sum, dims.d_pad) + static_cast<Acc>(x.eps));
            for (std::int64_t i = 0; i < dims.dv_pad; i += kWidth) {
                store(num + i, load(num + i) * inverse);
            }
            store_row(num, dims.dv, x.o[first + row]);
            if (!tangent) {
                std::fill_n(x.t_o[first + row], dims.dv, Convert<T>::from(0));
                continue;
            }
            Acc t_den = dot(f, state.t_sum, dims.d_pad);
            if (x.t_q) t_den += dot(w.t_f + row * dims.d_pad, state.sum, dims.d_pad);
            for (std::int64_t i = 0; i < dims.dv_pad; i += kWidth) {
                store(t_num + i, (load(t_num + i) - load(num + i) * t_den) * inverse);
            }
            store_row(t_num, dims.dv, x.t_o[first + row]);
        }
    }
}
