// Small matrix products on data in the caches: C = diag(alpha) A B + plus.
//
// The rows of A and C and the rows of B are found through tables of offsets, so that they may lie anywhere in a feature
// map: nothing is gathered first. One tile keeps rows x vectors accumulators in registers; each step along the depth
// loads `vectors` vectors of B and broadcasts `rows` elements of A.
#pragma once

#include "cpu/simd.h"

namespace vitfast::cpu::VITFAST_ISA {

// A tile has up to kTileVectors vectors in a row and, for fewer vectors, more rows: its accumulators, a row of B and
// one broadcast fill the register file, which has 32 vectors with AVX-512 and 16 otherwise.
inline constexpr int kTileVectors = 3;
inline constexpr int kRegisters = VITFAST_VECTOR_BYTES == 64 ? 32 : 16;
constexpr int tile_rows(int vectors) {
  const int rows = (kRegisters - 1 - vectors) / vectors;
  return rows < 14 ? rows : 14;  // enough to hide the latency of the multiply-adds
}
inline constexpr int kMostTileRows = tile_rows(1);

// Rows of a matrix: row i begins at data + offset[i]; elements of a row are `step` apart.
template <class T>
struct Rows {
  T* data = nullptr;
  const int64_t* offset = nullptr;
  int64_t step = 1;

  T* row(int64_t i) const { return data + offset[i]; }
  operator Rows<const T>() const { return {data, offset, step}; }
};

// C = diag(alpha) A B + plus, over rows of A, C and `plus` that begin with a_row, c_row and plus_row.
template <class T>
struct Product {
  int64_t depth;
  Rows<const T> a;
  int64_t a_row;
  Rows<const T> b;
  Rows<T> c;
  int64_t c_row;
  T alpha;                       // of all rows
  const T* row_alpha = nullptr;  // if not null, of each row, instead
  Rows<const T> plus = {};       // nothing where its data is null
  int64_t plus_row = 0;
};

// R rows and V vectors of a product, from `first` and `column` on.
template <class T, int R, int V>
__attribute__((noinline)) void gemm_tile(const Product<T>& x, int64_t first, int64_t column) {
  constexpr int L = kLanes<T>;
  const T* a[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) a[r] = x.a.row(x.a_row + first + r);
  const T* b = x.b.data + column;
  const int64_t *offset = x.b.offset, *end = offset + x.depth;
  const int64_t step = x.a.step;
  Vec<T> sum[R][V] = {};
  for (int64_t at = 0; offset != end; ++offset, at += step) {
    const T* row = b + *offset;
    Vec<T> bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = load(row + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> av = broadcast(a[r][at]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += av * bv[v];
    }
  }
  const bool add = x.plus.data != nullptr;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    T* out = x.c.row(x.c_row + first + r) + column;
    const Vec<T> alpha = broadcast(x.row_alpha == nullptr ? x.alpha : x.row_alpha[first + r]);
    if (add) {
      const T* plus = x.plus.row(x.plus_row + first + r) + column;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(out + v * L, sum[r][v] * alpha + load(plus + v * L));
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(out + v * L, sum[r][v] * alpha);
    }
  }
}

template <class T>
using GemmTile = void (*)(const Product<T>&, int64_t, int64_t);

template <class T, int R, int V>
constexpr GemmTile<T> gemm_tile_or_null() {
  if constexpr (R <= tile_rows(V)) {
    return gemm_tile<T, R, V>;
  } else {
    return nullptr;
  }
}

template <class T, int... I>
inline GemmTile<T> gemm_tile_for(int64_t rows, int64_t vectors, std::integer_sequence<int, I...>) {
  static constexpr GemmTile<T> kTiles[] = {gemm_tile_or_null<T, I / kTileVectors + 1, I % kTileVectors + 1>()...};
  return kTiles[(rows - 1) * kTileVectors + (vectors - 1)];
}

// The smallest count of parts that are no larger than `limit` when n is cut evenly.
inline int64_t parts(int64_t n, int64_t limit) { return (n + limit - 1) / limit; }

// `rows` rows and `vectors` whole vectors of a product.
template <class T>
inline void gemm(int64_t rows, int64_t vectors, const Product<T>& product) {
  const int64_t strips = parts(vectors, kTileVectors);
  for (int64_t strip = 0, column = 0; strip < strips; ++strip) {
    const int64_t width = (vectors - column) / (strips - strip);
    const int64_t blocks = parts(rows, tile_rows(static_cast<int>(width)));
    for (int64_t block = 0, first = 0; block < blocks; ++block) {
      const int64_t height = (rows - first) / (blocks - block);
      gemm_tile_for<T>(height, width, std::make_integer_sequence<int, kMostTileRows * kTileVectors>{})(
          product, first, column * kLanes<T>);
      first += height;
    }
    column += width;
  }
}

}  // namespace vitfast::cpu::VITFAST_ISA
