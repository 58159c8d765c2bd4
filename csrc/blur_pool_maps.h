// Feature maps as tensors: how they lie in memory, and what a direct call of the blur pooling operators must hold.
// vitfast.functional has checked the arguments; these checks only keep the kernels within bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <utility>

#include "blur_pool_options.h"
#include "operators.h"

namespace vitfast {

inline void check_blur(bool holds, const char* what) { STD_TORCH_CHECK(holds, "vitfast::blur_pool2d: ", what); }

// Whether a map that is not contiguous lies in memory as (B, H, W, C).
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

inline void check_map(const Tensor& x, bool channels_last) {
  check_blur(x.dim() == 4, "a map must be (B, C, H, W)");
  const bool either = x.size(1) == 1 || x.size(2) * x.size(3) == 1;
  check_blur(channels_last ? is_channels_last(x) || (x.is_contiguous() && either) : x.is_contiguous(),
             "maps must be contiguous or channels_last, and all alike");
}

// A (B, C, H, W) tensor, in memory as (B, H, W, C) if it is to be channels_last, from new_tensor(like, sizes).
template <class New>
Tensor new_map(const Tensor& like, int64_t height, int64_t width, bool channels_last, New new_tensor) {
  const int64_t batch = like.size(0), channels = like.size(1);
  if (!channels_last) return new_tensor(like, {batch, channels, height, width});
  const Tensor pixels = new_tensor(like, {batch, height, width, channels});
  return torch::stable::transpose(torch::stable::transpose(pixels, 2, 3), 1, 2);
}

inline void check_blur_kernel(const Tensor& kernel) {
  check_blur(kernel.dim() == 2 && kernel.size(0) > 0 && kernel.size(1) > 0 && kernel.size(0) <= 7 &&
                 kernel.size(1) <= 7 && kernel.is_contiguous(),
             "kernel must be a contiguous matrix of 1 to 7 taps each way");
  using torch::headeronly::ScalarType;
  check_blur(kernel.scalar_type() == ScalarType::Double || kernel.scalar_type() == ScalarType::Float,
             "kernel must be float32 or float64");
}

// How many outputs an axis has.
inline int64_t blur_outputs(int64_t size, int64_t taps, int64_t stride, int64_t before, int64_t after, int64_t mode) {
  check_blur(stride > 0 && before >= 0 && after >= 0 && 0 <= mode && mode <= 3,
             "stride, padding or padding_mode is wrong");
  check_blur(size > 0 && size + before + after >= taps, "the kernel is larger than the padded map");
  return (size + before + after - taps) / stride + 1;
}

// The values of one of a prologue's tensors, or null for none.
inline const void* per_channel(const std::optional<Tensor>& values, int64_t channels,
                               torch::headeronly::ScalarType dtype) {
  if (!values.has_value()) return nullptr;
  check_blur(
      values->dim() == 1 && values->size(0) == channels && values->is_contiguous() && values->scalar_type() == dtype,
      "the tensors of a prologue must be (C,), contiguous, in the dtype that is computed in");
  return values->data_ptr();
}

}  // namespace vitfast
