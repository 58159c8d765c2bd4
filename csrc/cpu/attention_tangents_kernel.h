// Tangents of attention over all tokens: see attention_tangents.h.
#pragma once

#include "cpu/attention_tangents.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// The bias of one head, and of all its tangents, and the sums of their gradients' tangents.
template <class T>
class SequenceBias {
 public:
  SequenceBias(const AttentionTangents& call, Arena& arena)
      : view_(call.problem.bias),
        keys_(call.problem.keys),
        bias_(view_, kKeysOfBias, arena),
        grad_rows_(call.bias_grad_t == nullptr ? 0 : kTileVectors * kLanes<T>, round_up(keys_, kLanes<T>), arena) {
    for (int64_t k = 0; call.bias_t && k < call.count; ++k) {
      BiasView view = call.bias_t.view;
      view.data = static_cast<const T*>(view.data) + k * call.bias_t.step;
      tangents_.emplace_back(view, kKeysOfBias, arena);
    }
  }

  // `sums`, (N or 1, M) of tangent 0, is what gradients' tangents are added to; those of the others are `step` apart.
  void select(int64_t batch, int64_t head, T* sums, int64_t step) {
    bias_.select(batch, head);
    for (ScoreBias<T>& tangent : tangents_) tangent.select(batch, head);
    sums_ = sums;
    step_ = step;
  }

  Rows<const T> rows(const QueryBlock& block, int64_t first, int64_t keys) { return bias_.rows(block, first, keys); }
  Rows<const T> tangent(int64_t k, const QueryBlock& block, int64_t first, int64_t keys) {
    return tangents_[k].rows(block, first, keys);
  }
  void add_grad_t(int64_t k, const QueryBlock& block, const Matrix<T>& scores_grad_t, int64_t keys) {
    transpose_rows<T>([&](int64_t j) { return scores_grad_t.row(j); }, keys, block.count, grad_rows_.row(0),
                      grad_rows_.columns());
    add_bias_rows(grad_rows_, 0, keys, block, view_.queries == 1 ? 0 : keys_, sums_ + k * step_);
  }

 private:
  BiasView view_;
  int64_t keys_;
  ScoreBias<T> bias_;
  std::vector<ScoreBias<T>> tangents_;
  Matrix<T> grad_rows_;  // dS., [queries][keys]
  T* sums_ = nullptr;
  int64_t step_ = 0;
};

template <class S>
class SequenceTangents {
 public:
  using T = Compute<S>;

  SequenceTangents(const AttentionTangents& call, Arena arena)
      : problem_(call.problem),
        head_(call, problem_.queries, problem_.keys, arena),
        bias_(call, arena),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  // Meanwhile it prefetches what `next` will read and write.
  void operator()(const Head& head, const Head& next, T* bias_sums, int64_t step) {
    bias_.select(head.batch, head.head, bias_sums, step);
    find_next(next);
    const auto select = [&](SequenceRows<S>& rows, bool of_queries) {
      rows.select(head.batch, head.head, 0, of_queries ? problem_.queries : problem_.keys);
    };
    head_(problem_.queries, problem_.keys, select, bias_, [&] {
      for (Prefetch& rows : next_) rows.advance(false);
    });
  }

 private:
  // If it has room in the second-level cache beside the head at work.
  void find_next(const Head& head) {
    constexpr int64_t kRoom = 448 << 10;
    const auto rows_of = [&](bool of_queries) { return of_queries ? problem_.queries : problem_.keys; };
    int64_t rows = 0;
    head_.for_each_operand([&](SequenceRows<S>&, bool of_queries) { rows += rows_of(of_queries); });
    next_.clear();
    if (rows * problem_.dim * static_cast<int64_t>(sizeof(S)) > kRoom) return;
    head_.for_each_operand([&](SequenceRows<S>& operand, bool of_queries) {
      next_.push_back(operand.prefetch(head, rows_of(of_queries), head_.pauses(problem_.queries)));
    });
  }

  const AttentionProblem& problem_;
  HeadTangents<SequenceRows<S>> head_;
  SequenceBias<T> bias_;
  std::vector<Prefetch> next_;
  int64_t bytes_;
};

template <class S>
void attention_tangents_of(const AttentionTangents& call) {
  using T = Compute<S>;
  const AttentionProblem& problem = call.problem;
  const int64_t bytes = SequenceTangents<S>(call, Arena()).bytes();
  const HeadRuns runs(problem, call.bias_grad_t != nullptr, call.splits);
  const int64_t bias_size = problem.bias.queries * problem.keys, step = runs.count() * bias_size;
  parallel_for(runs.count(), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    SequenceTangents<S> differentiate(call, Arena(scratch.data()));
    for (int64_t run = begin; run < end; ++run) {
      T* sums = call.bias_grad_t == nullptr ? nullptr : static_cast<T*>(call.bias_grad_t) + run * bias_size;
      for (int64_t k = 0; sums != nullptr && k < call.count; ++k) std::fill_n(sums + k * step, bias_size, T{0});
      runs.for_each_head(run, [&](const Head& head, const Head& next) { differentiate(head, next, sums, step); });
    }
  });
}

void attention_tangents(const AttentionTangents& call) {
  with_storage(call.problem.storage, [&](auto s) { attention_tangents_of<decltype(s)>(call); });
}

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
