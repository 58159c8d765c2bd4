// Blur pooling and its transpose, in one pass over the input and one over the output.
#pragma once

#include "cpu/blur_pool_pixels.h"
#include "cpu/blur_pool_planes.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

void blur(const BlurCall& call) {
  with_storage(call.storage, [&](auto value) {
    using S = decltype(value);
    call.channels_last ? blur_pixels<S>(call) : blur_planes<S>(call);
  });
}

}  // namespace

const BlurKernels blur_kernels = {blur};

}  // namespace vitfast::cpu::VITFAST_ISA
