// One window of one head, its tokens as rows, [tokens][D]: for maps whose heads and channels are innermost.
//
// K (in the backward V too) is transposed into scratch, [D][m], because the vectors of a tile of scores run along the
// keys; the other operands are used where they lie in the map if possible. Scores live in scratch: a block of rows in
// the forward, P and dS of one window in the backward.
#pragma once

#include "cpu/window_attention_scores.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// How many heads a backward takes in turn, window by window. Heads lie side by side in memory: in turn they share
// pages, and what processors fetch ahead by themselves. More gain no more, and each takes room for its bias and the sum
// of its gradients.
inline constexpr int64_t kHeadsInTurn = 3;

// Single windows, as tasks.
template <class T>
class WindowTasks {
 public:
  explicit WindowTasks(const Walk<T>& walk)
      : columns_(walk.window_columns), count_(walk.window_rows * columns_), grain_(walk.grain()) {}

  int64_t per_map() const { return count_; }
  int64_t grain() const { return grain_; }
  Item task(int64_t batch, int64_t head, int64_t index) const {
    return {batch, head, index / columns_, index % columns_};
  }

 private:
  int64_t columns_, count_, grain_;
};

// Whether the next window's operands go into the first-level cache. Beside those at work they have room in 48 KiB (30 %
// faster on a Zen 5), but not in 32 KiB (10 to 20 % slower on a Zen 4 than the second level).
inline bool prefetch_into_first_level() { return first_level_cache_bytes() > 32 << 10; }

template <class S>
class ForwardTokens {
 public:
  using T = Compute<S>;
  using Tasks = WindowTasks<T>;

  ForwardTokens(const WindowAttentionForward& call, const Walk<T>& walk, Arena arena)
      : walk_(walk),
        lse_(static_cast<T*>(call.lse)),
        query_(call.query, walk.problem.dim, walk.most_queries, arena),
        key_(call.key, walk.problem.dim, walk.most_keys, arena),
        value_(call.value, walk.problem.dim, walk.most_keys, arena),
        out_(call.out, walk.problem.dim, walk.most_queries, arena),
        bias_(walk, false, arena),
        key_transposed_(walk.problem.dim, Columns<T>(walk.most_keys).width(), arena),
        scores_(kBlockRows, walk.padded_keys, arena),
        lone_key_(arena.take<T>(round_up(walk.problem.dim, kLanes<T>))),
        window_lse_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        scale_(static_cast<T>(walk.problem.scale)),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  // Meanwhile it prefetches what `next` will read and write.
  void operator()(const Item& item, const Item& next) {
    const Tokens queries = walk_.queries(item.row, item.column), keys = walk_.keys(item.row, item.column);
    const Columns<T> columns(keys.count());
    const int64_t dim = walk_.problem.dim;
    query_.select(item, queries);
    key_.select(item, keys);
    value_.select(item, keys);
    out_.select(item, queries);
    bias_.select(item.head, queries, keys);
    const Tokens next_queries = walk_.queries(next.row, next.column), next_keys = walk_.keys(next.row, next.column);
    const int64_t steps = parts(queries.count(), kBlockRows);
    Prefetch prefetch[] = {query_.prefetch(next, next_queries, steps), key_.prefetch(next, next_keys, steps),
                           value_.prefetch(next, next_keys, steps), out_.prefetch(next, next_queries, steps)};
    query_.gather();
    key_.gather_transposed(columns.in_vectors(), key_transposed_.row(0), key_transposed_.columns());
    value_.gather();
    if (columns.lone) key_.gather_last(lone_key_);

    for_each_block(queries.count(), [&](int64_t first, int64_t height) {
      gemm<T>(
          height, columns.vectors,
          {dim, query_.rows(), first, key_transposed_.rows(), scores_.rows(), 0, scale_, nullptr, bias_.rows(), first});
      BlockValues<T> lone;
      if (columns.lone) {
        lone = row_dots<T>(query_.rows(), first, height, dim, lone_key_);
        add_bias(lone, scale_, bias_.lone() + first);
      }
      const SoftmaxStatistics<T> statistics = exponentiate(scores_, 0, height, columns, lone);
      BlockValues<T> factor;
      for_each_vector<T>([&](int i) {
        const Vec<T> sum = load(statistics.sum.data + i);
        store(factor.data + i, T{1} / sum);
        if (lse_ != nullptr) {
          store(window_lse_ + first + i, load(statistics.top.data + i) + log_positive<T>(sum));
        }
      });
      for (Prefetch& map : prefetch) map.advance(prefetch_into_first_level_);
      gemm<T>(height, parts(dim, kLanes<T>),
              {columns.count, scores_.rows(), 0, value_.rows(), out_.rows(), first, T{1}, factor.data});
    });
    out_.scatter();
    if (lse_ != nullptr) walk_.scatter_statistics(item.batch, item.head, queries, window_lse_, lse_);
  }

 private:
  const Walk<T>& walk_;
  T* lse_;
  TokenRows<S> query_, key_, value_, out_;
  WindowBias<T> bias_;
  Matrix<T> key_transposed_;  // [D][keys but the lone one]
  Matrix<T> scores_;          // [kBlockRows][keys]
  T* lone_key_;               // [D]
  T* window_lse_;             // [queries]
  T scale_;
  bool prefetch_into_first_level_ = prefetch_into_first_level();
  int64_t bytes_;
};

template <class S>
class BackwardTokens {
 public:
  using T = Compute<S>;
  using Tasks = WindowTasks<T>;

  BackwardTokens(const WindowAttentionBackward& call, const Walk<T>& walk, Arena arena)
      : walk_(walk),
        lse_(static_cast<const T*>(call.lse)),
        grad_(call.grad, walk.problem.dim, walk.most_queries, arena),
        query_(call.query, walk.problem.dim, walk.most_queries, arena),
        key_(call.key, walk.problem.dim, walk.most_keys, arena),
        value_(call.value, walk.problem.dim, walk.most_keys, arena),
        grad_query_(call.grad_query, walk.problem.dim, walk.most_queries, arena),
        grad_key_(call.grad_key, walk.problem.dim, walk.most_keys, arena),
        grad_value_(call.grad_value, walk.problem.dim, walk.most_keys, arena),
        wants_bias_grad_(call.bias_grad != nullptr),
        heads_(heads_of(call, walk, arena)),
        key_transposed_(walk.problem.dim, Columns<T>(walk.most_keys).width(), arena),
        value_transposed_(walk.problem.dim, Columns<T>(walk.most_keys).width(), arena),
        probabilities_(walk.most_queries, walk.padded_keys, arena),
        scores_grad_(walk.most_queries, walk.padded_keys, arena),
        lone_key_(arena.take<T>(round_up(walk.problem.dim, kLanes<T>))),
        lone_value_(arena.take<T>(round_up(walk.problem.dim, kLanes<T>))),
        window_lse_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        scale_(static_cast<T>(walk.problem.scale)),
        bytes_(arena.used()) {
    if (arena.holds_memory()) {
      std::fill_n(window_lse_, walk.most_queries + kBlockValues<T>, T{0});
    }
  }

  int64_t bytes() const { return bytes_; }

  static int64_t heads_in_turn(const WindowAttentionBackward& call) {
    return call.bias_grad == nullptr ? 1 : std::min(call.problem.heads, kHeadsInTurn);
  }
  // Of one of the heads that are taken in turn.
  BiasGrad<T>& bias_grad(int64_t head) { return of_head(head).bias_grad; }

  void operator()(const Item& item, const Item& next) {
    const Tokens queries = walk_.queries(item.row, item.column), keys = walk_.keys(item.row, item.column);
    const int64_t n = queries.count(), m = keys.count();
    const Columns<T> columns(m);
    const int64_t dim = walk_.problem.dim, dim_vectors = parts(dim, kLanes<T>);
    for (TokenRows<S>* operand : {&grad_, &query_, &grad_query_}) operand->select(item, queries);
    for (TokenRows<S>* operand : {&key_, &value_, &grad_key_, &grad_value_}) operand->select(item, keys);
    WindowBias<T>& bias = of_head(item.head).bias;
    BiasGrad<T>& bias_grad = of_head(item.head).bias_grad;
    bias.select(item.head, queries, keys);
    if (wants_bias_grad_) bias_grad.select(queries, keys);
    const Tokens next_queries = walk_.queries(next.row, next.column), next_keys = walk_.keys(next.row, next.column);
    const int64_t steps = parts(n, kBlockRows);
    Prefetch prefetch[] = {grad_.prefetch(next, next_queries, steps),       query_.prefetch(next, next_queries, steps),
                           key_.prefetch(next, next_keys, steps),           value_.prefetch(next, next_keys, steps),
                           grad_query_.prefetch(next, next_queries, steps), grad_key_.prefetch(next, next_keys, steps),
                           grad_value_.prefetch(next, next_keys, steps)};
    grad_.gather();
    query_.gather();
    key_.gather();
    key_.gather_transposed(columns.in_vectors(), key_transposed_.row(0), key_transposed_.columns());
    value_.gather_transposed(columns.in_vectors(), value_transposed_.row(0), value_transposed_.columns());
    if (columns.lone) {
      key_.gather_last(lone_key_);
      value_.gather_last(lone_value_);
    }
    walk_.gather_statistics(item.batch, item.head, queries, lse_, window_lse_);

    for_each_block(n, [&](int64_t first, int64_t height) {
      gemm<T>(height, columns.vectors,
              {dim, query_.rows(), first, key_transposed_.rows(), probabilities_.rows(), first, scale_, nullptr,
               bias.rows(), first});
      gemm<T>(height, columns.vectors,
              {dim, grad_.rows(), first, value_transposed_.rows(), scores_grad_.rows(), first, T{1}});
      BlockValues<T> lone, lone_grad, lse;
      if (columns.lone) {
        lone = row_dots<T>(query_.rows(), first, height, dim, lone_key_);
        add_bias(lone, scale_, bias.lone() + first);
        lone_grad = row_dots<T>(grad_.rows(), first, height, dim, lone_value_);
      }
      for_each_vector<T>([&](int i) { store(lse.data + i, load(window_lse_ + first + i)); });
      softmax_backward(probabilities_, scores_grad_, first, height, columns, lse, lone, lone_grad);
      if (wants_bias_grad_) bias_grad.add(scores_grad_, first, height, columns);
      for (Prefetch& map : prefetch) map.advance(prefetch_into_first_level_);
    });
    gemm<T>(n, dim_vectors, {m, scores_grad_.rows(), 0, key_.rows(), grad_query_.rows(), 0, scale_});
    gemm<T>(m, dim_vectors, {n, transposed(scores_grad_), 0, query_.rows(), grad_key_.rows(), 0, scale_});
    gemm<T>(m, dim_vectors, {n, transposed(probabilities_), 0, grad_.rows(), grad_value_.rows(), 0, T{1}});
    grad_query_.scatter();
    grad_key_.scatter();
    grad_value_.scatter();
  }

 private:
  struct HeadBias {
    WindowBias<T> bias;
    BiasGrad<T> bias_grad;
  };
  static std::vector<HeadBias> heads_of(const WindowAttentionBackward& call, const Walk<T>& walk, Arena& arena) {
    std::vector<HeadBias> heads;
    for (int64_t i = 0; i < heads_in_turn(call); ++i) {
      heads.push_back({{walk, true, arena}, {walk, call.bias_grad != nullptr, arena}});
    }
    return heads;
  }
  // Heads that are taken in turn follow one another.
  HeadBias& of_head(int64_t head) { return heads_[head % static_cast<int64_t>(heads_.size())]; }

  Rows<const T> transposed(const Matrix<T>& matrix) const { return {matrix.row(0), nullptr, matrix.columns()}; }

  const Walk<T>& walk_;
  const T* lse_;
  TokenRows<S> grad_, query_, key_, value_, grad_query_, grad_key_, grad_value_;
  bool wants_bias_grad_;
  std::vector<HeadBias> heads_;
  Matrix<T> key_transposed_, value_transposed_;  // [D][keys but the lone one]
  Matrix<T> probabilities_, scores_grad_;        // [queries][keys]
  T *lone_key_, *lone_value_;                    // [D]
  T* window_lse_;                                // [queries]
  T scale_;
  bool prefetch_into_first_level_ = prefetch_into_first_level();
  int64_t bytes_;
};

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
