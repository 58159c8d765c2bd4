// Memory fetched ahead.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/kernel_prelude.h"

namespace vitfast::cpu::VITFAST_ISA {

inline void prefetch_into_second_level(const void* p) { __builtin_prefetch(p, 0, 2); }

// Fetches runs of memory into the caches, a few at a time, while other work goes on.
class Prefetch {
 public:
  // A run begins at data + y * row_stride + x * column_stride, x < columns the faster, and has `bytes` bytes. Strides
  // are in bytes. All is fetched after `steps` calls of `advance`.
  Prefetch(const void* data, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, int64_t bytes,
           int64_t steps)
      : run_(reinterpret_cast<uintptr_t>(data)),
        column_stride_(column_stride),
        row_step_(row_stride - (columns - 1) * column_stride),
        columns_(columns),
        left_(bytes == 0 ? 0 : rows * columns),
        step_(parts(left_, steps)),
        bytes_(bytes) {}

  // Goes on with the next part, into the caches from the first or the second level on.
  void advance(bool into_first_level) { into_first_level ? advance<1>() : advance<2>(); }

 private:
  static constexpr uintptr_t kCacheLine = 64;

  template <int kLevel>
  void advance() {
    const int64_t runs = std::min(step_, left_);
    left_ -= runs;
    for (int64_t i = 0; i < runs; ++i) {
      const uintptr_t end = run_ + bytes_;
      for (uintptr_t line = run_ & ~uintptr_t{kCacheLine - 1}; line < end; line += kCacheLine) {
        __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 4 - kLevel);
      }
      const bool ends_row = ++x_ == columns_;
      x_ = ends_row ? 0 : x_;
      run_ += ends_row ? row_step_ : column_stride_;
    }
  }

  uintptr_t run_;
  int64_t column_stride_, row_step_, columns_, left_, step_, bytes_;
  int64_t x_ = 0;
};

}  // namespace vitfast::cpu::VITFAST_ISA
