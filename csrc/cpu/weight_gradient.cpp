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

struct Matrices {
  const float* data;
  int64_t step, rows, columns, row;
};

// (K, rows, columns), or one matrix for all.
Matrices matrices(const Tensor& tensor, int64_t count) {
  const int64_t d = tensor.dim() - 2;
  check(tensor.scalar_type() == ScalarType::Float && (d == 0 || (d == 1 && tensor.size(0) == count)),
        "factors must be float32 matrices, maybe with K in front");
  check(tensor.size(d + 1) <= 1 || tensor.stride(d + 1) == 1, "elements must be adjacent in rows of the factors");
  return {static_cast<const float*>(tensor.data_ptr()), d == 0 ? 0 : tensor.stride(0), tensor.size(d),
          tensor.size(d + 1), tensor.stride(d)};
}

}  // namespace

void weight_gradient_cpu(Tensor grad, Tensor x, std::optional<Tensor> grad2, std::optional<Tensor> x2, Tensor weight,
                         std::optional<Tensor> bias, bool add) {
  const int64_t d = weight.dim() - 2;
  check(weight.scalar_type() == ScalarType::Float && weight.is_contiguous() && (d == 0 || d == 1),
        "weight must be (outputs, inputs) in float32, maybe with K in front, contiguous");
  cpu::WeightGradient call{};
  call.count = d == 0 ? 1 : weight.size(0), call.outputs = weight.size(d), call.inputs = weight.size(d + 1);
  const auto add_term = [&](const Tensor& left, const Tensor& right) {
    const Matrices g = matrices(left, call.count), r = matrices(right, call.count);
    if (call.terms_in_use == 0) call.rows = g.rows;
    check(g.rows == call.rows && r.rows == call.rows && g.columns == call.outputs && r.columns == call.inputs,
          "factors must be (rows, outputs) and (rows, inputs), with as many rows in both terms");
    call.terms[call.terms_in_use++] = {g.data, r.data, g.step, g.row, r.step, r.row};
  };
  add_term(grad, x);
  check(grad2.has_value() == x2.has_value(), "a second term has two factors");
  if (grad2.has_value()) add_term(*grad2, *x2);
  check(call.count > 0 && call.rows > 0 && call.outputs > 0 && call.inputs > 0 &&
            call.inputs % cpu::kWeightGradientInputs == 0,
        "there must be elements, and a multiple of 16 inputs");
  call.weight = static_cast<float*>(weight.data_ptr());
  if (bias.has_value()) {
    check(
        bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->numel() == call.count * call.outputs,
        "bias must be (outputs,) in float32, with K in front if weight has it, contiguous");
    call.bias = static_cast<float*>(bias->data_ptr());
  }
  call.add = add;
  cpu::run(call);
}

}  // namespace vitfast
