// The gradients of a linear layer's weight and bias on the CPU: what the operator (weight_gradient.cpp) and its kernels
// (weight_gradient_kernel.h) share.
#pragma once

#include <cstdint>

#include "cpu/row_table.h"

namespace vitfast::cpu {

// weight (outputs, inputs) and bias (outputs,) of y = x W^T + b, for `rows` rows of x and of the gradient of y.
// Elements of a row are adjacent, and rows `x_stride` and `grad_stride` apart; weight and bias are contiguous.
struct WeightGradient {
  int64_t rows, outputs, inputs;
  const float *grad, *x;
  int64_t grad_stride, x_stride;
  float* weight;
  float* bias;              // null if nobody wants it
  bool add;                 // to what weight and bias hold
  RowTable grad_rows = {};  // where the gradients are some rows of a map
};

// `inputs` must be a multiple of this: whole vectors of any instruction set.
inline constexpr int64_t kWeightGradientInputs = 16;

struct WeightGradientKernels {
  void (*run)(const WeightGradient&);
};

// By the kernels in use.
void run(const WeightGradient& call);

namespace baseline {
extern const WeightGradientKernels weight_gradient_kernels;
}
namespace avx2 {
extern const WeightGradientKernels weight_gradient_kernels;
}
namespace avx512 {
extern const WeightGradientKernels weight_gradient_kernels;
}

}  // namespace vitfast::cpu
