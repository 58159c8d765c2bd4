// The gradients of a linear layer's weight and bias: dW = G^T X and db = G^T 1, with rows as the depth of the product.
//
// Both factors lie as the product wants them, since neighbours along a row are neighbours in a tile. Some rows at a
// time are copied all the same, tile by tile: in the tensors they are far apart, often by a power of two, and would
// evict each other from the caches. A task is a block of dW. It goes down all rows of all terms, so that the order of
// every sum is the same for any number of threads.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/weight_gradient.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

class WeightGradientBlock {
  static constexpr int64_t kLane = kLanes<float>, kPanel = kTileVectors * kLane, kTile = tile_rows(kTileVectors);
  static constexpr int64_t kDepth = 512;  // copies of 0.7 MB with AVX-512, 0.3 MB else; dW is rarely read and written
  static constexpr int64_t kMostTiles = 32;
  static_assert(kTile <= kLane, "a row of a tile of G is moved as one vector");

 public:
  // Of dW, a task's share at most: many tiles for what is copied.
  static constexpr int64_t kOutputs = kMostTiles * kTile, kInputs = 4 * kPanel;

  WeightGradientBlock(const WeightGradient& call, Arena arena)
      : call_(call),
        grads_(arena.take<float>(kDepth * kOutputs + kMostTiles * kLane)),
        panel_(arena.take<float>(kDepth * kPanel)),
        panel_offset_(arena.take<int64_t>(kDepth)),
        weight_offset_(arena.take<int64_t>(kOutputs)),
        bytes_(arena.used()) {
    if (!arena.holds_memory()) return;
    for (int64_t i = 0; i < kDepth; ++i) panel_offset_[i] = i * kPanel;
    for (int64_t i = 0; i < kOutputs; ++i) weight_offset_[i] = i * call.inputs;
  }

  int64_t bytes() const { return bytes_; }

  // Of gradients k: dW of some outputs and inputs, and db of the outputs beside the first inputs.
  void operator()(int64_t k, int64_t output, int64_t outputs, int64_t input, int64_t inputs) {
    const int64_t term_blocks = parts(call_.rows, kDepth), blocks = call_.terms_in_use * term_blocks;
    const int64_t panels = parts(inputs, kPanel);
    const Tiles tiles{outputs, parts(outputs, kTile)};
    // The rows of block b of G or X; none behind the last block.
    const auto rows_of = [&](const Part& all, int64_t b) {
      const int64_t i = b % term_blocks, first = call_.rows * i / term_blocks;
      return all.rows_of(first, b == blocks ? 0 : call_.rows * (i + 1) / term_blocks - first);
    };
    const auto term_of = [&](int64_t b) { return call_.terms[b == blocks ? 0 : b / term_blocks]; };
    const auto grads_of = [&](int64_t b) {
      const WeightGradient::Term term = term_of(b);
      return rows_of({term.grad + k * term.grad_step + output, term.grad_row, 0, outputs, call_.grad_rows}, b);
    };
    const auto x_of = [&](int64_t b) {
      const WeightGradient::Term term = term_of(b);
      return rows_of({term.x + k * term.x_step + input, term.x_row, 0, inputs, {}}, b);
    };
    const auto panel_of = [&](const Part& block, int64_t p) { return block.columns_of(p * kPanel, kPanel); };
    float* dw = call_.weight + (k * call_.outputs + output) * call_.inputs + input;
    bool add = call_.add;
    for (int64_t b = 0; b < blocks; ++b) {
      const Part grads = grads_of(b), next_grads = grads_of(b + 1), x = x_of(b), next_x = x_of(b + 1);
      copy_tiles(grads, tiles);
      for (int64_t p = 0; p < panels; ++p) {
        const Part panel = panel_of(x, p), next_panel = p + 1 < panels ? panel_of(x, p + 1) : panel_of(next_x, 0);
        copy_panel(panel);
        const Rows<float> weight{dw + p * kPanel, weight_offset_, 1};
        for (int64_t t = 0; t < tiles.count; ++t) {
          next_panel.prefetch(t, tiles.count);
          next_grads.prefetch(p * tiles.count + t, panels * tiles.count);
          const int64_t row = tiles.begin(t), rows = tiles.begin(t + 1) - row;
          Product<float> product{
              grads.rows, {tile(t, row, grads.rows), nullptr, rows}, 0, {panel_, panel_offset_, 1}, weight, row, 1.0f};
          if (add) product.plus = weight, product.plus_row = row;
          gemm<float>(rows, panel.columns / kLane, product);
        }
      }
      if (call_.bias != nullptr && input == 0 && b < term_blocks) {
        add_rows(grads.rows, tiles, add, call_.bias + k * call_.outputs + output);
      }
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
    // Share `share` of `shares`, into the second level: what is copied next comes while tiles are computed.
    void prefetch(int64_t share, int64_t shares) const {
      constexpr int64_t kLine = 16;
      for (int64_t i = rows * share / shares; i < rows * (share + 1) / shares; ++i) {
        for (int64_t j = 0; j < columns; j += kLine) __builtin_prefetch(row(i) + j, 0, 2);
      }
    }
  };

  // Outputs, cut evenly.
  struct Tiles {
    int64_t outputs, count;
    int64_t begin(int64_t t) const { return outputs * t / count; }
  };

  // The copy of tile t of G, whose outputs begin with `output`: row behind row, and behind them room for a vector.
  float* tile(int64_t t, int64_t output, int64_t depth) const { return grads_ + depth * output + t * kLane; }

  // A few rows for all tiles, then the next ones: so many are read side by side. A vector that is stored may reach
  // into the rows behind it, which come later.
  void copy_tiles(const Part& grads, const Tiles& tiles) const {
    constexpr int64_t kSideBySide = 8;
    for (int64_t first = 0; first < grads.rows; first += kSideBySide) {
      const int64_t end = std::min(first + kSideBySide, grads.rows);
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t output = tiles.begin(t), width = tiles.begin(t + 1) - output;
        float* to = tile(t, output, grads.rows);
        for (int64_t i = first; i < end; ++i) {
          store(to + i * width, load_up_to(grads.row(i) + output, width) * grads.chosen.factor(i));
        }
      }
    }
  }

  void copy_panel(const Part& x) const {
    for (int64_t i = 0; i < x.rows; ++i) {
      const float* from = x.row(i);
      for (int64_t j = 0; j < x.columns; j += kLane) store(panel_ + i * kPanel + j, load(from + j));
    }
  }

  // Run by run: the rounding errors of a sum grow with the number of its terms.
  void add_rows(int64_t depth, const Tiles& tiles, bool add, float* bias) const {
    constexpr int64_t kRun = 16;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t output = tiles.begin(t), width = tiles.begin(t + 1) - output;
      const float* from = tile(t, output, depth);
      Vec<float> sum{};
      for (int64_t first = 0; first < depth; first += kRun) {
        Vec<float> run{};
        for (int64_t i = first; i < std::min(first + kRun, depth); ++i) run += load(from + i * width);
        sum += run;
      }
      if (add) sum += load_up_to(bias + output, width);
      store_up_to(bias + output, sum, width);
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
  const auto tasks = [&] { return call.count * down * across; };
  // Few tasks are cut further until all threads have as many.
  const int64_t most = parts(call.outputs, tile_rows(kTileVectors));
  while (down < most && tasks() < 8 * threads && tasks() % threads != 0) ++down;
  parallel_for(tasks(), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(Block(call, Arena()).bytes());
    Block block(call, Arena(scratch.data()));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t j = task % across, i = task / across % down, k = task / across / down;
      const int64_t output = call.outputs * i / down, input = vectors * j / across * kLanes<float>;
      const int64_t inputs = vectors * (j + 1) / across * kLanes<float> - input;
      block(k, output, call.outputs * (i + 1) / down - output, input, inputs);
    }
  });
}

}  // namespace

extern const WeightGradientKernels weight_gradient_kernels = {weight_gradient};

}  // namespace vitfast::cpu::VITFAST_ISA
