// Sums of matrix products, as linear layers and their tangents need them: out = A B + A' B' + start.
//
// The terms follow each other along the depth, so that the result is written once where the depths are small, and never
// more often than a single product of the added depths would write it. Rows of A are read where they lie; B is copied,
// turned over if need be, panel by panel, and each panel serves the rows that fit the second level.
#pragma once

#include "cpu/matrix.h"
#include "cpu/matrix_sum.h"
#include "cpu/parallel.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

class MatrixSumTask {
  static constexpr int64_t kLane = kLanes<float>, kPanel = kTileVectors * kLane;
  static constexpr int64_t kDepth = 512;

 public:
  // So many rows of A, kDepth long, stay in the second level.
  static constexpr int64_t kRows = 288;

  MatrixSumTask(const MatrixSum& call, Arena arena)
      : call_(call),
        panel_(arena.take<float>(kDepth * kPanel)),
        panel_offset_(arena.take<int64_t>(kDepth)),
        a_offset_(arena.take<int64_t>(kRows)),
        out_offset_(arena.take<int64_t>(kRows)),
        start_offset_(arena.take<int64_t>(kRows)),
        bytes_(arena.used()) {
    if (!arena.holds_memory()) return;
    for (int64_t i = 0; i < kDepth; ++i) panel_offset_[i] = i * kPanel;
    std::fill_n(start_offset_, kRows, 0);
  }

  int64_t bytes() const { return bytes_; }

  // Rows and columns of result k.
  void operator()(int64_t k, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    float* out = call_.out + k * call_.rows * call_.columns + column;
    const float* start = call_.start == nullptr ? nullptr : call_.start + k * call_.start_step + column;
    const RowTable a_rows = call_.a_rows.from(row), out_rows = call_.out_rows.from(row);
    for (int64_t i = 0; i < rows; ++i) out_offset_[i] = out_rows.row(i) * call_.columns;
    bool is_first = true;
    if (call_.plus != nullptr) {
      for (int64_t i = 0; i < rows; ++i) begin_row(out_offset_[i], column, columns, start, out_rows.factor(i));
      is_first = false;
    }
    for (int64_t t = 0; t < call_.terms_in_use; ++t) {
      const MatrixSum::Term& term = call_.terms[t];
      const float* a = term.a + k * term.a_step;
      const float* b = term.b + k * term.b_step + column * term.b_column;
      for (int64_t i = 0; i < rows; ++i) a_offset_[i] = a_rows.row(i) * term.a_row;
      const int64_t blocks = parts(term.depth, kDepth);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = term.depth * block / blocks, depth = term.depth * (block + 1) / blocks - first;
        for (int64_t j = 0; j < columns; j += kPanel) {
          const int64_t width = std::min(kPanel, columns - j);
          copy_panel(term, b + first * term.b_row + j * term.b_column, depth, width);
          Product<float> product{
              depth, {a + first, a_offset_, 1}, 0, {panel_, panel_offset_, 1}, {out + j, out_offset_, 1}, 0, 1.0f};
          product.row_alpha = out_rows.scale;
          if (!is_first) {
            product.plus = product.c;
          } else if (start != nullptr) {
            product.plus = {start + j, start_offset_, 1};
          }
          gemm<float>(rows, width / kLane, product);
        }
        is_first = false;
      }
    }
  }

 private:
  // A row of out before its products: plus + factor * start.
  void begin_row(int64_t offset, int64_t column, int64_t columns, const float* start, float factor) const {
    const float* plus = call_.plus + offset + column;
    float* out = call_.out + offset + column;
    for (int64_t j = 0; j < columns; j += kLane) {
      store(out + j, start == nullptr ? load(plus + j) : load(plus + j) + factor * load(start + j));
    }
  }

  void copy_panel(const MatrixSum::Term& term, const float* b, int64_t depth, int64_t width) {
    if (term.b_column != 1) {
      transpose_rows<float>([&](int64_t j) { return b + j * term.b_column; }, width, depth, panel_, kPanel);
      return;
    }
    for (int64_t i = 0; i < depth; ++i) {
      for (int64_t j = 0; j < width; j += kLane) store(panel_ + i * kPanel + j, load(b + i * term.b_row + j));
    }
  }

  const MatrixSum& call_;
  float* panel_;
  int64_t *panel_offset_, *a_offset_, *out_offset_, *start_offset_;
  int64_t bytes_;
};

void matrix_sum(const MatrixSum& call) {
  const int64_t units = call.columns / kMatrixSumColumns, threads = thread_count();
  // Few tasks are cut further, for all threads to have as many: columns first, which does not copy more of B.
  constexpr int64_t kFewestColumns = 64, kFewestRows = 64;
  int64_t down = parts(call.rows, MatrixSumTask::kRows), across = 1;
  const auto tasks = [&] { return call.count * down * across; };
  while (tasks() % threads != 0 && tasks() < 8 * threads) {
    if (call.columns >= (across + 1) * kFewestColumns) {
      ++across;
    } else if (call.rows >= (down + 1) * kFewestRows) {
      ++down;
    } else {
      break;
    }
  }
  parallel_for(tasks(), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(MatrixSumTask(call, Arena()).bytes());
    MatrixSumTask run(call, Arena(scratch.data()));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t j = task % across, i = task / across % down, k = task / across / down;
      const int64_t row = call.rows * i / down, column = units * j / across * kMatrixSumColumns;
      run(k, row, call.rows * (i + 1) / down - row, column, units * (j + 1) / across * kMatrixSumColumns - column);
    }
  });
}

}  // namespace

extern const MatrixSumKernels matrix_sum_kernels = {matrix_sum};

}  // namespace vitfast::cpu::VITFAST_ISA
