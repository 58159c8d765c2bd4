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

// Rows of a matrix: row i begins at data + offset[i], or at data + i if there is no table of offsets, as in a
// transposed matrix; elements of a row are `step` apart.
template <class T>
struct Rows {
  T* data = nullptr;
  const int64_t* offset = nullptr;
  int64_t step = 1;

  T* row(int64_t i) const { return data + (offset == nullptr ? i : offset[i]); }
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

// R rows and V vectors of a product, from `first` and `column` on. The rows of A are kAdjacent if they have no table of
// offsets: one pointer then serves them all.
template <class T, int R, int V, bool kAdjacent>
__attribute__((noinline)) void gemm_tile(const Product<T>& x, int64_t first, int64_t column) {
  constexpr int L = kLanes<T>;
  const T* a[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) a[r] = kAdjacent ? x.a.data + x.a_row + first : x.a.row(x.a_row + first + r);
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
      const Vec<T> av = broadcast(kAdjacent ? a[0][at + r] : a[r][at]);
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

template <class T, int R, int V, bool kAdjacent>
constexpr GemmTile<T> gemm_tile_or_null() {
  if constexpr (R <= tile_rows(V)) {
    return gemm_tile<T, R, V, kAdjacent>;
  } else {
    return nullptr;
  }
}

template <class T, bool kAdjacent, int... I>
inline GemmTile<T> gemm_tile_for(int64_t rows, int64_t vectors, std::integer_sequence<int, I...>) {
  static constexpr GemmTile<T> kTiles[] = {
      gemm_tile_or_null<T, I / kTileVectors + 1, I % kTileVectors + 1, kAdjacent>()...};
  return kTiles[(rows - 1) * kTileVectors + (vectors - 1)];
}

// The smallest count of parts that are no larger than `limit` when n is cut evenly.
inline int64_t parts(int64_t n, int64_t limit) { return (n + limit - 1) / limit; }

// Calls f(begin, size) on the smallest count of parts of n that are no larger than `limit`, cut evenly. Sizes have 32
// bits because this runs for every product, and divides.
template <class F>
inline void for_each_part(uint32_t n, uint32_t limit, F f) {
  if (n <= limit) return f(0, n);
  const uint32_t count = (n + limit - 1) / limit, size = n / count, larger = n - size * count;
  for (uint32_t part = 0, begin = 0; part < count; ++part) {
    const uint32_t this_size = size + (part < larger ? 1 : 0);
    f(begin, this_size);
    begin += this_size;
  }
}

// `rows` rows and `vectors` whole vectors of a product.
template <class T>
inline void gemm(int64_t rows, int64_t vectors, const Product<T>& product) {
  for_each_part(vectors, kTileVectors, [&](int64_t strip, int64_t width) {
    for_each_part(rows, tile_rows(static_cast<int>(width)), [&](int64_t first, int64_t height) {
      constexpr auto all = std::make_integer_sequence<int, kMostTileRows * kTileVectors>{};
      const auto tile = product.a.offset == nullptr ? gemm_tile_for<T, true>(height, width, all)
                                                    : gemm_tile_for<T, false>(height, width, all);
      tile(product, first, strip * kLanes<T>);
    });
  });
}

}  // namespace vitfast::cpu::VITFAST_ISA
