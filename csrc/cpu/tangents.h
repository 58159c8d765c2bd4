// Tangents of attention and of its gradients, many at a time: the calls of both kernels.
#pragma once

#include <cstdint>

namespace vitfast::cpu {

// Tensors of one shape, `step` elements apart. Null stands for zeros, or for a result that is not wanted.
template <class View>
struct Batch {
  View view{};
  int64_t step = 0;

  explicit operator bool() const { return view.data != nullptr; }
};

// Of `count` tangents of (query, key, value, bias, grad) at once: the tangents of the output, and of the gradients that
// the output's gradient `grad` leads to.
template <class Problem, class View, class Bias>
struct TangentsCall {
  Problem problem;
  int64_t count;
  View query, key, value, grad;
  Batch<View> query_t, key_t, value_t, grad_t;
  Batch<Bias> bias_t;
  Batch<View> out_t, query_grad_t, key_grad_t, value_grad_t;
  // Sums of the scores' gradients' tangents, (count, biases, splits, size of a bias) in the computing dtype, or null.
  void* bias_grad_t;
  int64_t splits;

  // What of the results is not zero.
  bool changes_scores() const { return query_t || key_t || bias_t; }
  bool changes_output() const { return changes_scores() || value_t; }
  bool changes_scores_grad() const { return changes_output() || grad_t; }
  bool changes_query_grad() const { return changes_scores_grad() || key_t; }
  bool changes_key_grad() const { return changes_scores_grad() || query_t; }
  bool changes_value_grad() const { return changes_scores() || grad_t; }
};

}  // namespace vitfast::cpu
