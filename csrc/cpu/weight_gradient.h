// The gradients of a linear layer's weight and bias on the CPU: what the operator (weight_gradient.cpp) and its kernels
// (weight_gradient_kernel.h) share.
#pragma once

#include <cstdint>

#include "cpu/row_table.h"

namespace vitfast::cpu {

// K times (`count`) weight (outputs, inputs), the sum of the terms' products G^T X, and bias (outputs,), the sum of the
// rows of the first G: with x as X and the gradient of y as G, the gradients of y = x W^T + b. Both are contiguous.
struct WeightGradient {
  int64_t count, rows, outputs, inputs;
  // G (count, rows, outputs) and X (count, rows, inputs). Elements of a row are adjacent. What is the same for all of
  // `count` has the step 0.
  struct Term {
    const float *grad, *x;
    int64_t grad_step, grad_row, x_step, x_row;
  } terms[2];
  int64_t terms_in_use;
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
