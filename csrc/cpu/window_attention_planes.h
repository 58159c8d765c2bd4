// One window of one head, its channels as planes, [D][tokens]: for channels-first maps.
//
// The vectors of all products run along tokens, as the maps do, so that no map is transposed:
//
//   S^T = K Q^T      from the planes of K and Q          O^T = V^T P^T         dQ^T = scale K^T dS^T
//   dP^T = V G^T     from the planes of V and G          dK^T = scale Q^T dS   dV^T = G^T P
//
// The scores stand transposed, [keys][queries]: the softmax then runs down the columns, lane by lane, and P^T is what
// the output needs. Only the backward transposes, P and dS in scratch. A lone token (see Columns) is a lone column of
// every product: the lone query of S^T, O^T and dQ^T, the lone key of dK^T and dV^T.
#pragma once

#include "cpu/window_attention_scores.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// Strips of windows, as tasks. A strip is long enough that its rows fill cache lines, and short enough for the cache.
template <class T>
class StripTasks {
 public:
  explicit StripTasks(const Walk<T>& walk) : StripTasks(walk, most_windows(walk)) {}
  StripTasks(const Walk<T>& walk, int64_t windows_together)
      : columns_(walk.problem.columns), rows_(walk.window_rows), most_windows_(windows_together), grain_(walk.grain()) {
    const int64_t count = walk.window_columns;
    const bool cut_first = width(0) != columns_.window, cut_last = count > 1 && width(count - 1) != columns_.window;
    whole_first_ = cut_first ? 1 : 0;
    whole_count_ = count - whole_first_ - (cut_last ? 1 : 0);
    whole_strips_ = parts(whole_count_, most_windows_);
    strips_ = whole_first_ + whole_strips_ + (cut_last ? 1 : 0);
  }

  static int64_t most_windows(const Walk<T>& walk) {
    constexpr int64_t kTokens = 256;
    return std::clamp<int64_t>(kTokens / walk.most_queries, 1, walk.window_columns);
  }

  int64_t per_map() const { return rows_ * strips_; }
  int64_t grain() const { return parts(grain_, most_windows_); }
  Strip task(int64_t batch, int64_t head, int64_t index) const {
    const int64_t row = index / strips_, strip = index % strips_, whole = strip - whole_first_;
    if (whole < 0) return {batch, head, row, 0, 1};
    if (whole >= whole_strips_) return {batch, head, row, whole_first_ + whole_count_, 1};
    const int64_t begin = whole_count_ * whole / whole_strips_, end = whole_count_ * (whole + 1) / whole_strips_;
    return {batch, head, row, whole_first_ + begin, end - begin};
  }

 private:
  int64_t width(int64_t column) const { return columns_.queries(column).size; }

  Axis columns_;
  int64_t rows_, most_windows_, grain_;
  int64_t whole_first_, whole_count_, whole_strips_, strips_;  // whole windows of a row, and the strips that hold them
};

// What the planes of one window need besides the maps.
template <class T>
class PlaneProducts {
 public:
  PlaneProducts(const Walk<T>& walk, Arena& arena)
      : dim_(walk.problem.dim),
        scale_(static_cast<T>(walk.problem.scale)),
        last_token_(arena.take<T>(round_up(dim_, kLanes<T>))),
        other_last_token_(arena.take<T>(round_up(dim_, kLanes<T>))) {
    if (!arena.holds_memory()) return;
    std::fill_n(last_token_, round_up(dim_, kLanes<T>), T{0});
    std::fill_n(other_last_token_, round_up(dim_, kLanes<T>), T{0});
  }

  T scale() const { return scale_; }

  // The lone key's column of Q K^T, for all queries: out [queries].
  template <class S>
  void lone_column(const TokenPlanes<S>& query, const Columns<T>& queries, const TokenPlanes<S>& key, int64_t last_key,
                   T* out) const {
    static constexpr int64_t kZero = 0;
    Rows<const T> lone_key = key.transposed();
    lone_key.data += last_key;
    gemm<T>(1, queries.vectors, {dim_, lone_key, 0, query.rows(), {out, &kZero, 1}, 0, T{1}});
    if (!queries.lone) return;
    const Rows<const T> lone_query = query.transposed();
    for (int64_t d = 0; d < dim_; ++d) {
      last_token_[d] = lone_key.data[d * lone_key.step];
      other_last_token_[d] = lone_query.data[queries.last() + d * lone_query.step];
    }
    Vec<T> sum{};
    for (int64_t d = 0; d < dim_; d += kLanes<T>) sum += load(last_token_ + d) * load(other_last_token_ + d);
    T corner{};
    for (int l = 0; l < kLanes<T>; ++l) corner += sum[l];
    out[queries.last()] = corner;
  }

  // planes = alpha a b, [D][columns] = [D][depth] [depth][columns]; `lone` holds the lone column of b, [depth] and
  // zeros up to a whole vector.
  void product(Rows<const T> a, int64_t depth, Rows<const T> b, const Columns<T>& columns, const T* lone, T alpha,
               Rows<T> planes) const {
    gemm<T>(dim_, columns.vectors, {depth, a, 0, b, planes, 0, alpha});
    if (!columns.lone) return;
    for_each_block(dim_, [&](int64_t first, int64_t height) {
      const BlockValues<T> dots = row_dots<T>(a, first, height, depth, lone);
      for (int64_t r = 0; r < height; ++r) planes.row(first + r)[columns.last()] = alpha * dots[r];
    });
  }

 private:
  int64_t dim_;
  T scale_;
  T *last_token_, *other_last_token_;  // [D]
};

// The bias of one head as the current window sees it, transposed: rows of keys, columns of queries.
template <class T>
class TransposedBias {
 public:
  TransposedBias(const Walk<T>& walk, Arena& arena)
      : problem_(walk.problem),
        rows_(walk, false, arena),
        copy_(walk.most_keys, round_up(walk.most_queries, kLanes<T>), arena),
        lone_query_(arena.take<T>(walk.padded_keys)) {}

  void select(int64_t head, const Tokens& queries, const Tokens& keys) {
    if (problem_.bias == nullptr) return;
    const int64_t bias_head = problem_.bias_shared ? 0 : head;
    const int kind = window_kind(problem_, queries);
    if (bias_head == head_ && kind == kind_) return;
    head_ = bias_head;
    kind_ = kind;
    rows_.select(head, queries, keys);
    const Rows<const T> rows = rows_.rows();
    const int64_t n = queries.count(), m = keys.count();
    transpose_rows<T>([&](int64_t i) { return rows.row(i); }, Columns<T>(n).in_vectors(), m, copy_.row(0),
                      copy_.columns());
    std::copy_n(rows.row(n - 1), m, lone_query_);
  }

  // Nothing if there is no bias.
  Rows<const T> rows() const { return problem_.bias == nullptr ? Rows<const T>{} : Rows<const T>(copy_.rows()); }
  // The last query's scores, [keys].
  const T* last_query() const { return problem_.bias == nullptr ? nullptr : lone_query_; }

 private:
  const WindowAttentionProblem& problem_;
  WindowBias<T> rows_;
  Matrix<T> copy_;
  T* lone_query_;
  int64_t head_ = -1;
  int kind_ = -1;  // of the window that the copy was made for
};

// scores <- scale scores + bias, and -inf behind the last key, up to a whole vector.
template <class T>
void finish_lone_query(T* scores, T scale, const T* bias, int64_t keys) {
  for (int64_t j = 0; j < keys; ++j) scores[j] = scores[j] * scale + (bias == nullptr ? T{0} : bias[j]);
  std::fill(scores + keys, scores + round_up(keys, kLanes<T>), -std::numeric_limits<T>::infinity());
}

// S^T <- P^T = softmax over the keys, down the columns; `lone` is the lone query's column, with -inf behind the last
// key. lse [queries] is written if not null.
template <class T>
void softmax_columns(const Matrix<T>& scores, int64_t keys, const Columns<T>& queries, T* lone, T* lse) {
  constexpr int L = kLanes<T>;
  for (int64_t column = 0; column < queries.width(); column += L) {
    Vec<T> top = load(scores.row(0) + column);
    for (int64_t j = 1; j < keys; ++j) top = max<T>(top, load(scores.row(j) + column));
    Vec<T> sum{};
    for (int64_t j = 0; j < keys; ++j) {
      T* at = scores.row(j) + column;
      const Vec<T> p = exp2_nonpositive<T>((load(at) - top) * kLog2E<T>);
      store(at, p);
      sum += p;
    }
    const Vec<T> factor = T{1} / sum;
    for (int64_t j = 0; j < keys; ++j) {
      T* at = scores.row(j) + column;
      store(at, load(at) * factor);
    }
    if (lse != nullptr) store(lse + column, top + log_positive<T>(sum));
  }
  if (!queries.lone) return;
  T top = lone[0];
  for (int64_t j = 1; j < keys; ++j) top = lone[j] > top || lone[j] != lone[j] ? lone[j] : top;
  Vec<T> sums{};
  for (int64_t j = 0; j < keys; j += L) {
    const Vec<T> p = exp2_nonpositive<T>((load(lone + j) - top) * kLog2E<T>);
    store(lone + j, p);
    sums += p;
  }
  const T sum = sum_of_lanes<T>(sums), factor = T{1} / sum;
  for (int64_t j = 0; j < keys; j += L) store(lone + j, load(lone + j) * factor);
  if (lse != nullptr) lse[queries.last()] = top + log_positive<T>(broadcast(sum))[0];
}

// S^T <- P^T = exp(S^T - lse) and dP^T <- dS^T = P^T (dP^T - colsum(P^T dP^T)); `lone` and `lone_grad` are the lone
// query's columns. As in `softmax_backward`, P is divided by its sum.
template <class T>
void softmax_columns_backward(const Matrix<T>& scores, const Matrix<T>& scores_grad, int64_t keys,
                              const Columns<T>& queries, const T* lse, T* lone, T* lone_grad) {
  constexpr int L = kLanes<T>;
  for (int64_t column = 0; column < queries.width(); column += L) {
    const Vec<T> column_lse = load(lse + column);
    Vec<T> sum{}, product{};
    for (int64_t j = 0; j < keys; ++j) {
      T* at = scores.row(j) + column;
      const Vec<T> p = exp2_nonpositive<T>((load(at) - column_lse) * kLog2E<T>);
      store(at, p);
      sum += p;
      product += p * load(scores_grad.row(j) + column);
    }
    const Vec<T> factor = T{1} / sum, delta = product / sum;
    for (int64_t j = 0; j < keys; ++j) {
      T *at = scores.row(j) + column, *at_grad = scores_grad.row(j) + column;
      const Vec<T> p = load(at) * factor;
      store(at, p);
      store(at_grad, p * (load(at_grad) - delta));
    }
  }
  if (!queries.lone) return;
  const T lone_lse = lse[queries.last()];
  Vec<T> sums{}, products{};
  for (int64_t j = 0; j < keys; j += L) {
    const Vec<T> p = exp2_nonpositive<T>((load(lone + j) - lone_lse) * kLog2E<T>);
    store(lone + j, p);
    sums += p;
    products += p * load(lone_grad + j);
  }
  const T sum = sum_of_lanes<T>(sums), delta = sum_of_lanes<T>(products) / sum;
  for (int64_t j = 0; j < keys; j += L) {
    const Vec<T> p = load(lone + j) / sum;
    store(lone + j, p);
    store(lone_grad + j, p * (load(lone_grad + j) - delta));
  }
}

template <class S>
class ForwardPlanes {
 public:
  using T = Compute<S>;
  using Tasks = StripTasks<T>;

  ForwardPlanes(const WindowAttentionForward& call, const Walk<T>& walk, Arena arena)
      : walk_(walk),
        lse_(static_cast<T*>(call.lse)),
        query_(call.query, walk.problem.dim, walk.most_queries, Tasks::most_windows(walk), arena),
        key_(call.key, walk.problem.dim, walk.most_keys, Tasks::most_windows(walk), arena),
        value_(call.value, walk.problem.dim, walk.most_keys, Tasks::most_windows(walk), arena),
        out_(call.out, walk.problem.dim, walk.most_queries, Tasks::most_windows(walk), arena),
        bias_(walk, arena),
        products_(walk, arena),
        scores_(walk.most_keys, round_up(walk.most_queries, kLanes<T>), arena),
        lone_query_(arena.take<T>(walk.padded_keys)),
        window_lse_(arena.take<T>(round_up(walk.most_queries, kLanes<T>))),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  // Meanwhile it prefetches what `next` will need, and where the output will go.
  void operator()(const Strip& strip, const Strip& next) {
    const Tokens query_tokens = walk_.queries(strip.row, strip.column),
                 key_tokens = walk_.keys(strip.row, strip.column);
    for (TokenPlanes<S>* map : {&query_, &out_}) map->select(strip, query_tokens);
    for (TokenPlanes<S>* map : {&key_, &value_}) map->select(strip, key_tokens);
    bias_.select(strip.head, query_tokens, key_tokens);
    for (TokenPlanes<S>* map : {&query_, &key_, &value_}) map->gather();
    const Tokens next_queries = walk_.queries(next.row, next.column), next_keys = walk_.keys(next.row, next.column);
    const int64_t steps = strip.windows * (parts(key_tokens.count(), kBlockRows) + 1);
    Prefetch prefetch[] = {query_.prefetch(next, next_queries, steps), key_.prefetch(next, next_keys, steps),
                           value_.prefetch(next, next_keys, steps), out_.prefetch(strip, query_tokens, steps)};
    const Columns<T> queries(query_tokens.count()), keys(key_tokens.count());
    for (int64_t window = 0; window < strip.windows; ++window) {
      for (TokenPlanes<S>* map : {&query_, &key_, &value_, &out_}) map->select_window(window);
      attend(queries, keys, [&] {
        for (Prefetch& map : prefetch) map.advance(false);
      });
      if (lse_ != nullptr) {
        walk_.scatter_statistics(strip.batch, strip.head, walk_.queries(strip.row, strip.column + window), window_lse_,
                                 lse_);
      }
    }
    out_.scatter();
  }

 private:
  // Calls `meanwhile` after every block of keys and once more.
  template <class F>
  void attend(const Columns<T>& queries, const Columns<T>& keys, F meanwhile) {
    const int64_t dim = walk_.problem.dim;
    for_each_block(keys.count, [&](int64_t first, int64_t height) {
      gemm<T>(height, queries.vectors,
              {dim, key_.transposed(), first, query_.rows(), scores_.rows(), first, products_.scale(), nullptr,
               bias_.rows(), first});
      meanwhile();
    });
    if (queries.lone) {
      products_.lone_column(key_, keys, query_, queries.last(), lone_query_);
      finish_lone_query(lone_query_, products_.scale(), bias_.last_query(), keys.count);
    }
    softmax_columns(scores_, keys.count, queries, lone_query_, lse_ == nullptr ? nullptr : window_lse_);
    meanwhile();
    products_.product(value_.rows(), keys.count, scores_.rows(), queries, lone_query_, T{1}, out_.rows());
  }

  const Walk<T>& walk_;
  T* lse_;
  TokenPlanes<S> query_, key_, value_, out_;
  TransposedBias<T> bias_;
  PlaneProducts<T> products_;
  Matrix<T> scores_;  // S^T and P^T, [keys][queries but the lone one]
  T* lone_query_;     // [keys], of P
  T* window_lse_;     // [queries]
  int64_t bytes_;
};

template <class S>
class BackwardPlanes {
 public:
  using T = Compute<S>;
  using Tasks = StripTasks<T>;

  BackwardPlanes(const WindowAttentionBackward& call, const Walk<T>& walk, Arena arena)
      : walk_(walk),
        lse_(static_cast<const T*>(call.lse)),
        grad_(call.grad, walk.problem.dim, walk.most_queries, Tasks::most_windows(walk), arena),
        query_(call.query, walk.problem.dim, walk.most_queries, Tasks::most_windows(walk), arena),
        key_(call.key, walk.problem.dim, walk.most_keys, Tasks::most_windows(walk), arena),
        value_(call.value, walk.problem.dim, walk.most_keys, Tasks::most_windows(walk), arena),
        grad_query_(call.grad_query, walk.problem.dim, walk.most_queries, Tasks::most_windows(walk), arena),
        grad_key_(call.grad_key, walk.problem.dim, walk.most_keys, Tasks::most_windows(walk), arena),
        grad_value_(call.grad_value, walk.problem.dim, walk.most_keys, Tasks::most_windows(walk), arena),
        bias_(walk, arena),
        bias_grad_(walk, call.bias_grad != nullptr, arena),
        wants_bias_grad_(call.bias_grad != nullptr),
        products_(walk, arena),
        transposed_(walk.most_keys, round_up(walk.most_queries, kLanes<T>), arena),
        transposed_grad_(walk.most_keys, round_up(walk.most_queries, kLanes<T>), arena),
        rows_(walk.most_queries, walk.padded_keys, arena),
        lone_query_(arena.take<T>(walk.padded_keys)),
        lone_query_grad_(arena.take<T>(walk.padded_keys)),
        lone_key_(arena.take<T>(round_up(walk.most_queries, kLanes<T>))),
        window_lse_(arena.take<T>(round_up(walk.most_queries, kLanes<T>))),
        bytes_(arena.used()) {
    if (arena.holds_memory()) std::fill_n(window_lse_, round_up(walk.most_queries, kLanes<T>), T{0});
  }

  int64_t bytes() const { return bytes_; }

  static int64_t heads_in_turn(const WindowAttentionBackward&) { return 1; }  // their planes lie far apart
  BiasGrad<T>& bias_grad(int64_t) { return bias_grad_; }

  void operator()(const Strip& strip, const Strip& next) {
    const Tokens query_tokens = walk_.queries(strip.row, strip.column),
                 key_tokens = walk_.keys(strip.row, strip.column);
    for (TokenPlanes<S>* map : {&grad_, &query_, &grad_query_}) map->select(strip, query_tokens);
    for (TokenPlanes<S>* map : {&key_, &value_, &grad_key_, &grad_value_}) map->select(strip, key_tokens);
    bias_.select(strip.head, query_tokens, key_tokens);
    for (TokenPlanes<S>* map : {&grad_, &query_, &key_, &value_}) map->gather();
    const Tokens next_queries = walk_.queries(next.row, next.column), next_keys = walk_.keys(next.row, next.column);
    const int64_t steps = strip.windows * (parts(key_tokens.count(), kBlockRows) + 3);
    Prefetch prefetch[] = {grad_.prefetch(next, next_queries, steps),
                           query_.prefetch(next, next_queries, steps),
                           key_.prefetch(next, next_keys, steps),
                           value_.prefetch(next, next_keys, steps),
                           grad_query_.prefetch(strip, query_tokens, steps),
                           grad_key_.prefetch(strip, key_tokens, steps),
                           grad_value_.prefetch(strip, key_tokens, steps)};
    const Columns<T> queries(query_tokens.count()), keys(key_tokens.count());
    for (int64_t window = 0; window < strip.windows; ++window) {
      for (TokenPlanes<S>* map : {&grad_, &query_, &key_, &value_, &grad_query_, &grad_key_, &grad_value_}) {
        map->select_window(window);
      }
      walk_.gather_statistics(strip.batch, strip.head, walk_.queries(strip.row, strip.column + window), lse_,
                              window_lse_);
      if (wants_bias_grad_) bias_grad_.select(query_tokens, key_tokens);
      differentiate(queries, keys, [&] {
        for (Prefetch& map : prefetch) map.advance(false);
      });
    }
    for (TokenPlanes<S>* map : {&grad_query_, &grad_key_, &grad_value_}) map->scatter();
  }

 private:
  // Calls `meanwhile` after every block of keys and three times more.
  template <class F>
  void differentiate(const Columns<T>& queries, const Columns<T>& keys, F meanwhile) {
    const int64_t n = queries.count, m = keys.count, dim = walk_.problem.dim;
    for_each_block(m, [&](int64_t first, int64_t height) {
      gemm<T>(height, queries.vectors,
              {dim, key_.transposed(), first, query_.rows(), transposed_.rows(), first, products_.scale(), nullptr,
               bias_.rows(), first});
      gemm<T>(height, queries.vectors,
              {dim, value_.transposed(), first, grad_.rows(), transposed_grad_.rows(), first, T{1}});
      meanwhile();
    });
    if (queries.lone) {
      products_.lone_column(key_, keys, query_, queries.last(), lone_query_);
      finish_lone_query(lone_query_, products_.scale(), bias_.last_query(), m);
      products_.lone_column(value_, keys, grad_, queries.last(), lone_query_grad_);
      std::fill(lone_query_grad_ + m, lone_query_grad_ + round_up(m, kLanes<T>), T{0});
    }
    softmax_columns_backward(transposed_, transposed_grad_, m, queries, window_lse_, lone_query_, lone_query_grad_);
    meanwhile();
    products_.product(key_.rows(), m, transposed_grad_.rows(), queries, lone_query_grad_, products_.scale(),
                      grad_query_.rows());
    meanwhile();
    product_over_queries(query_, transposed_grad_, lone_query_grad_, queries, keys, products_.scale(), grad_key_);
    if (wants_bias_grad_) bias_grad_.add(rows_, 0, n, keys);
    meanwhile();
    product_over_queries(grad_, transposed_, lone_query_, queries, keys, T{1}, grad_value_);
  }

  // result = alpha a x, [D][keys] = [D][queries] [queries][keys]; x is given transposed, the lone query apart, and is
  // left in rows_.
  void product_over_queries(const TokenPlanes<S>& a, const Matrix<T>& transposed, const T* lone_query,
                            const Columns<T>& queries, const Columns<T>& keys, T alpha, const TokenPlanes<S>& result) {
    const int64_t n = queries.count, m = keys.count;
    transpose_rows<T>([&](int64_t j) { return transposed.row(j); }, keys.in_vectors(), queries.in_vectors(),
                      rows_.row(0), rows_.columns());
    if (queries.lone) std::copy_n(lone_query, m, rows_.row(queries.last()));
    if (keys.lone) {
      const T* last = transposed.row(keys.last());
      for (int64_t i = 0; i < n; ++i) {
        lone_key_[i] = queries.lone && i == queries.last() ? lone_query[keys.last()] : last[i];
        rows_.row(i)[keys.last()] = lone_key_[i];
      }
      std::fill(lone_key_ + n, lone_key_ + round_up(n, kLanes<T>), T{0});
    }
    products_.product(a.rows(), n, rows_.rows(), keys, lone_key_, alpha, result.rows());
  }

  const Walk<T>& walk_;
  const T* lse_;
  TokenPlanes<S> grad_, query_, key_, value_, grad_query_, grad_key_, grad_value_;
  TransposedBias<T> bias_;
  BiasGrad<T> bias_grad_;
  bool wants_bias_grad_;
  PlaneProducts<T> products_;
  Matrix<T> transposed_, transposed_grad_;  // S^T and P^T, dP^T and dS^T, [keys][queries but the lone one]
  Matrix<T> rows_;                          // dS or P, [queries][keys]
  T *lone_query_, *lone_query_grad_;        // [keys], of P and dS
  T* lone_key_;                             // [queries], of dS or P
  T* window_lse_;                           // [queries]
  int64_t bytes_;
};

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
