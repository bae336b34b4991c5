// modulate_jvp on the CPU: memory-bound, each input read once and each output written once. A task
// is kRowsPerTask rows of one batch item. The kernel is modulate_jvp_body.h.
#include "fewstep/ops/modulate_jvp.h"

#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/rows.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {
namespace {

// What is absent is a row of ones or zeros.
template <typename T>
struct ModulateTask {
    Rows<const T> x, y, gate, t_x, t_y, t_gate;
    Rows<T> out, t_out;
    std::int64_t count, columns;
};

}  // namespace
}  // namespace fewstep::cpu

#define FEWSTEP_ISA_BODY "fewstep/cpu/modulate_jvp_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
using Kernel = void (*)(const ModulateTask<T>&);

template <typename T>
Kernel<T> choose_kernel() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::modulate_rows<T>;
    if (isa() == Isa::kAvx2) return avx2::modulate_rows<T>;
#endif
    return portable::modulate_rows<T>;
}

}  // namespace

void modulate_jvp(const TensorView& x, const TensorView& y, const TensorView* gate,
                  const TensorView* t_x, const TensorView* t_y, const TensorView* t_gate,
                  const TensorView& out, const TensorView& t_out) {
    FEWSTEP_CHECK(x.ndim == 3, "x: expected 3 axes, got ", x.ndim);
    const std::int64_t batch = x.size(0), rows = x.size(1), columns = x.size(2);
    const auto expect = [&](const TensorView* view, const char* argument) {
        if (view != nullptr) expect_rows(*view, argument, x.dtype, {batch, rows, columns});
    };
    expect(&x, "x");
    expect(&y, "y");
    expect(gate, "gate");
    expect(t_x, "t_x");
    expect(t_y, "t_y");
    expect(t_gate, "t_gate");
    expect(&out, "out");
    expect(&t_out, "t_out");
    dispatch_float(x.dtype, "x", [&](auto tag) {
        using T = decltype(tag);
        const Kernel<T> kernel = choose_kernel<T>();
        const std::vector<T> zeros(columns), ones(columns, Convert<T>::from(1));
        for_each_task<acc_t<T>>(batch, rows, 0, [&](acc_t<T>*) {
            return [&](std::int64_t b, std::int64_t first, std::int64_t count) {
                kernel({rows_of<const T>(&x, b, first), rows_of<const T>(&y, b, first),
                        rows_or(gate, b, first, ones.data()), rows_or(t_x, b, first, zeros.data()),
                        rows_or(t_y, b, first, zeros.data()),
                        rows_or(t_gate, b, first, zeros.data()), rows_of<T>(&out, b, first),
                        rows_of<T>(&t_out, b, first), count, columns});
            };
        });
    });
}

}  // namespace fewstep::cpu
