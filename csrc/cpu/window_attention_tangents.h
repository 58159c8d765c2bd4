// Tangents of window attention: see attention_tangents.h. The tokens of a window are rows, as in
// window_attention_tokens.h; maps whose channels are not adjacent are best made so before.
#pragma once

#include "cpu/attention_tangents.h"
#include "cpu/window_attention_tokens.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// The bias of one window, and of all its tangents, and the sums of their gradients' tangents.
template <class T>
class WindowBiasTangents {
 public:
  WindowBiasTangents(const WindowAttentionTangents& call, const Walk<T>& walk, Arena& arena)
      : has_bias_(call.problem.bias != nullptr),
        bias_(walk, true, arena),
        transposed_(has_bias_ ? kKeysOfBias : 0, kTileVectors * kLanes<T>, arena),
        grad_rows_(call.bias_grad_t == nullptr ? 0 : walk.most_queries, walk.padded_keys, arena) {
    for (int64_t k = 0; k < call.count; ++k) {
      if (call.bias_t) {
        const T* tangent = static_cast<const T*>(call.bias_t.view.data) + k * call.bias_t.step;
        tangents_.emplace_back(walk, tangent, true, arena);
      }
      if (call.bias_grad_t != nullptr) grads_t_.emplace_back(walk, true, arena);
    }
  }

  std::vector<BiasGrad<T>>& grads_t() { return grads_t_; }

  void select(int64_t head, const Tokens& queries, const Tokens& keys) {
    if (has_bias_) bias_.select(head, queries, keys);
    for (WindowBias<T>& tangent : tangents_) tangent.select(head, queries, keys);
    for (BiasGrad<T>& grad_t : grads_t_) grad_t.select(queries, keys);
  }

  Rows<const T> rows(const QueryBlock& block, int64_t first, int64_t keys) const {
    return has_bias_ ? transposed(bias_, block, first, keys) : Rows<const T>{};
  }
  Rows<const T> tangent(int64_t k, const QueryBlock& block, int64_t first, int64_t keys) const {
    return transposed(tangents_[k], block, first, keys);
  }
  void add_grad_t(int64_t k, const QueryBlock& block, const Matrix<T>& scores_grad_t, int64_t keys) const {
    transpose_rows<T>([&](int64_t j) { return scores_grad_t.row(j); }, keys, block.count, grad_rows_.row(block.first),
                      grad_rows_.columns());
    grads_t_[k].add(grad_rows_, block.first, block.count, Columns<T>(keys));
  }

 private:
  Rows<const T> transposed(const WindowBias<T>& bias, const QueryBlock& block, int64_t first, int64_t keys) const {
    const Rows<const T> rows = bias.rows();
    transpose_rows<T>([&](int64_t i) { return rows.row(block.first + i) + first; }, block.count, keys,
                      transposed_.row(0), transposed_.columns());
    return transposed_.rows();
  }

  bool has_bias_;
  WindowBias<T> bias_;
  std::vector<WindowBias<T>> tangents_;
  std::vector<BiasGrad<T>> grads_t_;
  Matrix<T> transposed_;  // [keys][queries]
  Matrix<T> grad_rows_;   // dS., [queries][keys]
};

template <class S>
class WindowTangents {
 public:
  using T = Compute<S>;
  using Tasks = WindowTasks<T>;

  WindowTangents(const WindowAttentionTangents& call, const Walk<T>& walk, Arena arena)
      : walk_(walk),
        head_(call, walk.most_queries, walk.most_keys, arena),
        bias_(call, walk, arena),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  static int64_t heads_in_turn(const WindowAttentionTangents&) { return 1; }
  std::vector<BiasGrad<T>>& bias_grads_t() { return bias_.grads_t(); }

  void operator()(const Item& item, const Item&) {
    const Tokens queries = walk_.queries(item.row, item.column), keys = walk_.keys(item.row, item.column);
    bias_.select(item.head, queries, keys);
    const auto select = [&](TokenRows<S>& rows, bool of_queries) { rows.select(item, of_queries ? queries : keys); };
    head_(queries.count(), keys.count(), select, bias_, [] {});
  }

 private:
  const Walk<T>& walk_;
  HeadTangents<TokenRows<S>> head_;
  WindowBiasTangents<T> bias_;
  int64_t bytes_;
};

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
