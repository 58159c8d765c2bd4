// Layer normalisation, and batch normalisation whose statistics are constants, on the CPU: what the operator for their
// tangents (normalization_tangents.cpp) and the kernels (layer_norm_tangents_kernel.h, batch_norm_tangents_kernel.h)
// share.
#pragma once

#include <cstdint>

namespace vitfast::cpu {

// Of `count` tangents at once, the tangents of the output and of the gradients. Tensors are contiguous, (rows,
// channels) and (channels), tangents and results with `count` in front; null stands for zeros, or for a result that is
// not wanted. Without weights they are 1.
struct NormalizationTangents {
  bool is_double;
  int64_t count, rows, channels;
  // With the statistics of every row, or of every channel, where they are constants: the mean, (variance + eps)^(-1/2).
  bool per_channel;
  const void *x, *mean, *inverse;
  const void *weight, *grad;
  const void *x_t, *weight_t, *bias_t, *grad_t;
  void *out_t, *x_grad_t;
  // Sums over the rows, cut into `splits` runs: (splits, count, channels).
  void *weight_grad_t, *bias_grad_t;
  int64_t splits;
};

using NormalizationKernel = void (*)(const NormalizationTangents&);

namespace baseline {
extern const NormalizationKernel normalization_tangents_kernel;
}
namespace avx2 {
extern const NormalizationKernel normalization_tangents_kernel;
}
namespace avx512 {
extern const NormalizationKernel normalization_tangents_kernel;
}

}  // namespace vitfast::cpu
