// Tangents of batch normalisation with constant statistics and of its gradients, row by row of maps with channels last.
// With r = (variance + eps)^(-1/2), x^ = (x - mean) r, g the gradient of the output and a dot for a tangent:
//
//   y = x^ w + b            y. = x. r w + x^ w. + b.
//   dx = g w r              dx. = (g. w + g w.) r
//   dw = sum of g x^        dw. = sum of g. x^ + g x. r
//   db = sum of g           db. = sum of g.
#pragma once

#include "cpu/normalization_row.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

template <class T>
class BatchNormRow : NormalizationRow<T> {
 public:
  BatchNormRow(const NormalizationTangents& call, Arena arena)
      : NormalizationRow<T>(call), normal_(arena.take<T>(round_up(channels_, kLanes<T>))), bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  // Adds to the sums (count, channels) of the weight's and the bias's gradients' tangents that are not null.
  void operator()(int64_t row, T* weight_sums, T* bias_sums) {
    const T *x = at(call_.x, row), *mean = at(call_.mean, 0);
    for_each([&](int64_t c, int64_t n) {
      store_up_to(normal_ + c, (load_up_to(x + c, n) - load_up_to(mean + c, n)) * inverse(c, n), n);
    });
    for (int64_t k = 0; k < call_.count; ++k) {
      const int64_t vector = k * channels_;
      if (call_.out_t != nullptr) write_out(k, row);
      if (call_.x_grad_t != nullptr) write_x_grad(k, row);
      if (weight_sums != nullptr) add_weight_grad(k, row, weight_sums + vector);
      if (bias_sums != nullptr) add_bias_grad(k, row, bias_sums + vector);
    }
  }

 private:
  using NormalizationRow<T>::call_, NormalizationRow<T>::channels_;
  using NormalizationRow<T>::for_each, NormalizationRow<T>::at, NormalizationRow<T>::add, NormalizationRow<T>::weight;
  using NormalizationRow<T>::weighted_grad_t, NormalizationRow<T>::add_bias_grad;

  Vec<T> inverse(int64_t c, int64_t n) const { return load_up_to(at(call_.inverse, 0) + c, n); }

  void write_out(int64_t k, int64_t row) const {
    T* out = at(call_.out_t, k, row);
    for_each([&](int64_t c, int64_t n) {
      Vec<T> y{};
      if (call_.x_t != nullptr) y += load_up_to(at(call_.x_t, k, row) + c, n) * inverse(c, n) * weight(c, n);
      if (call_.weight_t != nullptr) y += load_up_to(normal_ + c, n) * load_up_to(at(call_.weight_t, k) + c, n);
      if (call_.bias_t != nullptr) y += load_up_to(at(call_.bias_t, k) + c, n);
      store_up_to(out + c, y, n);
    });
  }

  void write_x_grad(int64_t k, int64_t row) const {
    T* out = at(call_.x_grad_t, k, row);
    for_each([&](int64_t c, int64_t n) { store_up_to(out + c, weighted_grad_t(k, row, c, n) * inverse(c, n), n); });
  }

  void add_weight_grad(int64_t k, int64_t row, T* sums) const {
    const T* grad = at(call_.grad, row);
    for_each([&](int64_t c, int64_t n) {
      Vec<T> sum{};
      if (call_.grad_t != nullptr) sum += load_up_to(at(call_.grad_t, k, row) + c, n) * load_up_to(normal_ + c, n);
      if (call_.x_t != nullptr) {
        sum += load_up_to(grad + c, n) * load_up_to(at(call_.x_t, k, row) + c, n) * inverse(c, n);
      }
      add(sums, c, n, sum);
    });
  }

  T* normal_;  // x^
  int64_t bytes_;
};

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
