// Tangents of layer normalisation and of its gradients, row by row. With x^ = (x - mean) r, r = (variance + eps)^(-1/2)
// and h = g w, where g is the gradient of the output, a dot for a tangent and m() for the mean over the channels:
//
//   y = x^ w + b            x^. = r (x. - m(x.) - x^ m(x^ x.))       y. = x^. w + x^ w. + b.
//   dx = r u                u = h - m(h) - x^ m(h x^)                h. = g. w + g w.           r. = -r^2 m(x^ x.)
//   dx. = r. u + r (h. - m(h.) - x^. m(h x^) - x^ (m(h. x^) + m(h x^.)))
//   dw. = sum of g. x^ + g x^. over the rows                         db. = sum of g. over the rows
//
// x^, h and u are computed once for all tangents of a row.
#pragma once

#include "cpu/normalization_row.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

template <class T>
class LayerNormRow : NormalizationRow<T> {
 public:
  LayerNormRow(const NormalizationTangents& call, Arena arena)
      : NormalizationRow<T>(call),
        normal_(arena.take<T>(round_up(channels_, kLanes<T>))),
        weighted_(arena.take<T>(round_up(channels_, kLanes<T>))),
        residual_(arena.take<T>(round_up(channels_, kLanes<T>))),
        normal_t_(arena.take<T>(round_up(channels_, kLanes<T>))),
        weighted_t_(arena.take<T>(round_up(channels_, kLanes<T>))),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  // Adds to the sums (count, channels) of the weight's and the bias's gradients' tangents that are not null.
  void operator()(int64_t row, T* weight_sums, T* bias_sums) {
    compute_primal(row);
    for (int64_t k = 0; k < call_.count; ++k) {
      const int64_t vector = k * channels_;
      compute_tangent(k, row);
      if (call_.out_t != nullptr) write_out(k, row);
      if (call_.grad == nullptr) continue;
      if (call_.x_grad_t != nullptr) write_x_grad(k, row);
      if (weight_sums != nullptr) add_weight_grad(k, row, weight_sums + vector);
      if (bias_sums != nullptr) add_bias_grad(k, row, bias_sums + vector);
    }
  }

 private:
  using NormalizationRow<T>::call_, NormalizationRow<T>::channels_;
  using NormalizationRow<T>::for_each, NormalizationRow<T>::at, NormalizationRow<T>::add, NormalizationRow<T>::weight;
  using NormalizationRow<T>::weighted_grad_t, NormalizationRow<T>::add_bias_grad;

  template <class F>
  T mean(F f) const {
    Vec<T> sum{};
    for_each([&](int64_t c, int64_t n) { sum += f(c, n); });
    return sum_of_lanes<T>(sum) / static_cast<T>(channels_);
  }

  // Scratch is read in whole vectors: what is behind the last channel is 0 there.
  void compute_primal(int64_t row) {
    const T* x = at(call_.x, row);
    const T center = static_cast<const T*>(call_.mean)[row];
    inverse_ = static_cast<const T*>(call_.inverse)[row];
    for_each([&](int64_t c, int64_t n) {
      const Vec<T> normal = (load_up_to(x + c, n) - center) * inverse_;
      store(normal_ + c, n < kLanes<T> ? (lane_index<T>() < static_cast<T>(n) ? normal : Vec<T>{}) : normal);
    });
    if (call_.grad == nullptr) return;
    const T* grad = at(call_.grad, row);
    for_each([&](int64_t c, int64_t n) { store(weighted_ + c, load_up_to(grad + c, n) * weight(c, n)); });
    const T level = mean([&](int64_t c, int64_t) { return load(weighted_ + c); });
    slope_ = mean([&](int64_t c, int64_t) { return load(weighted_ + c) * load(normal_ + c); });
    for_each(
        [&](int64_t c, int64_t) { store(residual_ + c, load(weighted_ + c) - level - load(normal_ + c) * slope_); });
  }

  // x^. and m(x^ x.)
  void compute_tangent(int64_t k, int64_t row) {
    correlation_ = 0;
    if (call_.x_t == nullptr) {
      for_each([&](int64_t c, int64_t) { store(normal_t_ + c, Vec<T>{}); });
      return;
    }
    const T* x_t = at(call_.x_t, k, row);
    const T center = mean([&](int64_t c, int64_t n) { return load_up_to(x_t + c, n); });
    correlation_ = mean([&](int64_t c, int64_t n) { return load_up_to(x_t + c, n) * load(normal_ + c); });
    for_each([&](int64_t c, int64_t n) {
      store(normal_t_ + c, (load_up_to(x_t + c, n) - center - load(normal_ + c) * correlation_) * inverse_);
    });
  }

  void write_out(int64_t k, int64_t row) const {
    T* out = at(call_.out_t, k, row);
    for_each([&](int64_t c, int64_t n) {
      Vec<T> y = load(normal_t_ + c) * weight(c, n);
      if (call_.weight_t != nullptr) y += load(normal_ + c) * load_up_to(at(call_.weight_t, k) + c, n);
      if (call_.bias_t != nullptr) y += load_up_to(at(call_.bias_t, k) + c, n);
      store_up_to(out + c, y, n);
    });
  }

  void write_x_grad(int64_t k, int64_t row) {
    for_each([&](int64_t c, int64_t n) { store(weighted_t_ + c, weighted_grad_t(k, row, c, n)); });
    const T level = mean([&](int64_t c, int64_t) { return load(weighted_t_ + c); });
    // What is behind the last channel of x^. is not 0, but of h it is.
    const T slope = mean([&](int64_t c, int64_t) {
      return load(weighted_t_ + c) * load(normal_ + c) + load(weighted_ + c) * load(normal_t_ + c);
    });
    const T inverse_t = -inverse_ * inverse_ * correlation_;
    T* out = at(call_.x_grad_t, k, row);
    for_each([&](int64_t c, int64_t n) {
      const Vec<T> u = load(weighted_t_ + c) - level - load(normal_t_ + c) * slope_ - load(normal_ + c) * slope;
      store_up_to(out + c, load(residual_ + c) * inverse_t + u * inverse_, n);
    });
  }

  void add_weight_grad(int64_t k, int64_t row, T* sums) const {
    const T* grad = at(call_.grad, row);
    for_each([&](int64_t c, int64_t n) {
      Vec<T> sum = load_up_to(grad + c, n) * load(normal_t_ + c);
      if (call_.grad_t != nullptr) sum += load_up_to(at(call_.grad_t, k, row) + c, n) * load(normal_ + c);
      add(sums, c, n, sum);
    });
  }

  T *normal_, *weighted_, *residual_;  // x^, h and u
  T *normal_t_, *weighted_t_;          // x^. and h.
  T inverse_ = 0, slope_ = 0;          // r and m(h x^)
  T correlation_ = 0;                  // m(x^ x.)
  int64_t bytes_;
};

}  // namespace

}  // namespace vitfast::cpu::VITFAST_ISA
