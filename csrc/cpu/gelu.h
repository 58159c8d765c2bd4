// GELU on the CPU: what the operators (gelu.cpp) and their kernels (gelu_kernel.h) share.
#pragma once

#include <cstdint>

#include "cpu/storage.h"

namespace vitfast::cpu {

struct GeluForward {
  Storage storage;
  int64_t size;
  const void* x;
  void* out;  // may be x
};

struct GeluBackward {
  Storage storage;
  int64_t size;
  const void* x;
  void* out;   // gelu(x), once more
  void* grad;  // of gelu(x), and then of x
};

// Of `count` tangents at once: the tangents of gelu(x), or, with a gradient `grad` of it, those of the gradient of x.
// Tensors are contiguous; a tangent that is null is zero.
struct GeluTangents {
  bool is_double;
  int64_t count, size;
  const void *x, *grad;
  const void *x_t, *grad_t;
  void *out_t, *x_grad_t;
};

struct GeluKernels {
  void (*forward)(const GeluForward&);
  void (*backward)(const GeluBackward&);
  void (*tangents)(const GeluTangents&);
};

// Those in use.
const GeluKernels& gelu_kernels();

namespace baseline {
extern const GeluKernels gelu_kernels;
}
namespace avx2 {
extern const GeluKernels gelu_kernels;
}
namespace avx512 {
extern const GeluKernels gelu_kernels;
}

}  // namespace vitfast::cpu
