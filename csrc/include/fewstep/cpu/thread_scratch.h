// Scratch memory of the threads of a parallel region, allocated before it starts.
#pragma once

#include <cstdint>
#include <new>

namespace fewstep::cpu {

// Elements for every thread, uninitialised and aligned to cache lines.
template <typename T>
class ThreadScratch {
  public:
    ThreadScratch(int threads, std::int64_t elements)
        : bytes_((elements * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64),
          data_(bytes_ == 0 ? nullptr
                            : ::operator new(static_cast<std::size_t>(threads * bytes_), kAlign)) {}
    ThreadScratch(const ThreadScratch&) = delete;
    ThreadScratch& operator=(const ThreadScratch&) = delete;
    ~ThreadScratch() { ::operator delete(data_, kAlign); }
    T* of_thread(int thread) const {
        return reinterpret_cast<T*>(static_cast<char*>(data_) + thread * bytes_);
    }

  private:
    static constexpr std::align_val_t kAlign{64};
    std::int64_t bytes_;
    void* data_;
};

}  // namespace fewstep::cpu
