// One window of one head, its channels as planes, [D][tokens]: for channels-first maps.
//
// The vectors of all products run along tokens, as the maps do, so that no map is transposed:
//
//   S = Q K^T        from the planes of Q and K          O^T = V^T P^T         dQ^T = scale K^T dS^T
//   dP = G V^T       from the planes of G and V          dK^T = scale Q^T dS   dV^T = G^T P
//
// Only P in the forward and dS in the backward are transposed, in scratch. A lone token (see Columns) is a lone column
// of every product here, of S for the keys and of O^T for the queries.
#pragma once

#include "cpu/window_attention_scores.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// Strips of windows, as tasks. A strip is long enough that its rows fill cache lines, and short enough for the cache.
template <class T>
class StripTasks {
 public:
  explicit StripTasks(const Walk<T>& walk)
      : columns_(walk.problem.columns),
        rows_(walk.window_rows),
        most_windows_(most_windows(walk)),
        grain_(walk.grain()) {
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
        probabilities_(walk.most_queries, walk.padded_keys, arena),
        transposed_(walk.most_keys, round_up(walk.most_queries, kLanes<T>), arena),
        lone_key_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        lone_query_(arena.take<T>(walk.padded_keys)),
        window_lse_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
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
    Prefetch prefetch[] = {query_.prefetch(next, next_queries), key_.prefetch(next, next_keys),
                           value_.prefetch(next, next_keys), out_.prefetch(strip, query_tokens)};
    const Columns<T> queries(query_tokens.count()), keys(key_tokens.count());
    probabilities_.set_columns(round_up(keys.count, kLanes<T>));
    transposed_.set_columns(queries.width());
    for (int64_t window = 0; window < strip.windows; ++window) {
      for (TokenPlanes<S>* map : {&query_, &key_, &value_, &out_}) map->select_window(window);
      attend(queries, keys, [&](int64_t done) {
        for (Prefetch& map : prefetch) map.advance<2>(window * queries.count + done, strip.windows * queries.count);
      });
      if (lse_ != nullptr) {
        walk_.scatter_statistics(strip.batch, strip.head, walk_.queries(strip.row, strip.column + window), window_lse_,
                                 lse_);
      }
    }
    out_.scatter();
  }

 private:
  // Calls `meanwhile` with the number of queries that are done, now and then.
  template <class F>
  void attend(const Columns<T>& queries, const Columns<T>& keys, F meanwhile) {
    const int64_t dim = walk_.problem.dim;
    if (keys.lone) products_.lone_column(query_, queries, key_, keys.last(), lone_key_);
    for_each_block(queries.count, [&](int64_t first, int64_t height) {
      gemm<T>(height, keys.vectors,
              {dim, query_.transposed(), first, key_.rows(), probabilities_.rows(), first, products_.scale(), nullptr,
               bias_.rows(), first});
      BlockValues<T> lone;
      if (keys.lone) {
        for_each_vector<T>([&](int i) { store(lone.data + i, load(lone_key_ + first + i)); });
        add_bias(lone, products_.scale(), bias_.lone() + first);
      }
      const SoftmaxStatistics<T> statistics = exponentiate(probabilities_, first, height, keys, lone);
      normalize(first, height, keys, statistics, lone);
      meanwhile(first + height);
    });
    transpose_rows<T>([&](int64_t i) { return probabilities_.row(i); }, queries.in_vectors(), keys.in_vectors(),
                      transposed_.row(0), queries.width());
    if (queries.lone) {
      std::copy_n(probabilities_.row(queries.last()), keys.count, lone_query_);
      std::fill(lone_query_ + keys.count, lone_query_ + round_up(keys.count, kLanes<T>), T{0});
    }
    products_.product(value_.rows(), keys.count, transposed_.rows(), queries, lone_query_, T{1}, out_.rows());
  }

  // Divides a block of rows by their sums; the lone key's column goes where the transposed matrix has it.
  void normalize(int64_t first, int64_t height, const Columns<T>& keys, const SoftmaxStatistics<T>& statistics,
                 const BlockValues<T>& lone) {
    BlockValues<T> factor;
    for_each_vector<T>([&](int i) {
      const Vec<T> sum = load(statistics.sum.data + i), inverse = T{1} / sum;
      store(factor.data + i, inverse);
      if (keys.lone) store(transposed_.row(keys.last()) + first + i, load(lone.data + i) * inverse);
      if (lse_ != nullptr) store(window_lse_ + first + i, load(statistics.top.data + i) + log_positive<T>(sum));
    });
    for (int64_t r = 0; r < height; ++r) {
      T* row = probabilities_.row(first + r);
      const Vec<T> inverse = broadcast(factor[r]);
      for (int64_t v = 0; v < keys.width(); v += kLanes<T>) store(row + v, load(row + v) * inverse);
      if (keys.lone) row[keys.last()] *= factor[r];
    }
  }

  const Walk<T>& walk_;
  T* lse_;
  TokenPlanes<S> query_, key_, value_, out_;
  WindowBias<T> bias_;
  PlaneProducts<T> products_;
  Matrix<T> probabilities_;  // [queries][keys]
  Matrix<T> transposed_;     // [keys][queries but the lone one]
  T* lone_key_;              // [queries], of Q K^T
  T* lone_query_;            // [keys], of P
  T* window_lse_;            // [queries]
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
        products_(walk, arena),
        probabilities_(walk.most_queries, walk.padded_keys, arena),
        scores_grad_(walk.most_queries, walk.padded_keys, arena),
        transposed_(walk.most_keys, round_up(walk.most_queries, kLanes<T>), arena),
        lone_key_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        lone_key_grad_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        lone_query_grad_(arena.take<T>(walk.padded_keys)),
        window_lse_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        bytes_(arena.used()) {
    if (arena.holds_memory()) std::fill_n(window_lse_, walk.most_queries + kBlockValues<T>, T{0});
  }

  int64_t bytes() const { return bytes_; }

  // bias_sum, if not null, is what the gradients of the scores are added to.
  void operator()(const Strip& strip, const Strip& next, T* bias_sum) {
    const Tokens query_tokens = walk_.queries(strip.row, strip.column),
                 key_tokens = walk_.keys(strip.row, strip.column);
    for (TokenPlanes<S>* map : {&grad_, &query_, &grad_query_}) map->select(strip, query_tokens);
    for (TokenPlanes<S>* map : {&key_, &value_, &grad_key_, &grad_value_}) map->select(strip, key_tokens);
    bias_.select(strip.head, query_tokens, key_tokens);
    for (TokenPlanes<S>* map : {&grad_, &query_, &key_, &value_}) map->gather();
    const Tokens next_queries = walk_.queries(next.row, next.column), next_keys = walk_.keys(next.row, next.column);
    Prefetch prefetch[] = {grad_.prefetch(next, next_queries),
                           query_.prefetch(next, next_queries),
                           key_.prefetch(next, next_keys),
                           value_.prefetch(next, next_keys),
                           grad_query_.prefetch(strip, query_tokens),
                           grad_key_.prefetch(strip, key_tokens),
                           grad_value_.prefetch(strip, key_tokens)};
    const Columns<T> queries(query_tokens.count()), keys(key_tokens.count());
    for (Matrix<T>* matrix : {&probabilities_, &scores_grad_}) matrix->set_columns(round_up(keys.count, kLanes<T>));
    transposed_.set_columns(queries.width());
    for (int64_t window = 0; window < strip.windows; ++window) {
      for (TokenPlanes<S>* map : {&grad_, &query_, &key_, &value_, &grad_query_, &grad_key_, &grad_value_}) {
        map->select_window(window);
      }
      walk_.gather_statistics(strip.batch, strip.head, walk_.queries(strip.row, strip.column + window), lse_,
                              window_lse_);
      differentiate(queries, keys, bias_sum, [&](int64_t done) {
        for (Prefetch& map : prefetch) map.advance<2>(window * queries.count + done, strip.windows * queries.count);
      });
    }
    for (TokenPlanes<S>* map : {&grad_query_, &grad_key_, &grad_value_}) map->scatter();
  }

 private:
  template <class F>
  void differentiate(const Columns<T>& queries, const Columns<T>& keys, T* bias_sum, F meanwhile) {
    const int64_t n = queries.count, m = keys.count, dim = walk_.problem.dim;
    if (keys.lone) {
      products_.lone_column(query_, queries, key_, keys.last(), lone_key_);
      products_.lone_column(grad_, queries, value_, keys.last(), lone_key_grad_);
    }
    for_each_block(n, [&](int64_t first, int64_t height) {
      gemm<T>(height, keys.vectors,
              {dim, query_.transposed(), first, key_.rows(), probabilities_.rows(), first, products_.scale(), nullptr,
               bias_.rows(), first});
      gemm<T>(height, keys.vectors, {dim, grad_.transposed(), first, value_.rows(), scores_grad_.rows(), first, T{1}});
      BlockValues<T> lone, lone_grad, lse;
      for_each_vector<T>([&](int i) {
        store(lse.data + i, load(window_lse_ + first + i));
        if (!keys.lone) return;
        store(lone.data + i, load(lone_key_ + first + i));
        store(lone_grad.data + i, load(lone_key_grad_ + first + i));
      });
      if (keys.lone) add_bias(lone, products_.scale(), bias_.lone() + first);
      softmax_backward(probabilities_, scores_grad_, first, height, keys, lse, lone, lone_grad);
      if (keys.lone) {
        for (int64_t r = 0; r < height; ++r) {
          lone_key_[first + r] = lone[r];
          lone_key_grad_[first + r] = lone_grad[r];
          transposed_.row(keys.last())[first + r] = lone_grad[r];
        }
      }
      if (bias_sum != nullptr) bias_.add_grad(bias_sum, scores_grad_, first, height);
      meanwhile(first + height);
    });
    if (keys.lone) {
      std::fill(lone_key_ + n, lone_key_ + round_up(n, kLanes<T>), T{0});
      std::fill(lone_key_grad_ + n, lone_key_grad_ + round_up(n, kLanes<T>), T{0});
    }
    if (queries.lone) {
      std::copy_n(scores_grad_.row(queries.last()), m, lone_query_grad_);
      std::fill(lone_query_grad_ + m, lone_query_grad_ + round_up(m, kLanes<T>), T{0});
    }
    transpose_rows<T>([&](int64_t i) { return scores_grad_.row(i); }, queries.in_vectors(), keys.in_vectors(),
                      transposed_.row(0), queries.width());
    products_.product(key_.rows(), m, transposed_.rows(), queries, lone_query_grad_, products_.scale(),
                      grad_query_.rows());
    products_.product(query_.rows(), n, scores_grad_.rows(), keys, lone_key_grad_, products_.scale(), grad_key_.rows());
    products_.product(grad_.rows(), n, probabilities_.rows(), keys, lone_key_, T{1}, grad_value_.rows());
  }

  const Walk<T>& walk_;
  const T* lse_;
  TokenPlanes<S> grad_, query_, key_, value_, grad_query_, grad_key_, grad_value_;
  WindowBias<T> bias_;
  PlaneProducts<T> products_;
  Matrix<T> probabilities_, scores_grad_;  // [queries][keys]
  Matrix<T> transposed_;                   // dS^T, [keys][queries but the lone one]
  T *lone_key_, *lone_key_grad_;           // [queries], of P and dS
  T* lone_query_grad_;                     // [keys], of dS
  T* window_lse_;                          // [queries]
  int64_t bytes_;
};

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
