// Memory for large results.
//
// A model asks for results of the same sizes in every step. PyTorch takes them from malloc, whose freed blocks are some
// bytes too small for the next aligned request of the same size, so that again and again they come fresh from the
// system, which fills them with zeros page by page: that costs more than a blur, or the attention of a window, needs to
// fill them with results. The memory of large results is therefore kept when they are freed, up to a limit, and handed
// to the next ones of their size. It lies on huge pages where the system leaves that choice to programs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace vitfast::cpu {

using torch::stable::Tensor;

// A tensor of the sizes, dense and row-major, and of the dtype and device of `like`; unwritten.
Tensor new_result(const Tensor& like, const std::vector<int64_t>& sizes);

// A tensor of the sizes, strides, dtype and device of `like`, as empty_like gives it; unwritten.
Tensor new_result_like(const Tensor& like);

// Keeps up to so many bytes of freed results from now on, and returns the rest to the system. Results that are larger
// than the limit come from PyTorch's own allocator. Returns the limit before.
int64_t keep_result_bytes(int64_t limit);

// How many bytes are kept.
int64_t kept_result_bytes();

}  // namespace vitfast::cpu
