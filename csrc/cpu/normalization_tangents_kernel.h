// The kernel for tangents of normalisations.
#pragma once

#include "cpu/batch_norm_tangents_kernel.h"
#include "cpu/layer_norm_tangents_kernel.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

template <class T>
void normalization_tangents_of(const NormalizationTangents& call) {
  call.per_channel ? differentiate_rows<BatchNormRow<T>, T>(call) : differentiate_rows<LayerNormRow<T>, T>(call);
}

void normalization_tangents(const NormalizationTangents& call) {
  call.is_double ? normalization_tangents_of<double>(call) : normalization_tangents_of<float>(call);
}

}  // namespace

extern const NormalizationKernel normalization_tangents_kernel = normalization_tangents;

}  // namespace vitfast::cpu::VITFAST_ISA
