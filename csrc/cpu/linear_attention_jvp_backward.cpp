// linear_attention_jvp_backward on the CPU: two passes, one over the queries (their gradients, and
// the gradient of the state), one over the keys and values. Numerators and denominators are
// computed again from the queries and the state, in float32: nothing of the size of the output is
// kept.
//
// A task is kTokens tokens of one head. The parts of a head's state gradient are added in order, so
// the result depends neither on the number of threads nor on scheduling. The passes are
// linear_attention_jvp_backward_body.h.
#include "fewstep/ops/linear_attention_jvp_backward.h"

#include "fewstep/cpu/linear_attention.h"

namespace fewstep::cpu {
namespace {

template <typename T>
struct LinearQueries {
    Rows<const T> d_o, dt_o, q, t_q;
    Rows<T> d_q, d_t_q;
    std::int64_t count;
    LinearDims dims;
    double eps;
};
template <typename T>
struct LinearKeys {
    Rows<const T> k, v, t_k, t_v;
    Rows<T> d_k, d_v, d_t_k, d_t_v;
    std::int64_t count;
    LinearDims dims;
};

// The scratch of one thread.
template <typename Acc>
struct LinearWorkspace {
    Acc *f, *t_f, *d_f, *d_t_f;      // [kTile, D]
    Acc *num, *t_num, *s, *r;        // [kTile, Dv]
    Acc *transposed, *t_transposed;  // [Dv, D] of a state
    Acc *s_last, *r_last;            // [kTile]
    Acc* state;                      // a state

    static std::int64_t elements(const LinearDims& dims) {
        return 4 * kTile * (dims.d_pad + dims.dv_pad) + 2 * dims.d_pad * dims.dv_pad + 2 * kTile +
               LinearState<Acc>::elements(dims);
    }
    LinearWorkspace(Acc* base, const LinearDims& dims) {
        const auto take = [&base](std::int64_t n) {
            Acc* const block = base;
            base += n;
            return block;
        };
        for (Acc** block : {&f, &t_f, &d_f, &d_t_f}) *block = take(kTile * dims.d_pad);
        for (Acc** block : {&num, &t_num, &s, &r}) *block = take(kTile * dims.dv_pad);
        for (Acc** block : {&transposed, &t_transposed}) *block = take(dims.d_pad * dims.dv_pad);
        for (Acc** block : {&s_last, &r_last}) *block = take(kTile);
        state = take(LinearState<Acc>::elements(dims));
    }
};

}  // namespace
}  // namespace fewstep::cpu

#define FEWSTEP_ISA_BODY "fewstep/cpu/linear_attention_jvp_backward_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
struct Kernels {
    void (*pull_back_queries)(const LinearQueries<T>&, const LinearWorkspace<acc_t<T>>&,
                              const LinearState<acc_t<T>>&, const LinearState<acc_t<T>>&);
    void (*pull_back_keys)(const LinearKeys<T>&, const LinearWorkspace<acc_t<T>>&,
                           const LinearState<acc_t<T>>&);
};

template <typename T>
Kernels<T> choose_kernels() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return {avx512::pull_back_queries<T>, avx512::pull_back_keys<T>};
    if (isa() == Isa::kAvx2) return {avx2::pull_back_queries<T>, avx2::pull_back_keys<T>};
#endif
    return {portable::pull_back_queries<T>, portable::pull_back_keys<T>};
}

}  // namespace

void linear_attention_jvp_backward(const TensorView* d_o, const TensorView* dt_o,
                                   const TensorView& q, const TensorView& k, const TensorView& v,
                                   const TensorView* t_q, const TensorView* t_k,
                                   const TensorView* t_v, const TensorView& state,
                                   const TensorView& t_state, const TensorView* d_q,
                                   const TensorView* d_k, const TensorView* d_v,
                                   const TensorView* d_t_q, const TensorView* d_t_k,
                                   const TensorView* d_t_v, double eps) {
    check_linear_attention(q, k, v, t_q, t_k, t_v, state, t_state);
    const std::int64_t heads = q.size(0) * q.size(1), nq = q.size(2), nk = k.size(2);
    const LinearDims dims(q.size(3), v.size(3));
    const auto expect = [&](const TensorView* view, const char* argument, std::int64_t rows,
                            std::int64_t columns) {
        if (view == nullptr) return;
        expect_rows(*view, argument, q.dtype, {q.size(0), q.size(1), rows, columns});
    };
    expect(d_o, "d_o", nq, dims.dv);
    expect(dt_o, "dt_o", nq, dims.dv);
    expect(d_q, "d_q", nq, dims.d);
    expect(d_k, "d_k", nk, dims.d);
    expect(d_v, "d_v", nk, dims.dv);
    expect(d_t_q, "d_t_q", nq, dims.d);
    expect(d_t_k, "d_t_k", nk, dims.d);
    expect(d_t_v, "d_t_v", nk, dims.dv);

    dispatch_float(q.dtype, "q", [&](auto tag) {
        using T = decltype(tag);
        using Acc = acc_t<T>;
        const Kernels<T> kernels = choose_kernels<T>();
        const std::int64_t elements = LinearWorkspace<Acc>::elements(dims);
        const PartialStates<Acc> d_states(heads, nq, dims);
        for_each_chunk<Acc>(heads, nq, elements, [&](Acc* base) {
            const LinearWorkspace<Acc> workspace(base, dims);
            return [&, workspace](std::int64_t head, std::int64_t first, std::int64_t count) {
                const LinearQueries<T> queries{head_rows<const T>(d_o, head, first),
                                               head_rows<const T>(dt_o, head, first),
                                               head_rows<const T>(&q, head, first),
                                               head_rows<const T>(t_q, head, first),
                                               head_rows<T>(d_q, head, first),
                                               head_rows<T>(d_t_q, head, first),
                                               count,
                                               dims,
                                               eps};
                const LinearState<Acc> own(workspace.state, dims);
                load_state(state.ptr<Acc>(), t_state.ptr<Acc>(), dims, head, own);
                transpose_state(own, dims, workspace.transposed, workspace.t_transposed);
                kernels.pull_back_queries(queries, workspace, own,
                                          d_states.at(head, first / kTokens));
            };
        });
        d_states.add_up();
        if (d_k == nullptr && d_v == nullptr && d_t_k == nullptr && d_t_v == nullptr) return;
        for_each_chunk<Acc>(heads, nk, elements, [&](Acc* base) {
            const LinearWorkspace<Acc> workspace(base, dims);
            return [&, workspace](std::int64_t head, std::int64_t first, std::int64_t count) {
                const LinearKeys<T> keys{head_rows<const T>(&k, head, first),
                                         head_rows<const T>(&v, head, first),
                                         head_rows<const T>(t_k, head, first),
                                         head_rows<const T>(t_v, head, first),
                                         head_rows<T>(d_k, head, first),
                                         head_rows<T>(d_v, head, first),
                                         head_rows<T>(d_t_k, head, first),
                                         head_rows<T>(d_t_v, head, first),
                                         count,
                                         dims};
                const LinearState<Acc> d_state = d_states.at(head, 0);
                transpose_state(d_state, dims, workspace.transposed, workspace.t_transposed);
                kernels.pull_back_keys(keys, workspace, d_state);
            };
        });
    });
}

}  // namespace fewstep::cpu
