// Blur pooling and its transpose, in one pass over the input and one over the output.
#pragma once

#include "cpu/blur_pool_pixels.h"
#include "cpu/blur_pool_planes.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

std::shared_ptr<const void> blur_tables(const BlurPlan& plan) {
  std::shared_ptr<const void> tables;
  with_storage(plan.storage, [&](auto value) {
    using T = Compute<decltype(value)>;
    if (plan.channels_last) {
      tables = std::make_shared<BlurPixelTables<T>>(plan);
    } else {
      tables = std::make_shared<BlurPlaneTables<T>>(plan);
    }
  });
  return tables;
}

void blur(const BlurCall& call) {
  with_storage(call.plan.storage, [&](auto value) {
    using S = decltype(value);
    call.plan.channels_last ? blur_pixels<S>(call) : blur_planes<S>(call);
  });
}

}  // namespace

const BlurKernels blur_kernels = {blur_tables, blur};

}  // namespace vitfast::cpu::VITFAST_ISA
