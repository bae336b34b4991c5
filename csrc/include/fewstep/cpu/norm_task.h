// What norm_jvp_body.h reads and writes: the rows of one task, and the scratch of one thread.
// Shared by norm_jvp and norm_quantize_int8, which is its primal with another end.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fewstep/cpu/rows.h"

namespace fewstep::cpu {

constexpr int kNormBlock = 4;  // rows that write their results together

// An input that is absent is a row of zeros; t_y and stats are null where they are not wanted.
template <typename T>
struct NormTask {
    Rows<const T> x, t_x, scale, shift, t_scale, t_shift;
    Rows<T> y, t_y;
    void* stats;  // [count, 4] of the accumulation type
    std::int64_t count, columns;
    bool centred;
    double eps;
};

// The scratch of one thread, each a row: the parameters, and P, Q, R, S of the kernel.
template <typename Acc>
struct NormWorkspace {
    static constexpr std::int64_t kRows = 6;
    Acc *weight, *bias, *p, *q, *r, *s;

    // `base` holds zeros.
    NormWorkspace(Acc* base, std::int64_t columns, const TensorView* weight_view,
                  const TensorView* bias_view) {
        for (Acc** row : {&weight, &bias, &p, &q, &r, &s}) {
            *row = base;
            base += pad_up(columns);
        }
        std::fill_n(weight, columns, Acc(1));
        if (weight_view != nullptr) std::copy_n(weight_view->ptr<Acc>(), columns, weight);
        if (bias_view != nullptr) std::copy_n(bias_view->ptr<Acc>(), columns, bias);
    }
};

}  // namespace fewstep::cpu
