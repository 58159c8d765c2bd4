// The operator for the gradients of linear layers on the CPU. Arguments come from vitfast/ops/linear.py; what is
// checked here only keeps a direct call within bounds.
#include "cpu/weight_gradient.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/dispatch.h"
#include "operators.h"

namespace vitfast {

void cpu::run(const WeightGradient& call) {
  kernels_for(avx512::weight_gradient_kernels, avx2::weight_gradient_kernels, baseline::weight_gradient_kernels)
      .run(call);
}

namespace {

using torch::headeronly::ScalarType;

void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, "vitfast::weight_gradient: ", what); }

// The distance of the rows of a matrix whose elements are adjacent along them.
int64_t row_stride(const Tensor& rows) {
  check(rows.scalar_type() == ScalarType::Float && rows.dim() == 2 && (rows.size(1) <= 1 || rows.stride(1) == 1),
        "grad and x must be float32 matrices with adjacent elements in a row");
  return rows.stride(0);
}

}  // namespace

void weight_gradient_cpu(Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> bias, bool add) {
  cpu::WeightGradient call{};
  call.grad_stride = row_stride(grad), call.x_stride = row_stride(x);
  call.rows = grad.size(0), call.outputs = grad.size(1), call.inputs = x.size(1);
  check(x.size(0) == call.rows && call.inputs % cpu::kWeightGradientInputs == 0,
        "grad and x must have as many rows, and x a multiple of 16 columns");
  check(call.rows > 0 && call.outputs > 0 && call.inputs > 0, "grad and x must have elements");
  check(weight.scalar_type() == ScalarType::Float && weight.is_contiguous() && weight.dim() == 2 &&
            weight.size(0) == call.outputs && weight.size(1) == call.inputs,
        "weight must be a contiguous float32 matrix, (columns of grad, columns of x)");
  call.grad = static_cast<const float*>(grad.data_ptr()), call.x = static_cast<const float*>(x.data_ptr());
  call.weight = static_cast<float*>(weight.data_ptr());
  if (bias.has_value()) {
    check(bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->numel() == call.outputs,
          "bias must be a contiguous float32 vector with an element for each column of grad");
    call.bias = static_cast<float*>(bias->data_ptr());
  }
  call.add = add;
  cpu::run(call);
}

}  // namespace vitfast
