// The end of a product: what its float32 sums go through before they are rounded.
//
//   v   = activation(y)          or y activation(s), s the same columns of the weight's second half
//   out = fma(gate, v, residual)                            gate 1 and residual -0 where absent
//
// gate [G, width]: row m of out has row m / (M / G); residual [M, width]; both float32, bfloat16 or
// float16 with unit stride in the last axis. Work is done on one row of a panel at a time, in
// place. Fused operations are spelled out and no product meets a sum otherwise, so every
// instruction set makes the same bits.
//
// The activations are y times a number in [0, 1] that is within 4 * 2^-24 of the exact one
// (ops/_epilogue.py has the bound; tests go over the range).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/numeric.h"

namespace fewstep::cpu {
namespace epilogue {

constexpr int kPanel = 64;  // most columns of a row

enum class Activation : int { kNone, kGelu, kGeluTanh, kSilu };

// yes or no, by their bits: a choice that leaves no branch keeps a loop a loop over vectors.
[[gnu::always_inline]] inline float choose(bool condition, float yes, float no) {
    const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
    return bits_to_float((float_to_bits(yes) & mask) | (float_to_bits(no) & ~mask));
}

// e^x for x <= 0, within 2 units in the last place; 0 from -87 on, where results are still normal.
[[gnu::always_inline]] inline float exp_nonpositive(float x) {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
    constexpr float kSmallest = -87.0f;
    const float clamped = choose(x < kSmallest, kSmallest, x);
    const float shifted = std::fma(clamped, 1.44269504f, kRound);
    const float n = shifted - kRound;
    const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, clamped));
    // The polynomial of vector_body.h's exp_reduced.
    float p = std::fma(r, 0.001381454f, 0.008368745f);
    p = std::fma(p, r, 0.04166839f);
    p = std::fma(p, r, 0.16666521f);
    p = std::fma(p, r, 0.49999994f);
    const float reduced = std::fma(p * r, r, r) + 1.0f;
    const std::uint32_t power = (float_to_bits(shifted) - float_to_bits(kRound)) << 23;
    return choose(x < kSmallest, 0.0f, bits_to_float(float_to_bits(reduced) + power));
}

// 1 / (1 + e^-z)
[[gnu::always_inline]] inline float sigmoid(float z) {
    const float e = exp_nonpositive(-std::fabs(z));
    return choose(z < 0.0f, e, 1.0f) / (1.0f + e);
}

// The normal distribution's integral up to y: 1/2 + y p(y^2) on |y| <= 5.3, where its complement is
// 2^-24. p is of degree 13 in 2 (y / 5.3)^2 - 1, fitted for the least largest error of y p: 1.6
// 2^-24, and 3.3 2^-24 with all roundings.
[[gnu::always_inline]] inline float normal_integral(float y) {
    constexpr float kEnd = 5.3f, kSquash = 0.0711997151f;
    constexpr float kTerms[] = {0.00166835601f, -0.00143347296f, 0.00192513084f, -0.00546292774f,
                                0.00960014295f, -0.013396278f,   0.0186741538f,  -0.0252429917f,
                                0.0321183838f,  -0.0395950712f,  0.0492619276f,  -0.0665183142f,
                                0.133392587f};
    const float u = std::fma(y * y, kSquash, -1.0f);
    float p = -0.000652026501f;
#pragma GCC unroll 13
    for (const float term : kTerms) p = std::fma(p, u, term);
    const float inside = std::fma(p, y, 0.5f);
    return choose(std::fabs(y) > kEnd, choose(y < 0.0f, 0.0f, 1.0f), inside);
}

template <Activation kActivation>
[[gnu::always_inline]] inline float activate(float y) {
    if constexpr (kActivation == Activation::kGelu) return y * normal_integral(y);
    if constexpr (kActivation == Activation::kSilu) return y * sigmoid(y);
    if constexpr (kActivation == Activation::kGeluTanh) {
        // 1/2 (1 + tanh z) = sigmoid(2 z); z = sqrt(2 / pi) (y + 0.044715 y^3)
        return y * sigmoid(y * std::fma(y * y, 0.0713548163f, 1.59576912f));
    }
    return y;
}

// y becomes activation(y), or y activation(s) where there is an s.
template <Activation kActivation>
[[gnu::always_inline]] inline void activate_row(float* y, const float* s, int columns) {
    if (s == nullptr) {
        for (int n = 0; n < columns; ++n) y[n] = activate<kActivation>(y[n]);
    } else {
        for (int n = 0; n < columns; ++n) y[n] *= activate<kActivation>(s[n]);
    }
}

// One row of a gate or a residual; absent if null.
struct Line {
    const void* data;
    DType dtype;
};

template <typename T>
[[gnu::always_inline]] inline void widen_row(const void* from, int columns, float* wide) {
    const T* const values = static_cast<const T*>(from);
    for (int n = 0; n < columns; ++n) wide[n] = to_acc(values[n]);
}

[[gnu::always_inline]] inline void widen_row(const Line& line, float absent, int columns,
                                             float* wide) {
    if (line.data == nullptr) {
        for (int n = 0; n < columns; ++n) wide[n] = absent;
    } else if (line.dtype == DType::kFloat32) {
        widen_row<float>(line.data, columns, wide);
    } else if (line.dtype == DType::kBFloat16) {
        widen_row<bfloat16>(line.data, columns, wide);
    } else {
        widen_row<float16>(line.data, columns, wide);
    }
}

// y becomes gate y + residual.
[[gnu::always_inline]] inline void blend_row(float* y, const Line& gate, const Line& residual,
                                             int columns) {
    alignas(64) float factors[kPanel], terms[kPanel];
    widen_row(gate, 1.0f, columns, factors);
    widen_row(residual, -0.0f, columns, terms);
    for (int n = 0; n < columns; ++n) y[n] = std::fma(factors[n], y[n], terms[n]);
}

template <typename Out>
[[gnu::always_inline]] inline void round_row(const float* y, int columns, Out* out) {
    for (int n = 0; n < columns; ++n) out[n] = Convert<Out>::from(y[n]);
}

using ActivateFunction = void (*)(float* y, const float* s, int columns);
using BlendFunction = void (*)(float* y, const Line& gate, const Line& residual, int columns);
template <typename Out>
using RoundFunction = void (*)(const float* y, int columns, Out* out);

template <Activation kActivation>
void activate_portable(float* y, const float* s, int columns) {
    activate_row<kActivation>(y, s, columns);
}
inline void blend_portable(float* y, const Line& gate, const Line& residual, int columns) {
    blend_row(y, gate, residual, columns);
}
template <typename Out>
void round_portable(const float* y, int columns, Out* out) {
    round_row(y, columns, out);
}
#if defined(__x86_64__)
template <Activation kActivation>
FEWSTEP_TARGET_AVX2 void activate_avx2(float* y, const float* s, int columns) {
    activate_row<kActivation>(y, s, columns);
}
FEWSTEP_TARGET_AVX2 inline void blend_avx2(float* y, const Line& gate, const Line& residual,
                                           int columns) {
    blend_row(y, gate, residual, columns);
}
template <typename Out>
FEWSTEP_TARGET_AVX2 void round_avx2(const float* y, int columns, Out* out) {
    round_row(y, columns, out);
}
template <Activation kActivation>
FEWSTEP_TARGET_AVX512 void activate_avx512(float* y, const float* s, int columns) {
    activate_row<kActivation>(y, s, columns);
}
FEWSTEP_TARGET_AVX512 inline void blend_avx512(float* y, const Line& gate, const Line& residual,
                                               int columns) {
    blend_row(y, gate, residual, columns);
}
template <typename Out>
FEWSTEP_TARGET_AVX512 void round_avx512(const float* y, int columns, Out* out) {
    round_row(y, columns, out);
}
#endif

template <Activation kActivation>
ActivateFunction choose_activate() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return activate_avx512<kActivation>;
    if (isa() == Isa::kAvx2) return activate_avx2<kActivation>;
#endif
    return activate_portable<kActivation>;
}

inline BlendFunction choose_blend() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return blend_avx512;
    if (isa() == Isa::kAvx2) return blend_avx2;
#endif
    return blend_portable;
}

template <typename Out>
RoundFunction<Out> choose_round() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return round_avx512<Out>;
    if (isa() == Isa::kAvx2) return round_avx2<Out>;
#endif
    return round_portable<Out>;
}

// Of a name of ops/_epilogue.py, or null of an empty one.
inline ActivateFunction choose_activate(const std::string& name) {
    if (name.empty()) return nullptr;
    if (name == "gelu" || name == "geglu") return choose_activate<Activation::kGelu>();
    if (name == "gelu_tanh") return choose_activate<Activation::kGeluTanh>();
    FEWSTEP_CHECK(name == "silu" || name == "swiglu", "activation: expected gelu, gelu_tanh, ",
                  "silu, geglu, swiglu or none, got ", name);
    return choose_activate<Activation::kSilu>();
}
inline bool is_glu(const std::string& name) {
    return name == "geglu" || name == "swiglu";
}

}  // namespace epilogue

class Epilogue {
  public:
    // `activation` is a name of ops/_epilogue.py or empty. out has M rows of what is left of N
    // columns.
    Epilogue(const std::string& activation, const TensorView* gate, const TensorView* residual,
             std::int64_t M, std::int64_t N)
        : gate_(gate),
          residual_(residual),
          activate_(epilogue::choose_activate(activation)),
          is_glu_(epilogue::is_glu(activation)) {
        FEWSTEP_CHECK(!is_glu_ || N % 2 == 0, "w: expected an even N for ", activation, ", got ",
                      N);
        width_ = is_glu_ ? N / 2 : N;
        if (gate != nullptr) {
            const std::int64_t rows = gate->size(0);
            expect_floats(*gate, "gate", rows);
            FEWSTEP_CHECK(M == 0 || (rows > 0 && M % rows == 0),
                          "gate: expected a number of rows that divides ", M, ", got ", rows);
            rows_of_gate_ = rows > 0 ? M / rows : 1;
        }
        if (residual != nullptr) expect_floats(*residual, "residual", M);
    }

    bool is_glu() const { return is_glu_; }
    bool is_plain() const {
        return activate_ == nullptr && gate_ == nullptr && residual_ == nullptr;
    }
    std::int64_t width() const { return width_; }

    // Asks for the lines that finish() of the same columns will want: they are seldom in cache.
    template <typename Out>
    void prefetch(std::int64_t m, std::int64_t n, int columns, const Out* out) const {
        const auto ask = [](const void* from, std::int64_t bytes, auto is_write) {
            for (std::int64_t i = 0; i < bytes; i += 64) {
                __builtin_prefetch(static_cast<const char*>(from) + i, is_write.value);
            }
        };
        ask(out, columns * static_cast<std::int64_t>(sizeof(Out)), std::true_type{});
        if (residual_ != nullptr) {
            const epilogue::Line line = this->line(residual_, m, n);
            ask(line.data, columns * (line.dtype == DType::kFloat32 ? 4 : 2), std::false_type{});
        }
        if (gate_ != nullptr && rows_of_gate_ == 1) {
            const epilogue::Line line = this->line(gate_, m, n);
            ask(line.data, columns * (line.dtype == DType::kFloat32 ? 4 : 2), std::false_type{});
        }
    }

    // Rows [m, m + rows) of columns [n, n + columns), at most kPanel, from y and for halves s,
    // whose rows are kPanel apart; y is overwritten. All values of a tile at once take each step:
    // an activation is a chain of some twenty instructions, and a load from the residual waits for
    // earlier stores to out if their addresses agree in the low twelve bits.
    template <typename Out>
    void finish(std::int64_t m, std::int64_t n, int rows, int columns, float* y, const float* s,
                epilogue::RoundFunction<Out> round, Out* out) const {
        constexpr int kPanel = epilogue::kPanel;
        if (activate_ != nullptr) activate_(y, is_glu_ ? s : nullptr, rows * kPanel);
        for (int r = 0; r < rows && (gate_ != nullptr || residual_ != nullptr); ++r) {
            blend_(y + r * kPanel, line(gate_, (m + r) / rows_of_gate_, n),
                   line(residual_, m + r, n), columns);
        }
        for (int r = 0; r < rows; ++r) round(y + r * kPanel, columns, out + r * width_);
    }

  private:
    void expect_floats(const TensorView& view, const char* argument, std::int64_t rows) const {
        FEWSTEP_CHECK(view.dtype == DType::kFloat32 || view.dtype == DType::kBFloat16 ||
                          view.dtype == DType::kFloat16,
                      argument, ": expected float32, bfloat16 or float16, got ", name(view.dtype));
        expect_rows(view, argument, view.dtype, {rows, width_});
    }

    static epilogue::Line line(const TensorView* view, std::int64_t row, std::int64_t n) {
        if (view == nullptr) return {nullptr, DType::kFloat32};
        const std::int64_t at = row * view->stride(0) + n;
        const std::int64_t size = view->dtype == DType::kFloat32 ? 4 : 2;
        return {view->ptr<char>() + at * size, view->dtype};
    }

    const TensorView* gate_;
    const TensorView* residual_;
    epilogue::ActivateFunction activate_;
    bool is_glu_;
    epilogue::BlendFunction blend_ = epilogue::choose_blend();
    std::int64_t width_ = 0, rows_of_gate_ = 1;
};

}  // namespace fewstep::cpu
