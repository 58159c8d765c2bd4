// What the operators share: from a tensor's dtype to the kernels' view of it, and from the processor to the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/instruction_set.h"
#include "cpu/storage.h"

namespace vitfast::cpu {

using torch::headeronly::ScalarType;

inline Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::Double:
      return Storage::kFloat64;
    case ScalarType::Half:
      return Storage::kFloat16;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "vitfast takes float32, float64, float16 and bfloat16");
  }
}

inline ScalarType compute_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// The kernels that are compiled for the instruction set in use.
template <class Kernels>
const Kernels& kernels_for([[maybe_unused]] const Kernels& avx512, [[maybe_unused]] const Kernels& avx2,
                           const Kernels& baseline) {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return avx512;
    case InstructionSet::kAvx2:
      return avx2;
    case InstructionSet::kBaseline:
      break;
  }
#endif
  return baseline;
}

// Adds up `parts` partial sums of `size` values each, in a fixed order.
template <class T>
void add_up(const T* partial, int64_t parts, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = partial[i];
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t i = 0; i < size; ++i) out[i] += partial[part * size + i];
  }
}

// out (sums, size) = the sums over the second dimension of partial (sums, parts, size).
inline void add_up_partial_sums(const torch::stable::Tensor& partial, int64_t sums, int64_t parts, int64_t size,
                                torch::stable::Tensor& out) {
  const auto all = [&](auto* to, const auto* from) {
    torch::stable::parallel_for(0, sums, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) add_up(from + i * parts * size, parts, size, to + i * size);
    });
  };
  if (out.scalar_type() == ScalarType::Double) {
    all(static_cast<double*>(out.data_ptr()), static_cast<const double*>(partial.data_ptr()));
  } else {
    all(static_cast<float*>(out.data_ptr()), static_cast<const float*>(partial.data_ptr()));
  }
}

}  // namespace vitfast::cpu
