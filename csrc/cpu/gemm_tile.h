// Small matrix products on data in the caches: C = diag(alpha) A B.
//
// The rows of A and C and the rows of B are found through tables of offsets, so that they may lie anywhere in a feature
// map: nothing is gathered first. One tile keeps rows x vectors accumulators in registers; each step along the depth
// loads `vectors` vectors of B and broadcasts `rows` elements of A.
#pragma once

#include "cpu/simd.h"

namespace vitfast::cpu::VITFAST_ISA {

// Accumulators plus a row of B and a broadcast fill the register file: 32 registers with AVX-512, 16 otherwise.
inline constexpr int kTileRows = VITFAST_VECTOR_BYTES == 64 ? 8 : 4;
inline constexpr int kTileVectors = 3;

// Rows of a matrix: row i begins at data + offset[i]; elements of a row are `step` apart.
template <class T>
struct Rows {
  T* data = nullptr;
  const int64_t* offset = nullptr;
  int64_t step = 1;

  T* row(int64_t i) const { return data + offset[i]; }
  operator Rows<const T>() const { return {data, offset, step}; }
};

template <class T, int R, int V>
__attribute__((noinline)) void gemm_tile(int64_t depth, Rows<const T> a, int64_t a_row, Rows<const T> b,
                                         int64_t b_column, Rows<T> c, int64_t c_row, const T* alpha) {
  constexpr int L = kLanes<T>;
  const T* a_rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a_rows[r] = a.row(a_row + r);
  const T* b_data = b.data + b_column;
  Vec<T> sum[R][V] = {};
  for (int64_t k = 0, at = 0; k < depth; ++k, at += a.step) {
    const T* b_row = b_data + b.offset[k];
    Vec<T> bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = load(b_row + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> av = broadcast(a_rows[r][at]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += av * bv[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    T* out = c.row(c_row + r) + b_column;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + v * L, sum[r][v] * alpha[r]);
  }
}

template <class T>
using GemmTile = void (*)(int64_t, Rows<const T>, int64_t, Rows<const T>, int64_t, Rows<T>, int64_t, const T*);

template <class T, int... I>
inline GemmTile<T> gemm_tile_for(int rows, int vectors, std::integer_sequence<int, I...>) {
  static constexpr GemmTile<T> kTiles[] = {gemm_tile<T, I / kTileVectors + 1, I % kTileVectors + 1>...};
  return kTiles[(rows - 1) * kTileVectors + (vectors - 1)];
}

// The smallest count of parts that are no larger than `limit` when n is cut evenly.
inline int64_t parts(int64_t n, int64_t limit) { return (n + limit - 1) / limit; }

// Rows [row, row + rows) of C, all columns: `rows` is at most kTileRows, the columns are `vectors` whole vectors.
// alpha holds one factor for each of these rows.
template <class T>
inline void gemm_rows(int64_t rows, int64_t vectors, int64_t depth, Rows<const T> a, int64_t a_row, Rows<const T> b,
                      Rows<T> c, int64_t c_row, const T* alpha) {
  const int64_t count = parts(vectors, kTileVectors);
  for (int64_t part = 0, first = 0; part < count; ++part) {
    const int64_t width = (vectors - first) / (count - part);
    gemm_tile_for<T>(static_cast<int>(rows), static_cast<int>(width),
                     std::make_integer_sequence<int, kTileRows * kTileVectors>{})(
        depth, a, a_row, b, first * kLanes<T>, c, c_row, alpha);
    first += width;
  }
}

}  // namespace vitfast::cpu::VITFAST_ISA
