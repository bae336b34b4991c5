// What a kernel asks of a view before it touches memory. Python validates for people, with better
// words; these checks hold for whoever calls the module or the registered op directly.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "fewstep/dispatch.h"
#include "fewstep/tensor.h"

namespace fewstep {

// Refuses a view that is not `dtype` of shape `sizes`.
inline void expect_shape(const TensorView& view, const char* argument, DType dtype,
                         std::initializer_list<std::int64_t> sizes) {
    FEWSTEP_CHECK(view.dtype == dtype, argument, ": expected ", name(dtype), ", got ",
                  name(view.dtype));
    FEWSTEP_CHECK(view.ndim == static_cast<int>(sizes.size()), argument, ": expected ",
                  sizes.size(), " axes, got ", view.ndim);
    int axis = 0;
    for (const std::int64_t size : sizes) {
        FEWSTEP_CHECK(view.size(axis) == size, argument, ": expected size ", size, " in axis ",
                      axis, ", got ", view.size(axis));
        ++axis;
    }
}

// As above, and without gaps in the last axis.
inline void expect_rows(const TensorView& view, const char* argument, DType dtype,
                        std::initializer_list<std::int64_t> sizes) {
    expect_shape(view, argument, dtype, sizes);
    const int last = view.ndim - 1;
    FEWSTEP_CHECK(last < 0 || view.size(last) <= 1 || view.stride(last) == 1, argument,
                  ": expected unit stride in the last axis, got ", view.stride(last));
}

// As above, and without gaps anywhere.
inline void expect_contiguous(const TensorView& view, const char* argument, DType dtype,
                              std::initializer_list<std::int64_t> sizes) {
    expect_rows(view, argument, dtype, sizes);
    std::int64_t stride = 1;
    for (int axis = view.ndim - 1; axis >= 0 && view.numel() > 0; --axis) {
        FEWSTEP_CHECK(view.size(axis) == 1 || view.stride(axis) == stride, argument,
                      ": expected a contiguous tensor, got stride ", view.stride(axis), " in axis ",
                      axis);
        stride *= view.size(axis);
    }
}

// The view with its first axes as one, so that `axes` are left: [..., M, K] as rows of a matrix, of
// which strides have to allow it. A view of as many axes or fewer is returned as it is.
inline TensorView collapse(const TensorView& view, const char* argument, int axes) {
    if (view.ndim <= axes) return view;
    TensorView one = view;
    one.ndim = axes;
    const int merged = view.ndim - axes;  // axes [0, merged] become the first
    std::copy_n(view.sizes.begin() + merged, axes, one.sizes.begin());
    std::copy_n(view.strides.begin() + merged, axes, one.strides.begin());
    std::int64_t& size = one.sizes[0];
    for (int axis = merged - 1; axis >= 0; --axis) {
        if (view.size(axis) == 1) continue;
        if (size == 1) one.strides[0] = view.stride(axis);
        FEWSTEP_CHECK(size == 1 || view.numel() == 0 || view.stride(axis) == one.strides[0] * size,
                      argument, ": expected leading axes that lie like one, got stride ",
                      view.stride(axis), " in axis ", axis);
        size *= view.size(axis);
    }
    return one;
}

}  // namespace fewstep
