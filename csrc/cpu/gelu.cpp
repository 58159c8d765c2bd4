// The operators of the fused MLP on the CPU. Arguments come from vitfast/ops/mlp.py; what is checked here only keeps a
// direct call within bounds.
#include "cpu/gelu.h"

#include <torch/csrc/stable/library.h>

#include "cpu/dispatch.h"
#include "operators.h"

namespace vitfast {
namespace {

const cpu::GeluKernels& kernels() {
  return cpu::kernels_for(cpu::avx512::gelu_kernels, cpu::avx2::gelu_kernels, cpu::baseline::gelu_kernels);
}

void check_alike(const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.is_contiguous() && other.is_contiguous() && x.scalar_type() == other.scalar_type() &&
                      x.numel() == other.numel(),
                  "vitfast::gelu: tensors must be contiguous, of one dtype and one size");
}

}  // namespace

void gelu_cpu(Tensor x, Tensor out) {
  check_alike(x, out);
  kernels().forward({cpu::storage_of(x.scalar_type()), x.numel(), x.data_ptr(), out.data_ptr()});
}

void gelu_backward_cpu(Tensor x, Tensor out, Tensor grad) {
  check_alike(x, out);
  check_alike(x, grad);
  kernels().backward({cpu::storage_of(x.scalar_type()), x.numel(), x.data_ptr(), out.data_ptr(), grad.data_ptr()});
}

}  // namespace vitfast
