// What both operators for tangents of attention share: checks, and results that are zero.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/dispatch.h"
#include "cpu/tangents.h"

namespace vitfast::cpu {

using torch::stable::Tensor;

// Whether x is (count, *shape of `primal`), of this dtype.
inline bool is_batch_of(const Tensor& x, const Tensor& primal, ScalarType dtype, int64_t count) {
  if (x.dim() != primal.dim() + 1 || x.size(0) != count || x.scalar_type() != dtype) return false;
  for (int64_t i = 0; i < primal.dim(); ++i) {
    if (x.size(i + 1) != primal.size(i)) return false;
  }
  return true;
}

template <class Call>
bool wants_gradients(const Call& call, const std::optional<Tensor>& bias_grad_t) {
  return call.query_grad_t || call.key_grad_t || call.value_grad_t || bias_grad_t.has_value();
}

// Fills with zeros what does not depend on the tangents that are there, or everything if the call is `empty`, and takes
// it out of the call. Whether anything is left to compute.
template <class Call>
bool prepare_results(Call& call, bool empty, std::optional<Tensor>& out_t, std::optional<Tensor>& query_grad_t,
                     std::optional<Tensor>& key_grad_t, std::optional<Tensor>& value_grad_t,
                     std::optional<Tensor>& bias_grad_t) {
  const auto settle = [&](std::optional<Tensor>& result, bool changes) {
    if (!result.has_value() || (changes && !empty)) return result.has_value();
    torch::stable::zero_(*result);
    result.reset();
    return false;
  };
  const auto settle_batch = [&](auto& batch, std::optional<Tensor>& result, bool changes) {
    const bool left = settle(result, changes);
    if (!left) batch = {};
    return left;
  };
  bool left = settle_batch(call.out_t, out_t, call.changes_output());
  left |= settle_batch(call.query_grad_t, query_grad_t, call.changes_query_grad());
  left |= settle_batch(call.key_grad_t, key_grad_t, call.changes_key_grad());
  left |= settle_batch(call.value_grad_t, value_grad_t, call.changes_value_grad());
  left |= settle(bias_grad_t, call.changes_scores_grad());
  return left;
}

}  // namespace vitfast::cpu
