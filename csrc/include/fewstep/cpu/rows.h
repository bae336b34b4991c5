// What kernels over the rows of a [B, N, C] view share: rows of one batch item, which may be absent
// (null) or broadcast (stride 0), scratch memory, and the loop over tasks of kRowsPerTask rows.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "fewstep/tensor.h"

namespace fewstep::cpu {

constexpr std::int64_t kRowsPerTask = 64;

template <typename T>
struct Rows {
    T* data = nullptr;
    std::int64_t stride = 0;

    T* operator[](std::int64_t row) const { return data + row * stride; }
    explicit operator bool() const { return data != nullptr; }
};

// The rows of batch item b of a [B, N, C] view from row `first` on; null stays null.
template <typename T>
Rows<T> rows_of(const TensorView* view, std::int64_t b, std::int64_t first) {
    if (view == nullptr) return {};
    T* const data = view->ptr<std::remove_const_t<T>>();
    return {data + b * view->stride(0) + first * view->stride(1), view->stride(1)};
}

// As rows_of; where there is no view, `absent` is every row.
template <typename T>
Rows<const T> rows_or(const TensorView* view, std::int64_t b, std::int64_t first, const T* absent) {
    return view == nullptr ? Rows<const T>{absent, 0} : rows_of<const T>(view, b, first);
}

// Scratch blocks start at, and are as long as, whole multiples of this many elements: every vector
// width divides it, and threads don't share cache lines.
constexpr std::int64_t kPad = 16;
inline std::int64_t pad_up(std::int64_t n) {
    return (n + kPad - 1) / kPad * kPad;
}

// Zeroed scratch for `threads` times `elements` (at least one), aligned to 64 bytes.
template <typename Acc>
class Scratch {
  public:
    Scratch(std::int64_t threads, std::int64_t elements)
        : elements_(pad_up(std::max<std::int64_t>(elements, 1))),
          data_(static_cast<Acc*>(
              ::operator new(threads * elements_ * sizeof(Acc), std::align_val_t(64)))) {
        std::fill_n(data_.get(), threads * elements_, Acc(0));
    }
    Acc* of_thread(int thread) const { return data_.get() + thread * elements_; }

  private:
    struct Free {
        void operator()(void* data) const { ::operator delete(data, std::align_val_t(64)); }
    };
    std::int64_t elements_;
    std::unique_ptr<Acc[], Free> data_;
};

// Calls work(base) once per thread for a function of (b, first, count), and that for every task:
// rows first to first + count of batch item b. Which thread takes a task doesn't matter.
template <typename Acc, typename MakeWork>
void for_each_task(std::int64_t batch, std::int64_t rows, std::int64_t elements,
                   const MakeWork& make_work) {
    const std::int64_t chunks = (rows + kRowsPerTask - 1) / kRowsPerTask, tasks = batch * chunks;
    const int threads = static_cast<int>(std::min<std::int64_t>(omp_get_max_threads(), tasks));
    if (threads == 0) return;
    const Scratch<Acc> scratch(threads, elements);
#pragma omp parallel num_threads(threads)
    {
        const auto work = make_work(scratch.of_thread(omp_get_thread_num()));
#pragma omp for schedule(static)
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::int64_t first = task % chunks * kRowsPerTask;
            work(task / chunks, first, std::min(kRowsPerTask, rows - first));
        }
    }
}

}  // namespace fewstep::cpu
