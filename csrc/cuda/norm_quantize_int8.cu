// norm_quantize_int8 on the GPU: quantize_rows.cuh with a norm between the loads of a row and the
// rest. Bytes: x once, q once; the limit is the copy rate. Mean and variance are two agreements of
// the row's threads, on what they hold; the modulation comes from cache, where a batch item's rows
// leave it.
#include "fewstep/cuda/quantize_rows.cuh"
#include "fewstep/ops/norm_quantize_int8.h"

namespace fewstep::cuda {
namespace {

template <typename T>
struct TokenRows {
    const T* data;
    std::int64_t stride_b, stride_n;

    static TokenRows of(const TensorView* view) {
        if (view == nullptr) return {nullptr, 0, 0};
        return {view->ptr<const T>(), view->stride(0), view->stride(1)};
    }
    __device__ const T* at(int b, int n) const { return data + b * stride_b + n * stride_n; }
    bool in_units() const {
        const auto bytes = static_cast<std::int64_t>(sizeof(T));
        return quantize::at_sixteen(data, stride_b * bytes) &&
               quantize::at_sixteen(data, stride_n * bytes);
    }
};

template <typename T>
struct Norm {
    TokenRows<T> x, scale, shift;
    const float *weight, *bias;
    int tokens;
    bool centred;
    float eps;

    template <int kUnits>
    __device__ __forceinline__ void fill(const quantize::RowParams<Norm>& params,
                                         quantize::Team& team, std::int64_t row,
                                         float (&v)[kUnits][quantize::kUnit]) const {
        constexpr int kUnit = quantize::kUnit;
        const int columns = params.plan.columns;
        const int b = static_cast<int>(row) / tokens, n = static_cast<int>(row) % tokens;
        float total = 0;
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            const int column = team.column(i);
            quantize::load_unit(x.at(b, n) + column, columns - column, params.in_units, v[i]);
#pragma unroll
            for (int j = 0; j < kUnit; ++j) total += v[i][j];
        }
        const float mean = centred ? quotient(team.reduce_sum(total), columns) : 0.0f;
        float square = 0;
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
#pragma unroll
            for (int j = 0; j < kUnit; ++j) {
                v[i][j] = team.column(i) + j < columns ? v[i][j] - mean : 0.0f;
                square += v[i][j] * v[i][j];
            }
        }
        const float variance = quotient(team.reduce_sum(square), columns);
        const float rstd = quotient(1.0f, sqrtf(variance + eps));
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            const int column = team.column(i), count = columns - column;
            float other[kUnit];
#pragma unroll
            for (int j = 0; j < kUnit; ++j) v[i][j] *= rstd;
            if (weight != nullptr) {
                quantize::load_unit(weight + column, count, params.in_units, other);
#pragma unroll
                for (int j = 0; j < kUnit; ++j) v[i][j] *= other[j];
            }
            if (bias != nullptr) {
                quantize::load_unit(bias + column, count, params.in_units, other);
#pragma unroll
                for (int j = 0; j < kUnit; ++j) v[i][j] += other[j];
            }
            if (scale.data != nullptr) {
                quantize::load_unit(scale.at(b, n) + column, count, params.in_units, other);
#pragma unroll
                for (int j = 0; j < kUnit; ++j) v[i][j] *= 1.0f + other[j];
            }
            if (shift.data != nullptr) {
                quantize::load_unit(shift.at(b, n) + column, count, params.in_units, other);
#pragma unroll
                for (int j = 0; j < kUnit; ++j) v[i][j] += other[j];
            }
#pragma unroll
            for (int j = 0; j < kUnit; ++j) v[i][j] = j < count ? load(store<T>(v[i][j])) : 0.0f;
        }
    }
};

}  // namespace

void norm_quantize_int8(const TensorView& x, const TensorView* weight, const TensorView* bias,
                        const TensorView* scale, const TensorView* shift, const TensorView* smooth,
                        std::int64_t rotate, const TensorView& q, const TensorView& q_scale,
                        bool centred, double eps, std::uintptr_t stream) {
    check_norm_quantize_int8(x, weight, bias, scale, shift, q, q_scale);
    const std::int64_t rows = x.size(0) * x.size(1);
    FEWSTEP_CHECK(rows < std::int64_t{1} << 31, "x: expected less than 2^31 rows, got ", rows);
    const auto plan = quantize::make_plan(smooth, rotate, q, q_scale, rows, x.size(2), 0);
    const auto parameter = [](const TensorView* view) {
        return view == nullptr ? nullptr : view->ptr<const float>();
    };
    dispatch_device_float(x.dtype, "x", [&](auto tag) {
        using T = decltype(tag);
        const Norm<T> norm{TokenRows<T>::of(&x),
                           TokenRows<T>::of(scale),
                           TokenRows<T>::of(shift),
                           parameter(weight),
                           parameter(bias),
                           static_cast<int>(x.size(1)),
                           centred,
                           static_cast<float>(eps)};
        const bool in_units = norm.x.in_units() && norm.scale.in_units() && norm.shift.in_units() &&
                              quantize::at_sixteen(norm.weight, 0) &&
                              quantize::at_sixteen(norm.bias, 0);
        quantize::launch_rows<quantize::Int8>(plan, norm, in_units, "norm_quantize_int8",
                                              as_stream(stream));
    });
}

}  // namespace fewstep::cuda
