// bfloat16 and float16 storage types with exact widening and round-to-nearest-even narrowing, for
// CPU kernels in plain C++. Accumulation is never done in these types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fewstep {

struct bfloat16 {
    std::uint16_t bits;
};
struct float16 {
    std::uint16_t bits;
};

inline float bits_to_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline std::uint32_t float_to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <typename To>
struct Convert {
    static To from(double value) { return static_cast<To>(value); }
};

template <>
struct Convert<bfloat16> {
    static bfloat16 from(float value) {
        std::uint32_t bits = float_to_bits(value);
        if (value != value) return {static_cast<std::uint16_t>((bits >> 16) | 0x40)};
        bits += 0x7fff + ((bits >> 16) & 1);
        return {static_cast<std::uint16_t>(bits >> 16)};
    }
};

template <>
struct Convert<float16> {
    static float16 from(float value) {
        // Branch-free so that it vectorises: all results, then the one that holds.
        const std::uint32_t bits = float_to_bits(value);
        const std::uint32_t sign = (bits >> 16) & 0x8000;
        const std::uint32_t magnitude = bits & 0x7fffffff;
        // Subnormal: adding 0.5 puts the 10 kept bits at the bottom of the mantissa and lets the
        // addition do the rounding.
        const float shifted = bits_to_float(magnitude) + 0.5f;
        const std::uint32_t subnormal = float_to_bits(shifted) - float_to_bits(0.5f);
        const std::uint32_t normal =
            (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
        const std::uint32_t infinite = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;  // or NaN
        const std::uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
        const std::uint32_t kept = magnitude >= 0x477ff000 ? infinite : finite;
        return {static_cast<std::uint16_t>(sign | kept)};
    }
};

inline double to_acc(double value) {
    return value;
}
inline float to_acc(float value) {
    return value;
}
inline float to_acc(bfloat16 value) {
    return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16);
}
inline float to_acc(float16 value) {
    // Branch-free so that it vectorises, and without float subnormals on the way, which a process
    // may flush to zero (torch.set_flush_denormal).
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000) << 16;
    const std::uint32_t magnitude = value.bits & 0x7fff;
    const std::uint32_t rebias = magnitude >= 0x7c00 ? 0x70000000 : 0x38000000;
    const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
    const std::uint32_t normal = (magnitude << 13) + rebias;
    return bits_to_float(sign | (magnitude < 0x400 ? float_to_bits(subnormal) : normal));
}

// The accumulation type of a storage type: float64 stays float64, everything else is float32.
template <typename T>
using acc_t = decltype(to_acc(T{}));

}  // namespace fewstep
