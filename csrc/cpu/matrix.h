// Matrices in scratch, whole vectors wide, and tokens as their columns.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/kernel_prelude.h"

namespace vitfast::cpu::VITFAST_ISA {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Tokens as columns of a matrix, cut into vectors.
//
// The lone token. The square of an odd number is one more than a multiple of 8, so an odd window leaves one token over.
// A vector of 16 lanes for that one would cost a third of the work again, in the products and in the exponentials: it
// is left out of the vectors, and its column is computed apart, one dot product for each row.
template <class T>
struct Columns {
  int64_t count;    // of tokens
  bool lone;        // the last token is not part of the vectors
  int64_t vectors;  // whole vectors that hold the other tokens, and perhaps some columns without a token

  explicit Columns(int64_t tokens)
      : count(tokens),
        lone(tokens > kLanes<T> && tokens % kLanes<T> == 1),
        vectors(lone ? tokens / kLanes<T> : parts(tokens, kLanes<T>)) {}
  int64_t width() const { return vectors * kLanes<T>; }
  int64_t last() const { return count - 1; }
  int64_t in_vectors() const { return lone ? count - 1 : count; }
};

// A matrix in scratch, its columns whole vectors, with room behind it for one vector that is stored over its end.
template <class T>
class Matrix {
 public:
  Matrix(int64_t rows, int64_t columns, Arena& arena)
      : columns_(columns), data_(arena.take<T>(rows * columns + kLanes<T>)), offset_(arena.take<int64_t>(rows)) {
    if (!arena.holds_memory()) return;
    for (int64_t r = 0; r < rows; ++r) offset_[r] = r * columns;
  }

  int64_t columns() const { return columns_; }
  T* row(int64_t r) const { return data_ + r * columns_; }
  Rows<T> rows() const { return {data_, offset_, 1}; }
  Rows<T> rows_from(int64_t first) const { return {row(first), offset_, 1}; }

 private:
  int64_t columns_;
  T* data_;
  int64_t* offset_;
};

// dst(c)[r] = src(r)[c] for r < rows, c < columns; zeros from r = rows up to a whole vector.
template <class T, class Source>
void transpose_rows(Source src, int64_t rows, int64_t columns, T* dst, int64_t dst_stride) {
  constexpr int L = kLanes<T>;
  for (int64_t r0 = 0; r0 < rows; r0 += L) {
    const int64_t height = std::min<int64_t>(L, rows - r0);
    for (int64_t c0 = 0; c0 < columns; c0 += L) {
      const int64_t width = std::min<int64_t>(L, columns - c0);
      T* out = dst + c0 * dst_stride + r0;
      Vec<T> block[L];
      if (height == L && width == L) {
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) block[r] = load(src(r0 + r) + c0);
        transpose<T>(block);
#pragma GCC unroll 16
        for (int c = 0; c < L; ++c) store(out + c * dst_stride, block[c]);
      } else {
        for (int64_t r = 0; r < L; ++r) block[r] = r < height ? load_up_to(src(r0 + r) + c0, width) : Vec<T>{};
        transpose<T>(block);
        for (int64_t c = 0; c < width; ++c) store(out + c * dst_stride, block[c]);
      }
    }
  }
}

}  // namespace vitfast::cpu::VITFAST_ISA
