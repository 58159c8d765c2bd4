// The gradients of a linear layer's weight and bias: dW = G^T X and db = G^T 1, with rows as the depth of the product.
//
// Both factors lie as the product wants them, since neighbours along a row are neighbours in a tile. Some rows at a
// time are copied all the same: in the tensors they are far apart, often by a power of two, and would evict each other
// from the caches. A task is a block of dW. It goes down all rows, so that the order of every sum is the same for any
// number of threads.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/weight_gradient.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

class WeightGradientBlock {
  static constexpr int64_t kLane = kLanes<float>, kPanel = kTileVectors * kLane;
  static constexpr int64_t kDepth = 512;  // copies of 0.7 MB with AVX-512, 0.3 MB else; dW is rarely read and written

 public:
  // Of dW, a task's share at most: many tiles for what is copied.
  static constexpr int64_t kOutputs = 32 * tile_rows(kTileVectors), kInputs = 4 * kPanel;

  WeightGradientBlock(const WeightGradient& call, Arena arena)
      : call_(call),
        grads_(arena.take<float>(kDepth * kGradRow)),
        panel_(arena.take<float>(kDepth * kPanel)),
        panel_offset_(arena.take<int64_t>(kDepth)),
        weight_offset_(arena.take<int64_t>(kOutputs)),
        bytes_(arena.used()) {
    if (!arena.holds_memory()) return;
    for (int64_t i = 0; i < kDepth; ++i) panel_offset_[i] = i * kPanel;
    for (int64_t i = 0; i < kOutputs; ++i) weight_offset_[i] = i * call.inputs;
  }

  int64_t bytes() const { return bytes_; }

  // dW of some outputs and inputs, and db of the outputs beside the first inputs.
  void operator()(int64_t output, int64_t outputs, int64_t input, int64_t inputs) {
    const Part all_grads{call_.grad + output, call_.grad_stride, call_.rows, outputs, call_.grad_rows};
    const Part all_x{call_.x + input, call_.x_stride, call_.rows, inputs, {}};
    const int64_t blocks = parts(call_.rows, kDepth), panels = parts(inputs, kPanel);
    const int64_t tiles = parts(outputs, tile_rows(kTileVectors));
    const auto block_of = [&](const Part& all, int64_t b) {
      return b == blocks
                 ? all.rows_of(call_.rows, 0)
                 : all.rows_of(call_.rows * b / blocks, call_.rows * (b + 1) / blocks - call_.rows * b / blocks);
    };
    const auto panel_of = [&](const Part& block, int64_t p) { return block.columns_of(p * kPanel, kPanel); };
    bool add = call_.add;
    for (int64_t b = 0; b < blocks; ++b) {
      const Part grads = block_of(all_grads, b), next_grads = block_of(all_grads, b + 1);
      const Part x = block_of(all_x, b), next_x = block_of(all_x, b + 1);
      grads.copy(grads_, kGradRow);
      for (int64_t p = 0; p < panels; ++p) {
        const Part panel = panel_of(x, p), next_panel = p + 1 < panels ? panel_of(x, p + 1) : panel_of(next_x, 0);
        panel.copy(panel_, kPanel);
        const Rows<float> weight{call_.weight + output * call_.inputs + input + p * kPanel, weight_offset_, 1};
        Product<float> product{grads.rows, {grads_, nullptr, kGradRow}, 0, {panel_, panel_offset_, 1}, weight, 0, 1.0f};
        if (add) product.plus = weight;
        for (int64_t t = 0; t < tiles; ++t) {
          next_panel.prefetch(t, tiles);
          next_grads.prefetch(p * tiles + t, panels * tiles);
          const int64_t row = outputs * t / tiles, end = outputs * (t + 1) / tiles;
          product.a_row = product.c_row = product.plus_row = row;
          gemm<float>(end - row, panel.columns / kLane, product);
        }
      }
      if (call_.bias != nullptr && input == 0) add_rows(grads.rows, outputs, add, call_.bias + output);
      add = true;
    }
  }

 private:
  // A part of G or X.
  struct Part {
    const float* data;
    int64_t stride, rows, columns;
    RowTable chosen;

    Part rows_of(int64_t first, int64_t count) const { return {data, stride, count, columns, chosen.from(first)}; }
    Part columns_of(int64_t first, int64_t most) const {
      return {data + first, stride, rows, std::min(most, columns - first), chosen};
    }
    const float* row(int64_t i) const { return data + chosen.row(i) * stride; }
    // Up to whole vectors.
    void copy(float* to, int64_t to_stride) const {
      for (int64_t i = 0; i < rows; ++i, to += to_stride) {
        const float* from = row(i);
        const float factor = chosen.factor(i);
        for (int64_t j = 0; j < columns; j += kLane) store(to + j, load_up_to(from + j, columns - j) * factor);
      }
    }
    // Share `share` of `shares`, into the second level: what is copied next comes while tiles are computed.
    void prefetch(int64_t share, int64_t shares) const {
      constexpr int64_t kLine = 16;
      for (int64_t i = rows * share / shares; i < rows * (share + 1) / shares; ++i) {
        for (int64_t j = 0; j < columns; j += kLine) __builtin_prefetch(row(i) + j, 0, 2);
      }
    }
  };

  // A row of the copy of G: an odd number of cache lines, so that elements of one column lie in all sets of a cache.
  static constexpr int64_t kGradRow = ((kOutputs + 15) / 16 | 1) * 16;

  // Run by run: the rounding errors of a sum grow with the number of its terms.
  void add_rows(int64_t depth, int64_t outputs, bool add, float* bias) const {
    constexpr int64_t kRun = 16;
    for (int64_t j = 0; j < outputs; j += kLane) {
      Vec<float> sum{};
      for (int64_t first = 0; first < depth; first += kRun) {
        Vec<float> run{};
        for (int64_t i = first; i < std::min(first + kRun, depth); ++i) run += load(grads_ + i * kGradRow + j);
        sum += run;
      }
      if (add) sum += load_up_to(bias + j, outputs - j);
      store_up_to(bias + j, sum, outputs - j);
    }
  }

  const WeightGradient& call_;
  float *grads_, *panel_;
  int64_t *panel_offset_, *weight_offset_;
  int64_t bytes_;
};

void weight_gradient(const WeightGradient& call) {
  using Block = WeightGradientBlock;
  const int64_t vectors = call.inputs / kLanes<float>, threads = thread_count();
  const int64_t across = parts(call.inputs, Block::kInputs);
  int64_t down = parts(call.outputs, Block::kOutputs);
  // Few tasks are cut further until all threads have as many.
  const int64_t most = parts(call.outputs, tile_rows(kTileVectors));
  while (down < most && across * down < 8 * threads && across * down % threads != 0) ++down;
  parallel_for(across * down, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(Block(call, Arena()).bytes());
    Block block(call, Arena(scratch.data()));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / across, j = task % across;
      const int64_t output = call.outputs * i / down, input = vectors * j / across * kLanes<float>;
      block(output, call.outputs * (i + 1) / down - output, input, vectors * (j + 1) / across * kLanes<float> - input);
    }
  });
}

}  // namespace

extern const WeightGradientKernels weight_gradient_kernels = {weight_gradient};

}  // namespace vitfast::cpu::VITFAST_ISA
