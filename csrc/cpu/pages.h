// Large results on huge pages.
//
// Memory that a large tensor gets comes fresh from the system again and again, and the first write to each of its pages
// costs a microsecond or more: for 4 KiB pages that is more than any of these kernels takes to fill them. Where the
// system leaves the choice to programs (Linux, transparent huge pages set to "madvise"), this asks for pages of 2 MiB.
// It changes no value and takes no more memory: only pages that lie in the tensor as a whole are asked for.
#pragma once

#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace vitfast::cpu {

// The same tensor, which must be new and not written yet.
inline torch::stable::Tensor on_huge_pages(torch::stable::Tensor tensor) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = begin + tensor.numel() * tensor.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  // An error means no huge pages, which is no error here.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace vitfast::cpu
