// What the kernels for tangents of layer and batch normalisation share: a row of channels, and the runs of rows that
// threads take.
#pragma once

#include <algorithm>

#include "cpu/matrix.h"
#include "cpu/normalization_tangents.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

template <class T>
class NormalizationRow {
 protected:
  explicit NormalizationRow(const NormalizationTangents& call) : call_(call), channels_(call.channels) {}

  // Calls f(first channel, channels left) for every vector of a row.
  template <class F>
  void for_each(F f) const {
    for (int64_t c = 0; c < channels_; c += kLanes<T>) f(c, channels_ - c);
  }
  static void add(T* sums, int64_t c, int64_t n, Vec<T> x) { store_up_to(sums + c, load_up_to(sums + c, n) + x, n); }

  const T* at(const void* tensor, int64_t row) const { return static_cast<const T*>(tensor) + row * channels_; }
  const T* at(const void* tensor, int64_t k, int64_t row) const { return at(tensor, k * call_.rows + row); }
  T* at(void* tensor, int64_t k, int64_t row) const {
    return static_cast<T*>(tensor) + (k * call_.rows + row) * channels_;
  }
  Vec<T> weight(int64_t c, int64_t n) const {
    return call_.weight == nullptr ? broadcast(T{1}) : load_up_to(static_cast<const T*>(call_.weight) + c, n);
  }

  // h. = g. w + g w.
  Vec<T> weighted_grad_t(int64_t k, int64_t row, int64_t c, int64_t n) const {
    Vec<T> h{};
    if (call_.grad_t != nullptr) h += load_up_to(at(call_.grad_t, k, row) + c, n) * weight(c, n);
    if (call_.weight_t != nullptr)
      h += load_up_to(at(call_.grad, row) + c, n) * load_up_to(at(call_.weight_t, k) + c, n);
    return h;
  }
  // g.
  void add_bias_grad(int64_t k, int64_t row, T* sums) const {
    if (call_.grad_t == nullptr) return;
    const T* grad_t = at(call_.grad_t, k, row);
    for_each([&](int64_t c, int64_t n) { add(sums, c, n, load_up_to(grad_t + c, n)); });
  }

  const NormalizationTangents& call_;
  int64_t channels_;
};

// Calls a Row(call, arena) for all rows: (row, sums of the weight's gradients' tangents or null, the same of the bias).
template <class Row, class T>
void differentiate_rows(const NormalizationTangents& call) {
  const int64_t bytes = Row(call, Arena()).bytes(), sums = call.count * call.channels;
  parallel_for(call.splits, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    Row differentiate(call, Arena(scratch.data()));
    for (int64_t split = begin; split < end; ++split) {
      const auto sums_of = [&](void* all) { return all == nullptr ? nullptr : static_cast<T*>(all) + split * sums; };
      T *weight_sums = sums_of(call.weight_grad_t), *bias_sums = sums_of(call.bias_grad_t);
      for (T* zero : {weight_sums, bias_sums}) {
        if (zero != nullptr) std::fill_n(zero, sums, T{0});
      }
      const int64_t first = call.rows * split / call.splits, last = call.rows * (split + 1) / call.splits;
      for (int64_t row = first; row < last; ++row) differentiate(row, weight_sums, bias_sums);
    }
  });
}

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
