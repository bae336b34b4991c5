// Where the rows of quantize_int8 and quantize_fp8 come from: x as it is, or activation(x), rounded
// to x's type as a tensor of it would be.
#pragma once

#include "fewstep/cuda/activation.cuh"
#include "fewstep/cuda/quantize_rows.cuh"

namespace fewstep::cuda::quantize {

template <typename T>
struct Given {
    const T* x;
    std::int64_t stride;
    Activation activation;

    // A unit at `column`, of which `count` columns exist; a gate's switch is `columns` behind.
    __device__ __forceinline__ void load(std::int64_t row, int column, int columns, bool in_units,
                                         float (&v)[kUnit]) const {
        const T* const from = x + row * stride + column;
        load_unit(from, columns - column, in_units, v);
        if (activation.gating == Gating::kNone) return;
        // Of one code for both kinds: there is a copy of it for each unit of a thread.
        float gate[kUnit];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) gate[i] = v[i];
        if (activation.is_glu) load_unit(from + columns, columns - column, in_units, gate);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
            const float active = gate_of(gate[i], activation.gating);
            v[i] = cuda::load(store<T>(activation.is_glu ? v[i] * active : active));
        }
    }

    template <int kUnits>
    __device__ __forceinline__ void fill(const RowParams<Given>& params, const Team& team,
                                         std::int64_t row, float (&v)[kUnits][kUnit]) const {
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            load(row, team.column(i), params.plan.columns, params.in_units, v[i]);
        }
    }
};

}  // namespace fewstep::cuda::quantize
