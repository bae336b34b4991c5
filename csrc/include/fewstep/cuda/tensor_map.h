// How the copy engine is told of a [B, H, N, D] tensor of 16-bit values, without CUDA: the
// emulation reads through the same description.
#pragma once

#include <cstdint>

#include "fewstep/check.h"

namespace fewstep::cuda {

// Fastest axis first, strides in bytes (of D there is none). A head or batch axis with stride 0 is
// described with size 1, and its index is multiplied by its step, 0.
struct MapDescription {
    std::uint64_t sizes[4], strides[3];
    int head_step, batch_step;
};

// Whether the engine can read the tensor: everything in units of 16 bytes, no repeated rows.
inline bool is_loadable(const TensorView& x) {
    if (x.data % 16 != 0 || (x.size(3) > 1 && x.stride(3) != 1)) return false;
    for (int axis = 0; axis < 3; ++axis) {
        if (x.size(axis) > 1 && (x.stride(axis) % 8 != 0 || x.stride(axis) < 0)) return false;
    }
    return x.size(2) <= 1 || x.stride(2) > 0;
}

inline MapDescription describe(const TensorView& x) {
    MapDescription d{};
    const auto repeated = [&](int axis) { return x.size(axis) > 1 && x.stride(axis) == 0; };
    d.head_step = repeated(1) ? 0 : 1;
    d.batch_step = repeated(0) ? 0 : 1;
    for (int i = 0; i < 4; ++i) {
        const int axis = 3 - i;
        d.sizes[i] = repeated(axis) ? 1 : static_cast<std::uint64_t>(x.size(axis));
        // Nobody reads the stride of an axis of one, but it must look like one.
        if (i > 0) {
            d.strides[i - 1] =
                d.sizes[i] == 1 ? 16 : 2 * static_cast<std::uint64_t>(x.stride(axis));
        }
    }
    return d;
}

// Refuses what is not `dtype` of shape `sizes` in rows of whole chunks of 16 bytes.
inline void expect_loadable(const TensorView& x, const char* argument, DType dtype,
                            std::initializer_list<std::int64_t> sizes) {
    expect_rows(x, argument, dtype, sizes);
    FEWSTEP_CHECK(x.size(3) % 8 == 0, argument, ": expected a multiple of 8 columns, got ",
                  x.size(3));
    FEWSTEP_CHECK(is_loadable(x), argument,
                  ": expected rows that start at multiples of 16 bytes and are not repeated");
}

// Where a block of threads finds its rows in a tensor.
struct TileIndex {
    int row, head, batch;
};

}  // namespace fewstep::cuda
