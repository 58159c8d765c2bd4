// Layer normalisation on the CPU: what the operator for its tangents (layer_norm.cpp) and the kernel
// (layer_norm_kernel.h) share.
#pragma once

#include <cstdint>

namespace vitfast::cpu {

// Of `count` tangents at once, the tangents of the output and of the gradients. Tensors are contiguous, (rows,
// channels) and (channels), tangents and results with `count` in front; null stands for zeros, or for a result that is
// not wanted. Without weights they are 1.
struct LayerNormTangents {
  bool is_double;
  int64_t count, rows, channels;
  const void *x, *mean, *inverse;  // with the statistics of every row: the mean and (variance + eps)^(-1/2)
  const void *weight, *grad;
  const void *x_t, *weight_t, *bias_t, *grad_t;
  void *out_t, *x_grad_t;
  // Sums over the rows, cut into `splits` runs: (splits, count, channels).
  void *weight_grad_t, *bias_grad_t;
  int64_t splits;
};

using LayerNormKernel = void (*)(const LayerNormTangents&);

namespace baseline {
extern const LayerNormKernel layer_norm_tangents_kernel;
}
namespace avx2 {
extern const LayerNormKernel layer_norm_tangents_kernel;
}
namespace avx512 {
extern const LayerNormKernel layer_norm_tangents_kernel;
}

}  // namespace vitfast::cpu
