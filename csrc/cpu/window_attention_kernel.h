// Window attention, forward and backward, fused: no roll, no partition, no score matrix in memory.
//
// For each window and head, with n queries and m keys (n = m = 49 in a full 7x7 window):
//
//   forward    S = scale Q K^T + bias,  P = softmax(S),  O = P V,  lse = log sum exp S
//   backward   P = exp(S - lse),  dP = G V^T,  dS = P (dP - rowsum(P dP))
//              dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T G,  dbias += dS
//
// K (in the backward V too) is transposed into scratch, [D][m], because the vectors of a tile of scores run along the
// keys; the other operands are used where they lie in the map if possible (window_operand.h). Scores live in scratch: a
// block of rows in the forward, P and dS of one window in the backward. What is saved for the backward is lse alone.
//
// The lone key. The square of an odd number is one more than a multiple of 8, so odd windows leave one key over when
// their keys are cut into vectors. Its scores, one dot product for each query, are computed apart: a vector of 16 lanes
// for one key would cost a third of the work again, for the products and for the exponentials.
#pragma once

#include "cpu/window_operand.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// The keys of a window as columns of a matrix of scores.
template <class T>
struct Columns {
  int64_t count;    // of keys
  bool lone;        // the last key is not part of the vectors
  int64_t vectors;  // whole vectors that hold the other keys, and perhaps some columns without a key

  explicit Columns(int64_t keys)
      : count(keys),
        lone(keys > kLanes<T> && keys % kLanes<T> == 1),
        vectors(lone ? keys / kLanes<T> : parts(keys, kLanes<T>)) {}
  int64_t width() const { return vectors * kLanes<T>; }
  int64_t last() const { return count - 1; }
};

// One value for each row of a block, in whole vectors.
template <class T>
inline constexpr int kBlockValues = std::max(kTileRows, kLanes<T>);

template <class T>
struct BlockValues {
  alignas(64) T data[kBlockValues<T>];

  T& operator[](int64_t r) { return data[r]; }
  T operator[](int64_t r) const { return data[r]; }
};

// Calls f(first row, rows) on blocks of at most kTileRows rows, cut evenly.
template <class F>
void for_each_block(int64_t rows, F f) {
  const int64_t blocks = parts(rows, kTileRows);
  for (int64_t block = 0, first = 0; block < blocks; ++block) {
    const int64_t height = (rows - first) / (blocks - block);
    f(first, height);
    first += height;
  }
}

// f(vector of `a`, vector of `b`, ...) for all values of a block.
template <class T, class F>
void for_each_vector(F f) {
#pragma GCC unroll 4
  for (int i = 0; i < kBlockValues<T>; i += kLanes<T>) f(i);
}

// One vector for each row of a block.
template <class T>
struct BlockVectors {
  Vec<T> row[kTileRows];

  explicit BlockVectors(int64_t height) {
    for (int64_t r = height; r < kTileRows; ++r) row[r] = Vec<T>{};
  }
};

template <class T, class Combine>
BlockValues<T> reduce_block(BlockVectors<T>& rows, Combine combine) {
  constexpr int kAtOnce = std::min(kTileRows, kLanes<T>);
  BlockValues<T> result;
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; r += kAtOnce) store(result.data + r, reduce_rows<T, kAtOnce>(rows.row + r, combine));
  return result;
}

template <class T>
BlockValues<T> reduce_block_add(BlockVectors<T>& rows) {
  return reduce_block<T>(rows, [](Vec<T> a, Vec<T> b) { return a + b; });
}

// NaN may be ignored.
template <class T>
BlockValues<T> reduce_block_max(BlockVectors<T>& rows) {
  return reduce_block<T>(rows, [](Vec<T> a, Vec<T> b) { return max<T>(a, b); });
}

// The dot products of `height` rows, from row `first` on, with y, [dim] and zeros up to a whole vector.
template <class T>
BlockValues<T> row_dots(Rows<const T> rows, int64_t first, int64_t height, int64_t dim, const T* y) {
  BlockVectors<T> sums(height);
  for (int64_t r = 0; r < height; ++r) {
    const T* row = rows.row(first + r);
    Vec<T> sum{};
    for (int64_t d = 0; d < dim; d += kLanes<T>) sum += load_up_to(row + d, dim - d) * load(y + d);
    sums.row[r] = sum;
  }
  return reduce_block_add<T>(sums);
}

// ---- softmax of a block of rows ---------------------------------------------------------------------------------------

template <class T>
struct SoftmaxStatistics {
  BlockValues<T> top, sum;
};

// S <- exp(S - top), row by row, in scratch. `lone` holds the lone key's scores, if there is one.
template <class T>
SoftmaxStatistics<T> exponentiate(const Matrix<T>& scores, int64_t height, const Columns<T>& columns,
                                  BlockValues<T>& lone) {
  constexpr int L = kLanes<T>;
  BlockVectors<T> rows(height);
  for (int64_t r = 0; r < height; ++r) {
    const T* row = scores.row(r);
    Vec<T> larger = load(row);
    for (int64_t v = 1; v < columns.vectors; ++v) larger = max<T>(larger, load(row + v * L));
    rows.row[r] = larger;
  }
  SoftmaxStatistics<T> result;
  result.top = reduce_block_max<T>(rows);
  if (columns.lone) {
    for_each_vector<T>([&](int i) {
      store(result.top.data + i, max<T>(load(result.top.data + i), load(lone.data + i)));
    });
  }
  for (int64_t r = 0; r < height; ++r) {
    T* row = scores.row(r);
    const Vec<T> top = broadcast(result.top[r]);
    Vec<T> sum{};
    for (int64_t v = 0; v < columns.vectors; ++v) {
      const Vec<T> p = exp2_nonpositive<T>((load(row + v * L) - top) * kLog2E<T>);
      store(row + v * L, p);
      sum += p;
    }
    rows.row[r] = sum;
  }
  result.sum = reduce_block_add<T>(rows);
  if (columns.lone) {
    for_each_vector<T>([&](int i) {
      const Vec<T> p = exp2_nonpositive<T>((load(lone.data + i) - load(result.top.data + i)) * kLog2E<T>);
      store(lone.data + i, p);
      store(result.sum.data + i, load(result.sum.data + i) + p);
    });
    for (int64_t r = 0; r < height; ++r) scores.row(r)[columns.last()] = lone[r];
  }
  return result;
}

// Rows from `first` on: S <- P = exp(S - lse), and dP <- dS = P (dP - rowsum(P dP)). `lone` and `lone_grad` hold the lone
// key's S and dP.
template <class T>
void softmax_backward(const Matrix<T>& scores, const Matrix<T>& scores_grad, int64_t first, int64_t height,
                      const Columns<T>& columns, const BlockValues<T>& lse, BlockValues<T>& lone,
                      BlockValues<T>& lone_grad) {
  constexpr int L = kLanes<T>;
  BlockVectors<T> rows(height);
  for (int64_t r = 0; r < height; ++r) {
    T *row = scores.row(first + r), *row_grad = scores_grad.row(first + r);
    const Vec<T> row_lse = broadcast(lse[r]);
    Vec<T> sum{};
    for (int64_t v = 0; v < columns.vectors; ++v) {
      const Vec<T> p = exp2_nonpositive<T>((load(row + v * L) - row_lse) * kLog2E<T>);
      store(row + v * L, p);
      sum += p * load(row_grad + v * L);
    }
    rows.row[r] = sum;
  }
  BlockValues<T> delta = reduce_block_add<T>(rows);
  if (columns.lone) {
    for_each_vector<T>([&](int i) {
      const Vec<T> p = exp2_nonpositive<T>((load(lone.data + i) - load(lse.data + i)) * kLog2E<T>);
      const Vec<T> grad = load(lone_grad.data + i), sum = load(delta.data + i) + p * grad;
      store(delta.data + i, sum);
      store(lone.data + i, p);
      store(lone_grad.data + i, p * (grad - sum));
    });
    for (int64_t r = 0; r < height; ++r) {
      scores.row(first + r)[columns.last()] = lone[r];
      scores_grad.row(first + r)[columns.last()] = lone_grad[r];
    }
  }
  for (int64_t r = 0; r < height; ++r) {
    const T* row = scores.row(first + r);
    T* row_grad = scores_grad.row(first + r);
    const Vec<T> row_delta = broadcast(delta[r]);
    for (int64_t v = 0; v < columns.vectors; ++v) {
      store(row_grad + v * L, load(row + v * L) * (load(row_grad + v * L) - row_delta));
    }
  }
}

// ---- all windows of a call --------------------------------------------------------------------------------------------

template <class T>
struct Walk {
  const WindowAttentionProblem& problem;
  int64_t windows, window_columns;
  int64_t most_queries, most_keys, padded_keys;  // in any one window

  explicit Walk(const WindowAttentionProblem& p)
      : problem(p),
        windows(p.windows()),
        window_columns(p.columns.windows()),
        most_queries(p.rows.most_queries() * p.columns.most_queries()),
        most_keys(most_queries / (p.rows.ratio * p.columns.ratio)),
        padded_keys(round_up(most_keys, kLanes<T>)) {}

  Tokens queries(int64_t window) const {
    return {problem.rows.queries(window / window_columns), problem.columns.queries(window % window_columns)};
  }
  Tokens keys(int64_t window) const {
    return {problem.rows.keys(window / window_columns), problem.columns.keys(window % window_columns)};
  }
  // Where the map's statistics of a window's row y begin, in (B, heads, H, W).
  int64_t statistics(const Item& item, const Tokens& tokens, int64_t y) const {
    return ((item.batch * problem.heads + item.head) * problem.rows.size + tokens.rows.begin + y) * problem.columns.size +
           tokens.columns.begin;
  }
  // As many windows as make a task worth a thread.
  int64_t grain() const {
    constexpr int64_t kWorthwhile = 1 << 20;  // multiply-adds, some 20 microseconds
    return 1 + kWorthwhile / (2 * most_queries * most_keys * problem.dim);
  }
  int64_t items() const { return problem.batch * problem.heads * windows; }
  // One of all windows of all heads.
  Item item(int64_t index) const {
    if (problem.channels_last) {
      const int64_t head = index % problem.heads, rest = index / problem.heads;
      return {rest / windows, head, rest % windows};
    }
    const int64_t window = index % windows, rest = index / windows;
    return {rest / problem.heads, rest % problem.heads, window};
  }
};

// The bias of one head as the current window sees it: rows of queries, columns of keys. The bias of a full window is used
// where it lies. A window that is cut off has pieces of its rows, which are copied side by side; columns without a key
// hold -inf, so that their probability is 0.
template <class T>
class WindowBias {
 public:
  WindowBias(const Walk<T>& walk, Arena& arena)
      : problem_(walk.problem),
        copy_(arena.take<T>((problem_.bias == nullptr ? 1 : walk.most_queries) * walk.padded_keys + kLanes<T>)),
        offset_(arena.take<int64_t>(walk.most_queries)),
        lone_(arena.take<T>(walk.most_queries + kBlockValues<T>)) {
    if (!arena.holds_memory()) return;
    std::fill_n(offset_, walk.most_queries, int64_t{0});
    std::fill_n(lone_, walk.most_queries + kBlockValues<T>, T{0});
  }

  // `queries` and `keys` must stay until the next call.
  void select(int64_t head, const Tokens& queries, const Tokens& keys) {
    const Columns<T> columns(keys.count());
    window_keys_ = problem_.keys();
    queries_ = &queries;
    keys_ = &keys;
    if (problem_.bias == nullptr) {
      std::fill_n(copy_, columns.count, T{0});
      end_row(copy_, columns);
      data_ = copy_;
      return;
    }
    const int64_t size = problem_.queries() * window_keys_;
    const T* bias = static_cast<const T*>(problem_.bias) + (problem_.bias_shared ? 0 : head * size);
    const bool in_place = queries.count() == problem_.queries() && columns.width() <= columns.count;
    data_ = in_place ? bias : copy_;
    const int64_t stride = in_place ? window_keys_ : round_up(columns.count, kLanes<T>);
    if (stride != stride_) {
      stride_ = stride;
      for (int64_t i = 0; i < problem_.queries(); ++i) offset_[i] = i * stride;
    }
    if (!in_place) copy_pieces(bias, columns);
    if (!columns.lone) return;
    for (int64_t i = 0; i < queries.count(); ++i) lone_[i] = data_[i * stride + columns.last()];
  }

  Rows<const T> rows() const { return {data_, offset_, 1}; }
  // The lone key's column, with room behind it for a block.
  const T* lone() const { return lone_; }

  // sum += the gradient of the scores of `height` queries, the first of them `first`.
  void add_grad(T* sum, const Matrix<T>& scores_grad, int64_t first, int64_t height) const {
    const int64_t width = queries_->columns.size;
    for (int64_t i = first, y = first / width, x = first % width; i < first + height; ++i) {
      T* row = sum + place(y, x);
      const T* grad = scores_grad.row(i);
      for_each_run([&](int64_t at, int64_t key, int64_t length) {
        for (int64_t j = 0; j < length; j += kLanes<T>) {
          const int64_t left = length - j;
          store_up_to<T>(row + at + j, load_up_to(row + at + j, left) + load_up_to(grad + key + j, left), left);
        }
      });
      if (++x == width) x = 0, ++y;
    }
  }

 private:
  // The row, in the bias of a full window, of the query in row y and column x of this one.
  int64_t place(int64_t y, int64_t x) const {
    return ((queries_->rows.local + y) * problem_.columns.window + queries_->columns.local + x) * window_keys_;
  }
  void copy_pieces(const T* bias, const Columns<T>& columns) {
    T* row = copy_;
    for (int64_t y = 0; y < queries_->rows.size; ++y) {
      for (int64_t x = 0; x < queries_->columns.size; ++x, row += stride_) {
        const T* whole_row = bias + place(y, x);
        for_each_run([&](int64_t at, int64_t key, int64_t length) {
          for (int64_t j = 0; j < length; j += kLanes<T>) {
            store(row + key + j, load_up_to(whole_row + at + j, length - j));
          }
        });
        end_row(row, columns);
      }
    }
  }
  // Calls f(place in the row, place among the window's keys, length) for every run of adjacent keys.
  template <class F>
  void for_each_run(F f) const {
    const int64_t window_width = problem_.columns.window / problem_.columns.ratio;
    if (keys_->columns.size == window_width) {
      f(keys_->rows.local * window_width, 0, keys_->count());
      return;
    }
    for (int64_t y = 0; y < keys_->rows.size; ++y) {
      f((keys_->rows.local + y) * window_width + keys_->columns.local, y * keys_->columns.size, keys_->columns.size);
    }
  }
  // -inf behind the last key, up to a whole vector. More is stored, for the next row to overwrite.
  static void end_row(T* row, const Columns<T>& columns) {
    if (columns.width() > columns.count) store(row + columns.count, broadcast(-std::numeric_limits<T>::infinity()));
  }

  const WindowAttentionProblem& problem_;
  T* copy_;
  int64_t* offset_;
  T* lone_;
  const T* data_ = nullptr;
  int64_t window_keys_ = 0;
  int64_t stride_ = 0;  // that offset_ was made for
  const Tokens *queries_ = nullptr, *keys_ = nullptr;
};

// ---- one window -------------------------------------------------------------------------------------------------------

template <class S>
class ForwardWindow {
 public:
  using T = Compute<S>;

  ForwardWindow(const WindowAttentionForward& call, const Walk<T>& walk, Arena arena)
      : walk_(walk),
        lse_(static_cast<T*>(call.lse)),
        query_(call.query, walk.problem.dim, walk.most_queries, arena, Access::kBroadcast),
        key_(call.key, walk.problem.dim, walk.most_keys, arena),
        value_(call.value, walk.problem.dim, walk.most_keys, arena),
        out_(call.out, walk.problem.dim, walk.most_queries, arena),
        bias_(walk, arena),
        key_transposed_(walk.problem.dim, walk.padded_keys, arena),
        scores_(kTileRows, walk.padded_keys, arena),
        lone_key_(arena.take<T>(round_up(walk.problem.dim, kLanes<T>))),
        lone_row_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        window_lse_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        bytes_(arena.used()) {
    std::fill_n(scale_, kTileRows, static_cast<T>(walk.problem.scale));
  }

  int64_t bytes() const { return bytes_; }

  // Meanwhile it prefetches what `next` will need.
  void operator()(const Item& item, const Item& next) {
    const Tokens queries = walk_.queries(item.window), keys = walk_.keys(item.window);
    const Columns<T> columns(keys.count());
    const int64_t dim = walk_.problem.dim;
    query_.select(item, queries);
    key_.select(item, keys);
    value_.select(item, keys);
    out_.select(item, queries);
    bias_.select(item.head, queries, keys);
    Prefetch prefetch_query = query_.prefetch(next, walk_.queries(next.window)),
                prefetch_key = key_.prefetch(next, walk_.keys(next.window)),
                prefetch_value = value_.prefetch(next, walk_.keys(next.window));
    key_transposed_.set_columns(columns.width());
    scores_.set_columns(round_up(columns.count, kLanes<T>));
    query_.gather();
    key_.gather_transposed(columns.lone ? columns.last() : columns.count, key_transposed_.row(0), columns.width());
    value_.gather();
    if (columns.lone) prepare_lone_key(queries.count());

    for_each_block(queries.count(), [&](int64_t first, int64_t height) {
      gemm_rows<T>(height, columns.vectors,
                   {dim, query_.rows(), first, key_transposed_.rows(), scores_.rows(), 0, scale_, bias_.rows(), first});
      BlockValues<T> lone;
      if (columns.lone) lone = lone_scores(first, height);
      const SoftmaxStatistics<T> statistics = exponentiate(scores_, height, columns, lone);
      BlockValues<T> factor;
      for_each_vector<T>([&](int i) {
        const Vec<T> sum = load(statistics.sum.data + i);
        store(factor.data + i, T{1} / sum);
        if (lse_ != nullptr) {
          store(window_lse_ + first + i, load(statistics.top.data + i) + log_positive<T>(sum));
        }
      });
      for (Prefetch* prefetch : {&prefetch_query, &prefetch_key, &prefetch_value}) prefetch->advance(first + height, queries.count());
      gemm_rows<T>(height, parts(dim, kLanes<T>),
                   {columns.count, scores_.rows(), 0, value_.rows(), out_.rows(), first, factor.data});
    });
    out_.scatter();
    if (lse_ == nullptr) return;
    for (int64_t y = 0; y < queries.rows.size; ++y) {
      std::copy_n(window_lse_ + y * queries.columns.size, queries.columns.size,
                  lse_ + walk_.statistics(item, queries, y));
    }
  }

 private:
  // The lone key, and if the queries are planes its products with all of them.
  void prepare_lone_key(int64_t queries) {
    key_.gather_last(lone_key_);
    if (query_.has_rows()) return;
    static constexpr int64_t kZero = 0;
    static constexpr T kOne = 1;
    gemm_rows<T>(1, parts(queries, kLanes<T>),
                 {walk_.problem.dim, {lone_key_, &kZero, 1}, 0, query_.planes(), {lone_row_, &kZero, 1}, 0, &kOne});
  }

  BlockValues<T> lone_scores(int64_t first, int64_t height) const {
    BlockValues<T> result;
    if (query_.has_rows()) {
      result = row_dots<T>(query_.rows(), first, height, walk_.problem.dim, lone_key_);
    } else {
      for_each_vector<T>([&](int i) { store(result.data + i, load(lone_row_ + first + i)); });
    }
    for_each_vector<T>([&](int i) {
      store(result.data + i, load(result.data + i) * scale_[0] + load(bias_.lone() + first + i));
    });
    return result;
  }

  const Walk<T>& walk_;
  T* lse_;
  Operand<S> query_, key_, value_, out_;
  WindowBias<T> bias_;
  Matrix<T> key_transposed_;  // [D][keys but the lone one]
  Matrix<T> scores_;          // [kTileRows][keys]
  T* lone_key_;               // [D]
  T* lone_row_;               // [queries]
  T* window_lse_;             // [queries]
  T scale_[kTileRows];
  int64_t bytes_;
};

template <class S>
class BackwardWindow {
 public:
  using T = Compute<S>;

  BackwardWindow(const WindowAttentionBackward& call, const Walk<T>& walk, Arena arena)
      : walk_(walk),
        lse_(static_cast<const T*>(call.lse)),
        grad_(call.grad, walk.problem.dim, walk.most_queries, arena),
        query_(call.query, walk.problem.dim, walk.most_queries, arena),
        key_(call.key, walk.problem.dim, walk.most_keys, arena),
        value_(call.value, walk.problem.dim, walk.most_keys, arena),
        grad_query_(call.grad_query, walk.problem.dim, walk.most_queries, arena),
        grad_key_(call.grad_key, walk.problem.dim, walk.most_keys, arena),
        grad_value_(call.grad_value, walk.problem.dim, walk.most_keys, arena),
        bias_(walk, arena),
        key_transposed_(walk.problem.dim, walk.padded_keys, arena),
        value_transposed_(walk.problem.dim, walk.padded_keys, arena),
        probabilities_(walk.most_queries, walk.padded_keys, arena),
        scores_grad_(walk.most_queries, walk.padded_keys, arena),
        lone_key_(arena.take<T>(round_up(walk.problem.dim, kLanes<T>))),
        lone_value_(arena.take<T>(round_up(walk.problem.dim, kLanes<T>))),
        window_lse_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        key_offset_(arena.take<int64_t>(walk.most_keys)),
        bytes_(arena.used()) {
    std::fill_n(scale_, kTileRows, static_cast<T>(walk.problem.scale));
    std::fill_n(one_, kTileRows, T{1});
    if (arena.holds_memory()) {
      std::iota(key_offset_, key_offset_ + walk.most_keys, int64_t{0});
      std::fill_n(window_lse_, walk.most_queries + kBlockValues<T>, T{0});
    }
  }

  int64_t bytes() const { return bytes_; }

  // bias_sum, if not null, is what the gradients of the scores are added to.
  void operator()(const Item& item, const Item& next, T* bias_sum) {
    const Tokens queries = walk_.queries(item.window), keys = walk_.keys(item.window);
    const int64_t n = queries.count(), m = keys.count();
    const Columns<T> columns(m);
    const int64_t transposed_keys = columns.lone ? columns.last() : columns.count;
    const int64_t dim = walk_.problem.dim, dim_vectors = parts(dim, kLanes<T>);
    for (Operand<S>* operand : {&grad_, &query_, &grad_query_}) operand->select(item, queries);
    for (Operand<S>* operand : {&key_, &value_, &grad_key_, &grad_value_}) operand->select(item, keys);
    for (Matrix<T>* matrix : {&key_transposed_, &value_transposed_}) matrix->set_columns(columns.width());
    for (Matrix<T>* matrix : {&probabilities_, &scores_grad_}) matrix->set_columns(round_up(m, kLanes<T>));
    bias_.select(item.head, queries, keys);
    const Tokens next_queries = walk_.queries(next.window), next_keys = walk_.keys(next.window);
    Prefetch prefetch[] = {grad_.prefetch(next, next_queries), query_.prefetch(next, next_queries),
                              key_.prefetch(next, next_keys), value_.prefetch(next, next_keys)};
    grad_.gather();
    query_.gather();
    key_.gather();
    key_.gather_transposed(transposed_keys, key_transposed_.row(0), columns.width());
    value_.gather_transposed(transposed_keys, value_transposed_.row(0), columns.width());
    if (columns.lone) {
      key_.gather_last(lone_key_);
      value_.gather_last(lone_value_);
    }
    for (int64_t y = 0; y < queries.rows.size; ++y) {
      std::copy_n(lse_ + walk_.statistics(item, queries, y), queries.columns.size,
                  window_lse_ + y * queries.columns.size);
    }

    for_each_block(n, [&](int64_t first, int64_t height) {
      gemm_rows<T>(height, columns.vectors,
                   {dim, query_.rows(), first, key_transposed_.rows(), probabilities_.rows(), first, scale_,
                    bias_.rows(), first});
      gemm_rows<T>(height, columns.vectors,
                   {dim, grad_.rows(), first, value_transposed_.rows(), scores_grad_.rows(), first, one_});
      BlockValues<T> lone, lone_grad, lse;
      if (columns.lone) {
        lone = row_dots<T>(query_.rows(), first, height, dim, lone_key_);
        for_each_vector<T>([&](int i) {
          store(lone.data + i, load(lone.data + i) * scale_[0] + load(bias_.lone() + first + i));
        });
        lone_grad = row_dots<T>(grad_.rows(), first, height, dim, lone_value_);
      }
      for_each_vector<T>([&](int i) { store(lse.data + i, load(window_lse_ + first + i)); });
      softmax_backward(probabilities_, scores_grad_, first, height, columns, lse, lone, lone_grad);
      if (bias_sum != nullptr) bias_.add_grad(bias_sum, scores_grad_, first, height);
      for (Prefetch& operand : prefetch) operand.advance(first + height, n);
      gemm_rows<T>(height, dim_vectors, {m, scores_grad_.rows(), first, key_.rows(), grad_query_.rows(), first, scale_});
    });
    for_each_block(m, [&](int64_t first, int64_t height) {
      gemm_rows<T>(height, dim_vectors,
                   {n, transposed(scores_grad_), first, query_.rows(), grad_key_.rows(), first, scale_});
      gemm_rows<T>(height, dim_vectors,
                   {n, transposed(probabilities_), first, grad_.rows(), grad_value_.rows(), first, one_});
    });
    grad_query_.scatter();
    grad_key_.scatter();
    grad_value_.scatter();
  }

 private:
  Rows<const T> transposed(const Matrix<T>& matrix) const { return {matrix.row(0), key_offset_, matrix.columns()}; }

  const Walk<T>& walk_;
  const T* lse_;
  Operand<S> grad_, query_, key_, value_, grad_query_, grad_key_, grad_value_;
  WindowBias<T> bias_;
  Matrix<T> key_transposed_, value_transposed_;  // [D][keys but the lone one]
  Matrix<T> probabilities_, scores_grad_;        // [queries][keys]
  T *lone_key_, *lone_value_;                    // [D]
  T* window_lse_;                                // [queries]
  int64_t* key_offset_;                          // 0, 1, 2, ...
  T scale_[kTileRows], one_[kTileRows];
  int64_t bytes_;
};

// ---- the kernels ------------------------------------------------------------------------------------------------------

template <class S>
void forward_of(const WindowAttentionForward& call) {
  const Walk<Compute<S>> walk(call.problem);
  const int64_t bytes = ForwardWindow<S>(call, walk, Arena()).bytes();
  parallel_for(walk.items(), walk.grain(), [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    ForwardWindow<S> compute(call, walk, Arena(scratch.data()));
    for (int64_t i = begin; i < end; ++i) compute(walk.item(i), walk.item(std::min(i + 1, end - 1)));
  });
}

template <class S>
void backward_of(const WindowAttentionBackward& call) {
  using T = Compute<S>;
  const WindowAttentionProblem& problem = call.problem;
  const Walk<T> walk(problem);
  const int64_t bytes = BackwardWindow<S>(call, walk, Arena()).bytes();
  if (call.bias_grad == nullptr) {
    parallel_for(walk.items(), walk.grain(), [&](int64_t begin, int64_t end) {
      const Scratch scratch(bytes);
      BackwardWindow<S> compute(call, walk, Arena(scratch.data()));
      for (int64_t i = begin; i < end; ++i) compute(walk.item(i), walk.item(std::min(i + 1, end - 1)), nullptr);
    });
    return;
  }
  const int64_t bias_size = problem.queries() * problem.keys();
  parallel_for(problem.heads * call.splits, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    BackwardWindow<S> compute(call, walk, Arena(scratch.data()));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / call.splits, split = task % call.splits, windows = problem.batch * walk.windows;
      const int64_t first = windows * split / call.splits, last = windows * (split + 1) / call.splits - 1;
      T* sum = static_cast<T*>(call.bias_grad) + task * bias_size;
      std::fill_n(sum, bias_size, T{0});
      const auto item = [&](int64_t i) { return Item{i / walk.windows, head, i % walk.windows}; };
      for (int64_t i = first; i <= last; ++i) compute(item(i), item(std::min(i + 1, last)), sum);
    }
  });
}

template <class F>
void with_storage(Storage storage, F f) {
  switch (storage) {
    case Storage::kFloat32:
      return f(float{});
    case Storage::kFloat64:
      return f(double{});
    case Storage::kFloat16:
      return f(Half{});
    case Storage::kBFloat16:
      return f(BFloat16{});
  }
}

void forward(const WindowAttentionForward& call) {
  with_storage(call.problem.storage, [&](auto s) { forward_of<decltype(s)>(call); });
}

void backward(const WindowAttentionBackward& call) {
  with_storage(call.problem.storage, [&](auto s) { backward_of<decltype(s)>(call); });
}

}  // namespace

extern const WindowAttentionKernels window_attention_kernels = {forward, backward};

}  // namespace vitfast::cpu::VITFAST_ISA
