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

struct GeluKernels {
  void (*forward)(const GeluForward&);
  void (*backward)(const GeluBackward&);
};

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
