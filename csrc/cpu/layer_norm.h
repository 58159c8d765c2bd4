// Layer normalisation of rows on the CPU: what the residual branches (branches.cpp) and the kernels
// (layer_norm_kernel.h) share.
#pragma once

#include <cstdint>

#include "cpu/row_table.h"

namespace vitfast::cpu {

// y = (x - mean) inverse weight + bias with inverse = (variance + eps)^(-1/2) of some rows of a map. Matrices have
// `channels` adjacent elements in a row. Without weights or biases they are 1 and 0.
struct LayerNorm {
  int64_t rows, channels;
  const float* x;  // the map
  RowTable chosen;
  const float *weight, *bias;
  float eps;
  float *mean, *inverse;  // (rows)
};

struct LayerNormKernels {
  // Writes y (rows, channels), mean and inverse.
  void (*forward)(const LayerNorm&, float* out);
  // With `grad` (rows, channels), the gradient of y: adds that of x to the map `start`, and writes it to the chosen
  // rows of the map `x_grad`. Those of weight and bias are sums over the rows, of which there are `splits` runs:
  // (splits, 2, channels).
  void (*backward)(const LayerNorm&, const float* grad, const float* start, float* x_grad, float* sums, int64_t splits);
};

// `channels` must be a multiple of this: whole vectors of any instruction set.
inline constexpr int64_t kLayerNormChannels = 16;

namespace baseline {
extern const LayerNormKernels layer_norm_kernels;
}
namespace avx2 {
extern const LayerNormKernels layer_norm_kernels;
}
namespace avx512 {
extern const LayerNormKernels layer_norm_kernels;
}

}  // namespace vitfast::cpu
