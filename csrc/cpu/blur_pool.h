// Blur pooling on the CPU: what the operators (blur_pool.cpp) and their kernels (blur_pool_kernel.h) share.
//
// A blur is the product of two sparse matrices, one that acts on columns and one that acts on rows, and padding, stride
// and the transposition for the gradient are all in these matrices. A kernel that is no outer product of two vectors
// has a matrix for columns per line of the kernel.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "blur_pool_options.h"
#include "cpu/storage.h"

namespace vitfast::cpu {

// A sparse matrix: output o is the sum of the taps in [begin[o], begin[o + 1]).
struct BlurTap {
  int64_t from;  // an input along this axis
  int64_t line;  // of the matrix for rows: which of the matrices acts on the columns; else 0
  double weight;
};

struct BlurMatrix {
  std::vector<int64_t> begin;
  std::vector<BlurTap> taps;

  int64_t outputs() const { return static_cast<int64_t>(begin.size()) - 1; }
  int64_t taps_of(int64_t output) const { return begin[output + 1] - begin[output]; }
  const BlurTap* first_tap(int64_t output) const { return taps.data() + begin[output]; }
};

// The matrix for rows, and the order in which its outputs are computed: in strips, which may be computed at the same
// time, of groups. Where rows of the input are prepared, since their prologue is dear, each has a slot, where later
// groups of the strip may find it, and the taps of the matrix count slots.
struct BlurRows {
  struct Load {
    int64_t from, slot;
  };
  struct Group {
    int64_t first, last;  // outputs
    int64_t begin, end;   // of its loads
  };
  BlurMatrix matrix;
  std::vector<Group> groups;
  std::vector<Load> loads;
  std::vector<int64_t> strips;  // strip s has the groups in [strips[s], strips[s + 1]) and finds no slot filled
  int64_t slots = 0;

  int64_t strip_count() const { return static_cast<int64_t>(strips.size()) - 1; }
};

// How many values a strip of a plane has, about: some columns of it are read and written at a time, from the first
// level.
constexpr int64_t kStripValues = 4096;

// u = activation(scale * x + shift).
struct BlurPrologue {
  BlurActivation activation = BlurActivation::kNone;
  double temperature = 1;       // of kTanhRelu
  const void* scale = nullptr;  // (channels,) in the type that is computed in; null for 1
  const void* shift = nullptr;  // likewise; null for 0

  bool any() const { return activation != BlurActivation::kNone || scale != nullptr || shift != nullptr; }
};

// All of a call but its tensors. Steps of a model ask for the same plans again and again, and to make one takes as long
// as to blur a small map: it is kept.
struct BlurPlan {
  Storage storage;
  bool channels_last;
  bool prepared;  // whether rows of the input go through slots, where their prologue is applied
  int64_t batch, channels, in_height, in_width, out_height, out_width;
  BlurRows rows;
  std::vector<BlurMatrix> columns;     // one for each line of the kernel, or a single one
  int64_t row_period, column_period;   // every so many outputs are likely to have the same taps
  std::shared_ptr<const void> tables;  // what the kernels make of all this, in the type that is computed in

  int64_t parts() const { return batch * rows.strip_count(); }
};

struct BlurCall {
  const BlurPlan& plan;
  BlurPrologue prologue;  // of the input; of `primal` if there is one, whose gradient is then written
  const void* in = nullptr;
  void* out = nullptr;
  const void* primal = nullptr;                               // x, laid out as `out`
  double *scale_partial = nullptr, *shift_partial = nullptr;  // (batch, strips, channels), or null: not wanted
};

struct BlurKernels {
  std::shared_ptr<const void> (*tables)(const BlurPlan&);
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
