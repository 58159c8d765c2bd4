// Layer normalisation and its gradients, some rows side by side: sums over the lanes of a vector take long, and those
// of several rows overlap. With x^ = (x - mean) r, r = (variance + eps)^(-1/2), h = g w, where g is the gradient of the
// output, and m() for the mean over the channels:
//
//   y = x^ w + b      dx = r (h - m(h) - x^ m(h x^))      dw = sum of g x^ over the rows      db = sum of g
//
// Source: Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450.
#pragma once

#include "cpu/layer_norm.h"
#include "cpu/matrix.h"
#include "cpu/parallel.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// R rows from one on.
template <int R>
class LayerNormRows {
  static constexpr int64_t kLane = kLanes<float>;

 public:
  LayerNormRows(const LayerNorm& call, int64_t first) : call_(call), first_(first) {
    for (int r = 0; r < R; ++r) x_[r] = row_of(call.x, r);
  }

  void forward(float* out) const {
    Vec<float> sum[R] = {};
    for_each([&](int64_t c) {
      for (int r = 0; r < R; ++r) sum[r] += load(x_[r] + c);
    });
    float* mean = call_.mean + first_;
    for (int r = 0; r < R; ++r) mean[r] = average(sum[r]), sum[r] = Vec<float>{};
    for_each([&](int64_t c) {
      for (int r = 0; r < R; ++r) {
        const Vec<float> distance = load(x_[r] + c) - mean[r];
        sum[r] += distance * distance;
      }
    });
    float* inverse = call_.inverse + first_;
    for (int r = 0; r < R; ++r) inverse[r] = 1.0f / std::sqrt(average(sum[r]) + call_.eps);
    out += first_ * call_.channels;
    for_each([&](int64_t c) {
      const Vec<float> w = weight(c), b = call_.bias == nullptr ? Vec<float>{} : load(call_.bias + c);
      for (int r = 0; r < R; ++r) store(out + r * call_.channels + c, normal(r, c) * w + b);
    });
  }

  // `sums` (2, channels) of the gradients of weight and bias grow.
  void backward(const float* grad, const float* start, float* x_grad, float* sums) const {
    grad += first_ * call_.channels;
    const auto grad_at = [&](int r, int64_t c) { return load(grad + r * call_.channels + c); };
    Vec<float> level[R] = {}, slope[R] = {};
    for_each([&](int64_t c) {
      const Vec<float> w = weight(c);
      float *weight_sum = sums + c, *bias_sum = weight_sum + call_.channels;
      Vec<float> weight_grad = load(weight_sum), bias_grad = load(bias_sum);
      for (int r = 0; r < R; ++r) {
        const Vec<float> g = grad_at(r, c), product = g * normal(r, c);
        weight_grad += product, bias_grad += g;
        level[r] += g * w, slope[r] += product * w;
      }
      store(weight_sum, weight_grad), store(bias_sum, bias_grad);
    });
    float m[R], correlation[R];
    for (int r = 0; r < R; ++r) m[r] = average(level[r]), correlation[r] = average(slope[r]);
    for_each([&](int64_t c) {
      const Vec<float> w = weight(c);
      for (int r = 0; r < R; ++r) {
        Vec<float> x = (grad_at(r, c) * w - m[r] - normal(r, c) * correlation[r]) * call_.inverse[first_ + r];
        if (start != nullptr) x += load(row_of(start, r) + c);
        store(row_of(x_grad, r) + c, x);
      }
    });
  }

 private:
  template <class F>
  void for_each(F f) const {
    for (int64_t c = 0; c < call_.channels; c += kLane) f(c);
  }
  template <class Map>
  Map* row_of(Map* map, int r) const {
    return map + call_.chosen.row(first_ + r) * call_.channels;
  }
  float average(Vec<float> sum) const { return sum_of_lanes<float>(sum) / static_cast<float>(call_.channels); }
  Vec<float> weight(int64_t c) const { return call_.weight == nullptr ? broadcast(1.0f) : load(call_.weight + c); }
  Vec<float> normal(int r, int64_t c) const {
    return (load(x_[r] + c) - call_.mean[first_ + r]) * call_.inverse[first_ + r];
  }

  const LayerNorm& call_;
  int64_t first_;
  const float* x_[R];
};

// Calls f(LayerNormRows) on the rows [begin, end).
template <class F>
void for_layer_norm_rows(const LayerNorm& call, int64_t begin, int64_t end, F f) {
  constexpr int kTogether = 4;
  for (; begin + kTogether <= end; begin += kTogether) f(LayerNormRows<kTogether>(call, begin));
  for (; begin < end; ++begin) f(LayerNormRows<1>(call, begin));
}

void layer_norm_forward(const LayerNorm& call, float* out) {
  constexpr int64_t kGrain = 16384;  // enough values for a thread to be worth its start
  parallel_for(call.rows, parts(kGrain, call.channels), [&](int64_t begin, int64_t end) {
    for_layer_norm_rows(call, begin, end, [&](const auto& rows) { rows.forward(out); });
  });
}

void layer_norm_backward(const LayerNorm& call, const float* grad, const float* start, float* x_grad, float* sums,
                         int64_t splits) {
  parallel_for(splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t split = begin; split < end; ++split) {
      float* sum = sums + split * 2 * call.channels;
      std::fill_n(sum, 2 * call.channels, 0.0f);
      for_layer_norm_rows(call, call.rows * split / splits, call.rows * (split + 1) / splits,
                          [&](const auto& rows) { rows.backward(grad, start, x_grad, sum); });
    }
  });
}

}  // namespace

extern const LayerNormKernels layer_norm_kernels = {layer_norm_forward, layer_norm_backward};

}  // namespace vitfast::cpu::VITFAST_ISA
