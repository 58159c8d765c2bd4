// Blocks of rows of scores, and the softmax along their columns.
#pragma once

#include "cpu/matrix.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// Scores are computed and their softmax taken in blocks of rows, in the caches.
inline constexpr int kBlockRows = tile_rows(kTileVectors) >= 8 ? 8 : 4;

// One value for each row of a block, in whole vectors.
template <class T>
inline constexpr int kBlockValues = std::max(kBlockRows, kLanes<T>);

template <class T>
struct BlockValues {
  alignas(64) T data[kBlockValues<T>];

  T& operator[](int64_t r) { return data[r]; }
  T operator[](int64_t r) const { return data[r]; }
};

// Calls f(first row, rows) on blocks of at most kBlockRows rows, cut evenly.
template <class F>
void for_each_block(int64_t rows, F f) {
  for_each_part(rows, kBlockRows, [&](int64_t first, int64_t height) { f(first, height); });
}

// Calls f(index of its first value) for every vector of a block's values.
template <class T, class F>
void for_each_vector(F f) {
#pragma GCC unroll 4
  for (int i = 0; i < kBlockValues<T>; i += kLanes<T>) f(i);
}

// One vector for each row of a block.
template <class T>
struct BlockVectors {
  Vec<T> row[kBlockRows];

  explicit BlockVectors(int64_t height) {
    for (int64_t r = height; r < kBlockRows; ++r) row[r] = Vec<T>{};
  }
};

template <class T, class Combine>
BlockValues<T> reduce_block(BlockVectors<T>& rows, Combine combine) {
  constexpr int kAtOnce = std::min(kBlockRows, kLanes<T>);
  BlockValues<T> result;
#pragma GCC unroll 4
  for (int r = 0; r < kBlockRows; r += kAtOnce) store(result.data + r, reduce_rows<T, kAtOnce>(rows.row + r, combine));
  return result;
}

template <class T>
BlockValues<T> reduce_block_add(BlockVectors<T>& rows) {
  return reduce_block<T>(rows, [](Vec<T> a, Vec<T> b) { return a + b; });
}

// NaN may be ignored.
template <class T>
BlockValues<T> reduce_block_max(BlockVectors<T>& rows) {
  return reduce_block<T>(rows, [](Vec<T> a, Vec<T> b) { return max<T>(a, b); });
}

// The dot products of `height` rows, from row `first` on, with y, [dim] and zeros up to a whole vector.
template <class T>
BlockValues<T> row_dots(Rows<const T> rows, int64_t first, int64_t height, int64_t dim, const T* y) {
  BlockVectors<T> sums(height);
  for (int64_t r = 0; r < height; ++r) {
    const T* row = rows.row(first + r);
    Vec<T> sum{};
    for (int64_t d = 0; d < dim; d += kLanes<T>) sum += load_up_to(row + d, dim - d) * load(y + d);
    sums.row[r] = sum;
  }
  return reduce_block_add<T>(sums);
}

// x <- scale x + bias
template <class T>
void add_bias(BlockValues<T>& x, T scale, const T* bias) {
  for_each_vector<T>([&](int i) { store(x.data + i, load(x.data + i) * scale + load(bias + i)); });
}

// ---- softmax of a block of rows -----------------------------------------------------------------------------------

// Calls f with the number of vectors in a row as a constant, or with 0 where it is none of the most frequent: the
// loops over a row are then unrolled.
template <class F>
void with_count(int64_t vectors, F f) {
  switch (vectors) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    default:
      return f(std::integral_constant<int, 0>());
  }
}

template <class T>
struct SoftmaxStatistics {
  BlockValues<T> top, sum;
};

// Rows from `first` on: S <- exp(S - top). `lone` holds the lone key's scores, if there is one.
template <class T>
SoftmaxStatistics<T> exponentiate(const Matrix<T>& scores, int64_t first, int64_t height, const Columns<T>& columns,
                                  BlockValues<T>& lone) {
  constexpr int L = kLanes<T>;
  SoftmaxStatistics<T> result;
  with_count(columns.vectors, [&](auto count) {
    const int64_t vectors = count == 0 ? columns.vectors : count;
    BlockVectors<T> rows(height);
    for (int64_t r = 0; r < height; ++r) {
      const T* row = scores.row(first + r);
      Vec<T> larger = load(row);
#pragma GCC unroll 3
      for (int64_t v = 1; v < vectors; ++v) larger = max<T>(larger, load(row + v * L));
      rows.row[r] = larger;
    }
    result.top = reduce_block_max<T>(rows);
    if (columns.lone) {
      for_each_vector<T>(
          [&](int i) { store(result.top.data + i, max<T>(load(result.top.data + i), load(lone.data + i))); });
    }
    for (int64_t r = 0; r < height; ++r) {
      T* row = scores.row(first + r);
      const Vec<T> top = broadcast(result.top[r]);
      Vec<T> sum{};
#pragma GCC unroll 3
      for (int64_t v = 0; v < vectors; ++v) {
        const Vec<T> p = exp2_nonpositive<T>((load(row + v * L) - top) * kLog2E<T>);
        store(row + v * L, p);
        sum += p;
      }
      rows.row[r] = sum;
    }
    result.sum = reduce_block_add<T>(rows);
  });
  if (columns.lone) {
    for_each_vector<T>([&](int i) {
      const Vec<T> p = exp2_nonpositive<T>((load(lone.data + i) - load(result.top.data + i)) * kLog2E<T>);
      store(lone.data + i, p);
      store(result.sum.data + i, load(result.sum.data + i) + p);
    });
    for (int64_t r = 0; r < height; ++r) scores.row(first + r)[columns.last()] = lone[r];
  }
  return result;
}

// Rows from `first` on: S <- P = exp(S - lse), and dP <- dS = P (dP - rowsum(P dP)). `lone` and `lone_grad` hold the
// lone key's S and dP. P is divided by its sum, which the rounding of lse keeps from being 1: the rows of dS then add
// up to 0.
template <class T>
void softmax_backward(const Matrix<T>& scores, const Matrix<T>& scores_grad, int64_t first, int64_t height,
                      const Columns<T>& columns, const BlockValues<T>& lse, BlockValues<T>& lone,
                      BlockValues<T>& lone_grad) {
  constexpr int L = kLanes<T>;
  BlockVectors<T> sums(height), products(height);
  for (int64_t r = 0; r < height; ++r) {
    T *row = scores.row(first + r), *row_grad = scores_grad.row(first + r);
    const Vec<T> row_lse = broadcast(lse[r]);
    Vec<T> sum{}, product{};
    for (int64_t v = 0; v < columns.vectors; ++v) {
      const Vec<T> p = exp2_nonpositive<T>((load(row + v * L) - row_lse) * kLog2E<T>);
      store(row + v * L, p);
      sum += p;
      product += p * load(row_grad + v * L);
    }
    sums.row[r] = sum;
    products.row[r] = product;
  }
  BlockValues<T> factor = reduce_block_add<T>(sums), delta = reduce_block_add<T>(products);
  for_each_vector<T>([&](int i) {
    Vec<T> sum = load(factor.data + i), product = load(delta.data + i);
    if (columns.lone) {
      const Vec<T> p = exp2_nonpositive<T>((load(lone.data + i) - load(lse.data + i)) * kLog2E<T>);
      const Vec<T> grad = load(lone_grad.data + i);
      sum += p;
      product += p * grad;
      store(lone.data + i, p / sum);
      store(lone_grad.data + i, p / sum * (grad - product / sum));
    }
    store(factor.data + i, T{1} / sum);
    store(delta.data + i, product / sum);
  });
  for (int64_t r = 0; r < height; ++r) {
    T *row = scores.row(first + r), *row_grad = scores_grad.row(first + r);
    const Vec<T> row_factor = broadcast(factor[r]), row_delta = broadcast(delta[r]);
    for (int64_t v = 0; v < columns.vectors; ++v) {
      const Vec<T> p = load(row + v * L) * row_factor;
      store(row + v * L, p);
      store(row_grad + v * L, p * (load(row_grad + v * L) - row_delta));
    }
    if (columns.lone) {
      row[columns.last()] = lone[r];
      row_grad[columns.last()] = lone_grad[r];
    }
  }
}

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
