// linear_attention_jvp on the CPU: two passes, one over the keys and values for the state, one over
// the queries. Per token and head 2 D Dv FLOPs in each for the primal and as many again for each
// side of the tangent: about as long as reading the tensors takes at D = 32.
//
// A task is kTokens tokens of one head. The states of a head's chunks are added in order, so the
// result depends neither on the number of threads nor on scheduling. The passes are
// linear_attention_jvp_body.h.
#include "fewstep/ops/linear_attention_jvp.h"

#include "fewstep/cpu/linear_attention.h"

namespace fewstep::cpu {
namespace {

template <typename T>
struct LinearKeys {
    Rows<const T> k, v, t_k, t_v;
    std::int64_t count;
    LinearDims dims;
};
template <typename T>
struct LinearQueries {
    Rows<const T> q, t_q;
    Rows<T> o, t_o;
    std::int64_t count;
    LinearDims dims;
    bool state_has_tangent;
    double eps;
};

// The scratch of one thread.
template <typename Acc>
struct LinearWorkspace {
    Acc *f, *t_f;  // [kTile, D]
    Acc *v, *t_v;  // [kTile, Dv]: values, later numerators

    static std::int64_t elements(const LinearDims& dims) {
        return 2 * kTile * (dims.d_pad + dims.dv_pad);
    }
    LinearWorkspace(Acc* base, const LinearDims& dims) {
        f = base;
        t_f = f + kTile * dims.d_pad;
        v = t_f + kTile * dims.d_pad;
        t_v = v + kTile * dims.dv_pad;
    }
};

}  // namespace
}  // namespace fewstep::cpu

#define FEWSTEP_ISA_BODY "fewstep/cpu/linear_attention_jvp_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
struct Kernels {
    void (*sum_state)(const LinearKeys<T>&, const LinearWorkspace<acc_t<T>>&,
                      const LinearState<acc_t<T>>&);
    void (*apply_state)(const LinearQueries<T>&, const LinearWorkspace<acc_t<T>>&,
                        const LinearState<acc_t<T>>&);
};

template <typename T>
Kernels<T> choose_kernels() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return {avx512::sum_state<T>, avx512::apply_state<T>};
    if (isa() == Isa::kAvx2) return {avx2::sum_state<T>, avx2::apply_state<T>};
#endif
    return {portable::sum_state<T>, portable::apply_state<T>};
}

}  // namespace

void linear_attention_jvp(const TensorView& q, const TensorView& k, const TensorView& v,
                          const TensorView* t_q, const TensorView* t_k, const TensorView* t_v,
                          const TensorView& o, const TensorView& t_o, const TensorView& state,
                          const TensorView& t_state, double eps) {
    check_linear_attention(q, k, v, t_q, t_k, t_v, state, t_state);
    const std::int64_t heads = q.size(0) * q.size(1), nq = q.size(2), nk = k.size(2);
    const LinearDims dims(q.size(3), v.size(3));
    expect_rows(o, "o", q.dtype, {q.size(0), q.size(1), nq, dims.dv});
    expect_rows(t_o, "t_o", q.dtype, {q.size(0), q.size(1), nq, dims.dv});
    dispatch_float(q.dtype, "q", [&](auto tag) {
        using T = decltype(tag);
        using Acc = acc_t<T>;
        const Kernels<T> kernels = choose_kernels<T>();
        const std::int64_t elements = LinearWorkspace<Acc>::elements(dims);
        const PartialStates<Acc> states(heads, nk, dims);
        for_each_chunk<Acc>(heads, nk, elements, [&](Acc* base) {
            const LinearWorkspace<Acc> workspace(base, dims);
            return [&, workspace](std::int64_t head, std::int64_t first, std::int64_t count) {
                const LinearKeys<T> keys{head_rows<const T>(&k, head, first),
                                         head_rows<const T>(&v, head, first),
                                         head_rows<const T>(t_k, head, first),
                                         head_rows<const T>(t_v, head, first),
                                         count,
                                         dims};
                kernels.sum_state(keys, workspace, states.at(head, first / kTokens));
            };
        });
        states.add_up();
        for (std::int64_t head = 0; head < heads; ++head) {
            store_state(states.at(head, 0), dims, head, state.ptr<Acc>(), t_state.ptr<Acc>());
        }
        for_each_chunk<Acc>(heads, nq, elements, [&](Acc* base) {
            const LinearWorkspace<Acc> workspace(base, dims);
            return [&, workspace](std::int64_t head, std::int64_t first, std::int64_t count) {
                const LinearQueries<T> queries{head_rows<const T>(&q, head, first),
                                               head_rows<const T>(t_q, head, first),
                                               head_rows<T>(&o, head, first),
                                               head_rows<T>(&t_o, head, first),
                                               count,
                                               dims,
                                               t_k != nullptr || t_v != nullptr,
                                               eps};
                kernels.apply_state(queries, workspace, states.at(head, 0));
            };
        });
    });
}

}  // namespace fewstep::cpu
