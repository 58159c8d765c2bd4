// Blur pooling on the CPU: what the operators (blur_pool.cpp) and their kernels (blur_pool_kernel.h) share.
//
// A blur is the product of two sparse matrices, one that acts on columns and one that acts on rows, and padding, stride
// and the transposition for the gradient are all in these matrices. A kernel that is no outer product of two vectors
// has a matrix for columns per line of the kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "blur_pool_options.h"
#include "cpu/storage.h"

namespace vitfast::cpu {

// A sparse matrix: output o is the sum of the taps in [begin[o], begin[o + 1]).
struct BlurTap {
  int64_t from;  // an input along this axis
  int64_t line;  // of a matrix for rows: which of the matrices has acted on the columns; else 0
  double weight;
};
struct BlurMatrix {
  std::vector<int64_t> begin;
  std::vector<BlurTap> taps;
};
// Outputs first, first + period, ... whose taps are those of the first, but for inputs that lie `step` further each
// time; 0 if there is one.
struct BlurSeries {
  int64_t first, count, step;
};

// The matrix for rows as steps: the rows of the input that a group of outputs needs are blurred along their columns
// into slots, where later groups may find them; then each output is a weighted sum of slots.
struct BlurSteps {
  struct Load {
    int64_t from, line, slot;
  };
  struct Tap {
    int64_t slot;
    double weight;
  };
  struct Group {
    int64_t first, last;  // outputs
    int64_t begin, end;   // of its loads
  };
  std::vector<Load> loads;
  std::vector<Group> groups;
  std::vector<int64_t> strips;  // strip s has the groups in [strips[s], strips[s + 1]) and finds no slot filled
  std::vector<int64_t> begin;   // output o has the taps in [begin[o], begin[o + 1])
  std::vector<Tap> taps;
  int64_t slots = 0, most_taps = 0;  // of an output

  int64_t strip_count() const { return static_cast<int64_t>(strips.size()) - 1; }
};

// The matrix for rows cut into strips of outputs, which are computed one after the other: the rows of the input that a
// strip needs are gathered first, in order; its taps count them.
struct BlurStrip {
  struct Run {
    int64_t from, rows;
  };
  int64_t first, last;  // outputs
  int64_t first_series = 0, last_series = 0;
  std::vector<Run> runs;
  int64_t rows;  // of all runs

  int64_t outputs() const { return last - first; }
};
struct BlurStrips {
  std::vector<BlurStrip> strips;
  BlurMatrix matrix;               // its inputs are the rows of the strip that an output is in
  std::vector<BlurSeries> series;  // of all strips
  int64_t period = 1;
  int64_t most_rows = 0, most_outputs = 0;  // of a strip
  int64_t most_taps = 0;                    // of an output
};

// Some outputs of each row, which are computed together, and the inputs [from, until) that they need.
struct BlurBlock {
  int64_t first, last;
  int64_t from, until;
  std::vector<std::vector<BlurSeries>> series;  // of each of the matrices for columns

  int64_t inputs() const { return until - from; }
  int64_t outputs() const { return last - first; }
};

// As many values as a strip has, about: its buffers are to fit into the first level.
constexpr int64_t kStripValues = 4096;
// Likewise in each row of a block.
constexpr int64_t kBlockValues = 2048;

// u = activation(scale * x + shift).
struct BlurPrologue {
  BlurActivation activation = BlurActivation::kNone;
  double temperature = 1;       // of kTanhRelu
  const void* scale = nullptr;  // (channels,) in the type that is computed in; null for 1
  const void* shift = nullptr;  // likewise; null for 0

  bool any() const { return activation != BlurActivation::kNone || scale != nullptr || shift != nullptr; }
};

struct BlurCall {
  Storage storage;
  bool channels_last, transpose;
  int64_t batch, channels, in_height, in_width, out_height, out_width;
  BlurSteps rows;                   // if channels_last
  BlurStrips strips;                // if not
  std::vector<BlurMatrix> columns;  // one for each line of the kernel, or a single one
  std::vector<BlurBlock> blocks;    // of columns; a single one if not channels_last
  int64_t column_step;              // that many inputs are between ...
  int64_t column_period;            // so many outputs; one of the two is 1, the other the stride
  const void* in;
  void* out;
  BlurPrologue prologue;  // of the input; of `primal` if there is one, whose gradient is then written

  const void* primal = nullptr;                               // x, laid out as `out`
  double *scale_partial = nullptr, *shift_partial = nullptr;  // (batch, strips, channels)

  int64_t strip_count() const {
    return channels_last ? rows.strip_count() : static_cast<int64_t>(strips.strips.size());
  }
  int64_t parts() const { return batch * strip_count(); }
};

struct BlurKernels {
  void (*run)(const BlurCall&);
};

namespace baseline {
extern const BlurKernels blur_kernels;
}
namespace avx2 {
extern const BlurKernels blur_kernels;
}
namespace avx512 {
extern const BlurKernels blur_kernels;
}

}  // namespace vitfast::cpu
