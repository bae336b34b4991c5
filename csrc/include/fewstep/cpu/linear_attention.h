// What linear_attention_jvp and its backward share on the CPU. Tokens are taken in chunks of
// kTokens (a task) and tiles of kTile rows, widened into scratch: f and t_f (or a cotangent)
// [kTile, D], values [kTile, Dv], rows padded to whole vectors with zeros. The column of ones
// beside v is never formed: a state is the pair of a matrix A_v [D, Dv] and a vector a_1 [D], and
// its tangent.
#pragma once

#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/rows.h"
#include "fewstep/dispatch.h"
#include "fewstep/ops/linear_attention_jvp.h"

namespace fewstep::cpu {

constexpr std::int64_t kTokens = 512;
constexpr std::int64_t kTile = 64;

struct LinearDims {
    std::int64_t d, dv, d_pad, dv_pad;

    LinearDims(std::int64_t d_, std::int64_t dv_)
        : d(d_), dv(dv_), d_pad(pad_up(d_)), dv_pad(pad_up(dv_)) {}
};

// A dual state: matrix rows are dv_pad apart.
template <typename Acc>
struct LinearState {
    Acc *matrix, *t_matrix;  // [D, Dv]
    Acc *sum, *t_sum;        // [D]

    static std::int64_t elements(const LinearDims& dims) {
        return 2 * (dims.d_pad * dims.dv_pad + dims.d_pad);
    }
    LinearState(Acc* base, const LinearDims& dims) {
        matrix = base;
        t_matrix = matrix + dims.d_pad * dims.dv_pad;
        sum = t_matrix + dims.d_pad * dims.dv_pad;
        t_sum = sum + dims.d_pad;
    }
};

// The rows of head `head` (of B x H) from token `first` on; null stays null.
template <typename T>
Rows<T> head_rows(const TensorView* view, std::int64_t head, std::int64_t first) {
    if (view == nullptr) return {};
    const std::int64_t b = head / view->size(1), h = head % view->size(1);
    T* const data = view->ptr<std::remove_const_t<T>>();
    return {data + b * view->stride(0) + h * view->stride(1) + first * view->stride(2),
            view->stride(2)};
}

inline std::int64_t chunks_of(std::int64_t tokens) {
    return (tokens + kTokens - 1) / kTokens;
}

// The state of every head as the sum of those of its chunks, which for_each_chunk has filled.
template <typename Acc>
class PartialStates {
  public:
    PartialStates(std::int64_t heads, std::int64_t tokens, const LinearDims& dims)
        : dims_(dims),
          heads_(heads),
          chunks_(chunks_of(tokens)),
          elements_(LinearState<Acc>::elements(dims)),
          data_(heads * std::max<std::int64_t>(chunks_, 1), elements_) {}

    LinearState<Acc> at(std::int64_t head, std::int64_t chunk) const {
        return {
            data_.of_thread(static_cast<int>(head * std::max<std::int64_t>(chunks_, 1) + chunk)),
            dims_};
    }

    // Leaves the sum of a head's chunks, added in order, in its chunk 0.
    void add_up() const {
#pragma omp parallel for schedule(static)
        for (std::int64_t head = 0; head < heads_; ++head) {
            Acc* const to = at(head, 0).matrix;
            for (std::int64_t chunk = 1; chunk < chunks_; ++chunk) {
                const Acc* const from = at(head, chunk).matrix;
                for (std::int64_t i = 0; i < elements_; ++i) to[i] += from[i];
            }
        }
    }

  private:
    LinearDims dims_;
    std::int64_t heads_, chunks_, elements_;
    Scratch<Acc> data_;
};

// As for_each_task in rows.h, over the chunks of every head: work(head, first token, count).
template <typename Acc, typename MakeWork>
void for_each_chunk(std::int64_t heads, std::int64_t tokens, std::int64_t elements,
                    const MakeWork& make_work) {
    const std::int64_t chunks = chunks_of(tokens), tasks = heads * chunks;
    const int threads = static_cast<int>(std::min<std::int64_t>(omp_get_max_threads(), tasks));
    if (threads == 0) return;
    const Scratch<Acc> scratch(threads, elements);
#pragma omp parallel num_threads(threads)
    {
        const auto work = make_work(scratch.of_thread(omp_get_thread_num()));
#pragma omp for schedule(static)
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::int64_t first = task % chunks * kTokens;
            work(task / chunks, first, std::min(kTokens, tokens - first));
        }
    }
}

// The state of head `head` between the caller's layout, [.., D, Dv + 1], and ours.
template <typename Acc>
void store_state(const LinearState<Acc>& from, const LinearDims& dims, std::int64_t head,
                 Acc* state, Acc* t_state) {
    const std::int64_t at = head * dims.d * (dims.dv + 1);
    for (std::int64_t i = 0; i < dims.d; ++i) {
        Acc* const row = state + at + i * (dims.dv + 1);
        Acc* const t_row = t_state + at + i * (dims.dv + 1);
        *std::copy_n(from.matrix + i * dims.dv_pad, dims.dv, row) = from.sum[i];
        *std::copy_n(from.t_matrix + i * dims.dv_pad, dims.dv, t_row) = from.t_sum[i];
    }
}
template <typename Acc>
void load_state(const Acc* state, const Acc* t_state, const LinearDims& dims, std::int64_t head,
                const LinearState<Acc>& to) {
    const std::int64_t at = head * dims.d * (dims.dv + 1);
    for (std::int64_t i = 0; i < dims.d; ++i) {
        const Acc* const row = state + at + i * (dims.dv + 1);
        const Acc* const t_row = t_state + at + i * (dims.dv + 1);
        std::copy_n(row, dims.dv, to.matrix + i * dims.dv_pad);
        std::copy_n(t_row, dims.dv, to.t_matrix + i * dims.dv_pad);
        to.sum[i] = row[dims.dv];
        to.t_sum[i] = t_row[dims.dv];
    }
}

// The transposes [Dv, D] of both matrices, rows d_pad apart.
template <typename Acc>
void transpose_state(const LinearState<Acc>& from, const LinearDims& dims, Acc* matrix,
                     Acc* t_matrix) {
    for (std::int64_t i = 0; i < dims.d; ++i) {
        for (std::int64_t j = 0; j < dims.dv; ++j) {
            matrix[j * dims.d_pad + i] = from.matrix[i * dims.dv_pad + j];
            t_matrix[j * dims.d_pad + i] = from.t_matrix[i * dims.dv_pad + j];
        }
    }
}

// What both directions ask of the inputs and the states.
inline void check_linear_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                                   const TensorView* t_q, const TensorView* t_k,
                                   const TensorView* t_v, const TensorView& state,
                                   const TensorView& t_state) {
    FEWSTEP_CHECK(q.ndim == 4 && k.ndim == 4 && v.ndim == 4, "q, k, v: expected 4 axes, got ",
                  q.ndim, ", ", k.ndim, " and ", v.ndim);
    const std::int64_t b = q.size(0), h = q.size(1), nq = q.size(2), nk = k.size(2);
    const std::int64_t d = q.size(3), dv = v.size(3);
    FEWSTEP_CHECK(d % 8 == 0 && dv % 8 == 0 && d <= kLinearAttentionMaxDim &&
                      dv <= kLinearAttentionMaxDim && d > 0 && dv > 0,
                  "q, v: expected head dims that are multiples of 8 up to ", kLinearAttentionMaxDim,
                  ", got ", d, " and ", dv);
    const DType acc = q.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    expect_rows(q, "q", q.dtype, {b, h, nq, d});
    expect_rows(k, "k", q.dtype, {b, h, nk, d});
    expect_rows(v, "v", q.dtype, {b, h, nk, dv});
    if (t_q != nullptr) expect_rows(*t_q, "t_q", q.dtype, {b, h, nq, d});
    if (t_k != nullptr) expect_rows(*t_k, "t_k", q.dtype, {b, h, nk, d});
    if (t_v != nullptr) expect_rows(*t_v, "t_v", q.dtype, {b, h, nk, dv});
    expect_contiguous(state, "state", acc, {b, h, d, dv + 1});
    expect_contiguous(t_state, "t_state", acc, {b, h, d, dv + 1});
}

}  // namespace fewstep::cpu
