// Sums of matrix products, many at a time: what the operator (matrix_sum.cpp) and its kernels (matrix_sum_kernel.h)
// share.
#pragma once

#include <cstdint>

#include "cpu/row_table.h"

namespace vitfast::cpu {

// out (count, rows, columns), contiguous: the sum of the terms' products A B and of `start`.
struct MatrixSum {
  int64_t count, rows, columns;
  // A (count, rows, depth) has adjacent elements in a row. B (count, depth, columns) has adjacent elements in a row or
  // in a column. What is the same for all of `count` has the step 0.
  struct Term {
    const float *a, *b;
    int64_t depth;
    int64_t a_step, a_row;
    int64_t b_step, b_row, b_column;
  } terms[2];
  int64_t terms_in_use;
  const float* start;  // (count, columns), added to every row, or null
  int64_t start_step;
  float* out;
  // For a single result, some rows of maps: those of A that belong to its rows, and those of out, which become
  // plus + scale (A B + A' B' + start), with `plus` a map like out. Without `plus`, what has a scale has no start.
  RowTable a_rows = {}, out_rows = {};
  const float* plus = nullptr;
};

// `columns` must be a multiple of this: whole vectors of any instruction set.
inline constexpr int64_t kMatrixSumColumns = 16;

struct MatrixSumKernels {
  void (*run)(const MatrixSum&);
};

// By the kernels in use.
void run(const MatrixSum& call);

namespace baseline {
extern const MatrixSumKernels matrix_sum_kernels;
}
namespace avx2 {
extern const MatrixSumKernels matrix_sum_kernels;
}
namespace avx512 {
extern const MatrixSumKernels matrix_sum_kernels;
}

}  // namespace vitfast::cpu
