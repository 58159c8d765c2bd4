// Convolutions with 3x3 filters and stride 1, as sums of up to two, many at a time: what the operators (winograd.cpp)
// and their kernels (winograd_kernel.h) share.
#pragma once

#include <cstdint>

namespace vitfast::cpu {

// Maps (count, images, height, width, channels) whose channels are adjacent. One map for all of `count` has the step 0.
struct ChannelsLast {
  const float* data;
  int64_t step, image, row, pixel;
};

// Filters (count, outputs, inputs, 3, 3), each of them contiguous.
struct Filters {
  const float* data;
  int64_t step;
};

// What all convolutions of a call have in common.
struct ConvolutionShape {
  int64_t count, images;
  int64_t height, width, inputs;           // of the maps that are convolved
  int64_t out_height, out_width, outputs;  // of the results
  int64_t padding;
};

// out (count, images, out_height, out_width, outputs), contiguous: the sum of the pairs' convolutions.
struct SumOfConvolutions {
  ConvolutionShape shape;
  bool transposed;  // filters are (inputs, outputs, 3, 3), and turned by half a circle
  struct Pair {
    ChannelsLast x;
    Filters filter;
  } pairs[2];
  int64_t terms;  // pairs in use
  float* out;
};

// out (count, outputs, inputs, 3, 3), contiguous: the sum of the gradients of the filters by the pairs.
struct SumOfFilterGradients {
  ConvolutionShape shape;
  struct Pair {
    ChannelsLast x, grad;
  } pairs[2];
  int64_t terms;
  float* out;
};

// Channels must be multiples of this: whole vectors of any instruction set.
inline constexpr int64_t kConvolutionChannels = 16;

struct WinogradKernels {
  void (*convolve)(const SumOfConvolutions&);
  void (*filter_gradient)(const SumOfFilterGradients&);
};

namespace baseline {
extern const WinogradKernels winograd_kernels;
}
namespace avx2 {
extern const WinogradKernels winograd_kernels;
}
namespace avx512 {
extern const WinogradKernels winograd_kernels;
}

}  // namespace vitfast::cpu
