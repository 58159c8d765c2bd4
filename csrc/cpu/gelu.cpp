// The operators of the fused MLP on the CPU. Arguments come from vitfast/ops/mlp.py; what is checked here only keeps a
// direct call within bounds.
#include "cpu/gelu.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/dispatch.h"
#include "operators.h"

namespace vitfast {

const cpu::GeluKernels& cpu::gelu_kernels() {
  return kernels_for(avx512::gelu_kernels, avx2::gelu_kernels, baseline::gelu_kernels);
}

namespace {

using torch::headeronly::ScalarType;

void check_alike(const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.is_contiguous() && other.is_contiguous() && x.scalar_type() == other.scalar_type() &&
                      x.numel() == other.numel(),
                  "vitfast::gelu: tensors must be contiguous, of one dtype and one size");
}

}  // namespace

void gelu_cpu(Tensor x, Tensor out) {
  check_alike(x, out);
  cpu::gelu_kernels().forward({cpu::storage_of(x.scalar_type()), x.numel(), x.data_ptr(), out.data_ptr()});
}

void gelu_backward_cpu(Tensor x, Tensor out, Tensor grad) {
  check_alike(x, out);
  check_alike(x, grad);
  cpu::gelu_kernels().backward(
      {cpu::storage_of(x.scalar_type()), x.numel(), x.data_ptr(), out.data_ptr(), grad.data_ptr()});
}

void gelu_tangents_cpu(Tensor x, std::optional<Tensor> grad, std::optional<Tensor> x_t, std::optional<Tensor> grad_t,
                       Tensor result) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "vitfast::gelu_tangents: takes float32 and float64");
  const int64_t size = x.numel(), count = size == 0 ? 0 : result.numel() / size;
  const auto data = [&](const std::optional<Tensor>& tensor, int64_t numel) -> void* {
    if (!tensor.has_value()) return nullptr;
    STD_TORCH_CHECK(tensor->scalar_type() == dtype && tensor->is_contiguous() && tensor->numel() == numel,
                    "vitfast::gelu_tangents: tensors must be contiguous, of one dtype, and of the size of x, tangents "
                    "with K in front");
    return tensor->data_ptr();
  };
  cpu::GeluTangents call{};
  call.is_double = dtype == ScalarType::Double;
  call.count = count, call.size = size;
  call.x = data(x, size), call.grad = data(grad, size);
  call.x_t = data(x_t, count * size), call.grad_t = data(grad_t, count * size);
  (grad.has_value() ? call.x_grad_t : call.out_t) = data(result, count * size);
  cpu::gelu_kernels().tangents(call);
}

}  // namespace vitfast
