// Window attention, forward and backward, fused: no roll, no partition, no score matrix in memory.
//
// For each window and head, with n queries and m keys (n = m = 49 in a full 7x7 window):
//
//   forward    S = scale Q K^T + bias,  P = softmax(S),  O = P V,  lse = log sum exp S
//   backward   P = exp(S - lse),  dP = G V^T,  dS = P (dP - rowsum(P dP))
//              dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T G,  dbias += dS
//
// K (in the backward V too) is transposed into scratch, [D][m], because the vectors of a tile of scores run along the
// keys. Everything else is read and written where it lies in the map, through a table of the offsets of the window's
// tokens, if its elements are adjacent, of the computing dtype and whole vectors; otherwise it is gathered into scratch,
// [n][D], and scattered back. Scores live in scratch: a block of rows in the forward, P and dS of one window in the
// backward. What is saved for the backward is lse alone.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/kernel_prelude.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- where the tokens of a window are --------------------------------------------------------------------------------

// The tokens of one window in one map: those of a span of rows and one of columns, row by row.
struct Tokens {
  Span rows, columns;
  int64_t count() const { return rows.size * columns.size; }
};

// dst[c][r] = src(r)[c] for r < rows, c < columns; dst[c][r] = 0 from r = rows up to a whole vector.
template <class T, class RowOf>
void transpose_rows(RowOf src, int64_t rows, int64_t columns, T* dst, int64_t dst_stride) {
  constexpr int L = kLanes<T>;
  for (int64_t r0 = 0; r0 < rows; r0 += L) {
    for (int64_t c0 = 0; c0 < columns; c0 += L) {
      const int64_t height = std::min<int64_t>(L, rows - r0), width = std::min<int64_t>(L, columns - c0);
      Vec<T> block[L] = {};
      for (int64_t r = 0; r < height; ++r) block[r] = load_up_to<T>(src(r0 + r) + c0, width);
      transpose<T>(block);
      for (int64_t c = 0; c < width; ++c) store(dst + (c0 + c) * dst_stride + r0, block[c]);
    }
  }
}

enum class Access {
  kVectors,    // rows are loaded or stored as vectors
  kBroadcast,  // elements are read one by one, in any order
};

// One map's part in the current window and head: the table of its rows and, where they cannot be used as they lie,
// scratch for a copy.
template <class S>
class Operand {
 public:
  using T = Compute<S>;

  Operand(const MapView& view, int64_t dim, int64_t most_tokens, Arena& arena, Access access = Access::kVectors)
      : view_(view), dim_(dim), copy_stride_(round_up(dim, kLanes<T>)), offset_(arena.take<int64_t>(most_tokens)) {
    const bool whole_vectors = view.stride[4] == 1 && dim % kLanes<T> == 0;
    in_place_ = std::is_same_v<S, T> && (access == Access::kBroadcast || whole_vectors);
    if (in_place_) return;
    copy_ = arena.take<T>(most_tokens * copy_stride_);
    if (view.stride[4] != 1) planes_ = arena.take<T>(dim * round_up(most_tokens, kLanes<T>));
  }

  // Turns to the tokens of another window, head and image.
  void select(int64_t batch, int64_t head, const Tokens& tokens) {
    tokens_ = tokens;
    data_ = static_cast<S*>(view_.data) + batch * view_.stride[0] + head * view_.stride[3] +
            tokens.rows.begin * view_.stride[1] + tokens.columns.begin * view_.stride[2];
    int64_t i = 0;
    for (int64_t y = 0; y < tokens.rows.size; ++y) {
      for (int64_t x = 0; x < tokens.columns.size; ++x, ++i) {
        offset_[i] = in_place_ ? y * view_.stride[1] + x * view_.stride[2] : i * copy_stride_;
      }
    }
  }

  // The tokens as rows of a matrix, [count][D]: in the map, or in the copy that `gather` fills and `scatter` empties.
  Rows<T> rows() const {
    if constexpr (std::is_same_v<S, T>) {
      if (in_place_) return {data_, offset_, view_.stride[4]};
    }
    return {copy_, offset_, 1};
  }

  void gather() {
    if (in_place_) return;
    if (planes_ == nullptr) {
      for_each_token([&](int64_t i, S* token) {
        for (int64_t d = 0; d < dim_; d += kLanes<T>) {
          store(copy_ + i * copy_stride_ + d, load_as_compute_up_to(token + d, dim_ - d));
        }
      });
    } else {
      gather_planes(planes_, plane_stride());
      transpose_rows<T>([&](int64_t d) { return planes_ + d * plane_stride(); }, dim_, tokens_.count(), copy_,
                        copy_stride_);
    }
  }

  // The tokens transposed, [D][stride], zeros behind the last token up to a whole vector.
  void gather_transposed(T* dst, int64_t stride) {
    if (view_.stride[4] != 1) {
      gather_planes(dst, stride);
    } else {
      gather();
      const Rows<T> source = rows();
      transpose_rows<T>([&](int64_t i) { return source.row(i); }, tokens_.count(), dim_, dst, stride);
    }
  }

  void scatter() {
    if (in_place_) return;
    if (planes_ == nullptr) {
      for_each_token([&](int64_t i, S* token) {
        for (int64_t d = 0; d < dim_; d += kLanes<T>) {
          store_as_storage_up_to(token + d, load(copy_ + i * copy_stride_ + d), dim_ - d);
        }
      });
    } else {
      transpose_rows<T>([&](int64_t i) { return copy_ + i * copy_stride_; }, tokens_.count(), dim_, planes_,
                        plane_stride());
      scatter_planes();
    }
  }

 private:
  int64_t plane_stride() const { return round_up(tokens_.count(), kLanes<T>); }

  template <class F>
  void for_each_token(F f) {
    for (int64_t y = 0, i = 0; y < tokens_.rows.size; ++y) {
      for (int64_t x = 0; x < tokens_.columns.size; ++x, ++i) f(i, data_ + y * view_.stride[1] + x * view_.stride[2]);
    }
  }

  // dst[d][token] for a map whose elements d lie apart, as in channels-first maps, where a window's row is contiguous.
  void gather_planes(T* dst, int64_t stride) {
    const int64_t columns = tokens_.columns.size, count = tokens_.count();
    for (int64_t d = 0; d < dim_; ++d) {
      T* plane = dst + d * stride;
      for (int64_t y = 0; y < tokens_.rows.size; ++y) {
        const S* run = data_ + d * view_.stride[4] + y * view_.stride[1];
        if (view_.stride[2] == 1) {
          for (int64_t x = 0; x < columns; x += kLanes<T>) {
            store_up_to<T>(plane + y * columns + x, load_as_compute_up_to(run + x, columns - x), columns - x);
          }
        } else {
          for (int64_t x = 0; x < columns; ++x) plane[y * columns + x] = static_cast<T>(run[x * view_.stride[2]]);
        }
      }
      for (int64_t i = count; i < round_up(count, kLanes<T>); ++i) plane[i] = T{0};
    }
  }

  void scatter_planes() {
    const int64_t columns = tokens_.columns.size;
    for (int64_t d = 0; d < dim_; ++d) {
      const T* plane = planes_ + d * plane_stride();
      for (int64_t y = 0; y < tokens_.rows.size; ++y) {
        S* run = data_ + d * view_.stride[4] + y * view_.stride[1];
        if (view_.stride[2] == 1) {
          for (int64_t x = 0; x < columns; x += kLanes<T>) {
            store_as_storage_up_to(run + x, load_up_to<T>(plane + y * columns + x, columns - x), columns - x);
          }
        } else {
          for (int64_t x = 0; x < columns; ++x) run[x * view_.stride[2]] = static_cast<S>(plane[y * columns + x]);
        }
      }
    }
  }

  MapView view_;
  int64_t dim_;
  int64_t copy_stride_;
  int64_t* offset_;
  bool in_place_ = false;
  T* copy_ = nullptr;    // [tokens][copy_stride]
  T* planes_ = nullptr;  // [D][plane_stride]
  S* data_ = nullptr;    // the window's first element
  Tokens tokens_{};
};

// A matrix in scratch whose row length changes with the window.
template <class T>
class Matrix {
 public:
  Matrix(int64_t rows, int64_t most_columns, Arena& arena)
      : rows_(rows), data_(arena.take<T>(rows * most_columns)), offset_(arena.take<int64_t>(rows)) {}

  void set_columns(int64_t columns) {
    columns_ = columns;
    for (int64_t r = 0; r < rows_; ++r) offset_[r] = r * columns;
  }
  T* row(int64_t r) const { return data_ + r * columns_; }
  Rows<T> rows() const { return {data_, offset_, 1}; }

 private:
  int64_t rows_, columns_ = 0;
  T* data_;
  int64_t* offset_;
};

// ---- the bias -------------------------------------------------------------------------------------------------------

// The bias (or the sum of its gradient) of one head as the current window sees it. A full window has whole rows of it;
// an edge window has pieces: for each of its rows of keys a run of columns.
struct BiasWindow {
  int64_t window_columns, keys, key_window_columns;  // of the full window
  Span query_rows, query_columns, key_rows, key_columns;

  bool whole_rows() const { return key_rows.size * key_columns.size == keys; }
  // Where the row of query i begins.
  int64_t row(int64_t i) const {
    const int64_t y = query_rows.local + i / query_columns.size, x = query_columns.local + i % query_columns.size;
    return (y * window_columns + x) * keys;
  }
  // Calls f(place in the row, place among the window's keys, length) for every run.
  template <class F>
  void for_each_run(F f) const {
    if (whole_rows()) {
      f(0, 0, keys);
      return;
    }
    for (int64_t y = 0; y < key_rows.size; ++y) {
      f((key_rows.local + y) * key_window_columns + key_columns.local, y * key_columns.size, key_columns.size);
    }
  }
};

// scores += bias
template <class T>
void add_bias(const BiasWindow& window, const T* bias, int64_t i, T* scores) {
  const T* row = bias + window.row(i);
  window.for_each_run([&](int64_t at, int64_t key, int64_t length) {
    for (int64_t j = 0; j < length; j += kLanes<T>) {
      const int64_t left = length - j;
      store_up_to<T>(scores + key + j, load_up_to<T>(scores + key + j, left) + load_up_to<T>(row + at + j, left), left);
    }
  });
}

// sum += the scores' gradient
template <class T>
void add_bias_grad(const BiasWindow& window, T* sum, int64_t i, const T* scores_grad) {
  T* row = sum + window.row(i);
  window.for_each_run([&](int64_t at, int64_t key, int64_t length) {
    for (int64_t j = 0; j < length; j += kLanes<T>) {
      const int64_t left = length - j;
      store_up_to<T>(row + at + j, load_up_to<T>(row + at + j, left) + load_up_to<T>(scores_grad + key + j, left), left);
    }
  });
}

// ---- rows of scores -------------------------------------------------------------------------------------------------

// Lanes from n on become -inf.
template <class T>
Vec<T> mask_behind(Vec<T> x, int64_t n) {
  return lane_index<T>() < static_cast<T>(n) ? x : broadcast(-std::numeric_limits<T>::infinity());
}

// scores <- exp(scores - max), [m] padded to whole vectors with zeros; returns max and the sum.
template <class T>
std::pair<T, T> exponentiate(T* scores, int64_t m) {
  constexpr int L = kLanes<T>;
  const int64_t last = (m - 1) / L * L;
  store(scores + last, mask_behind<T>(load(scores + last), m - last));
  Vec<T> larger = load(scores);
  for (int64_t j = L; j <= last; j += L) larger = max<T>(larger, load(scores + j));
  const T top = reduce_max<T>(larger);
  Vec<T> sum{};
  for (int64_t j = 0; j <= last; j += L) {
    const Vec<T> p = exp_nonpositive<T>(load(scores + j) - top);
    store(scores + j, p);
    sum += p;
  }
  return {top, reduce_add<T>(sum)};
}

// scores <- P = exp(scores - lse), padded with zeros; scores_grad, which holds dP, <- dS = P (dP - sum(P dP)).
template <class T>
void softmax_backward(T* scores, T* scores_grad, T lse, int64_t m) {
  constexpr int L = kLanes<T>;
  const int64_t last = (m - 1) / L * L;
  store(scores + last, mask_behind<T>(load(scores + last), m - last));
  Vec<T> inner{};
  for (int64_t j = 0; j <= last; j += L) {
    const Vec<T> p = exp_nonpositive<T>(load(scores + j) - lse);
    store(scores + j, p);
    inner += p * load(scores_grad + j);
  }
  const T delta = reduce_add<T>(inner);
  for (int64_t j = 0; j <= last; j += L) {
    store(scores_grad + j, load(scores + j) * (load(scores_grad + j) - delta));
  }
}

// ---- one window -----------------------------------------------------------------------------------------------------

// What both directions need to walk over windows.
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
  BiasWindow bias_window(int64_t window) const {
    const Tokens q = queries(window), k = keys(window);
    return {problem.columns.window, problem.keys(), problem.columns.window / problem.columns.ratio,
            q.rows,         q.columns,      k.rows, k.columns};
  }
  const T* bias(int64_t head) const {
    const int64_t size = problem.queries() * problem.keys();
    return problem.bias == nullptr ? nullptr
                                   : static_cast<const T*>(problem.bias) + (problem.bias_shared ? 0 : head * size);
  }
  // Where the map's statistics of query i of a window are, in (B, heads, H, W).
  int64_t statistic(int64_t batch, int64_t head, const Tokens& tokens, int64_t i) const {
    const int64_t y = tokens.rows.begin + i / tokens.columns.size, x = tokens.columns.begin + i % tokens.columns.size;
    return ((batch * problem.heads + head) * problem.rows.size + y) * problem.columns.size + x;
  }
  // As many windows as make a task worth a thread.
  int64_t grain() const {
    constexpr int64_t kWorthwhile = 1 << 20;  // multiply-adds, some 20 microseconds
    return 1 + kWorthwhile / (2 * most_queries * most_keys * problem.dim);
  }
  // Calls f(batch, head, window) for a run of all windows of all heads.
  template <class F>
  void for_each(int64_t begin, int64_t end, F f) const {
    for (int64_t item = begin; item < end; ++item) {
      if (problem.channels_last) {
        const int64_t head = item % problem.heads, rest = item / problem.heads;
        f(rest / windows, head, rest % windows);
      } else {
        const int64_t window = item % windows, rest = item / windows;
        f(rest / problem.heads, rest % problem.heads, window);
      }
    }
  }
};

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
        key_transposed_(walk.problem.dim, walk.padded_keys, arena),
        scores_(kTileRows, walk.padded_keys, arena),
        top_(arena.take<T>(round_up(walk.most_queries, kLanes<T>))),
        sum_(arena.take<T>(round_up(walk.most_queries, kLanes<T>))),
        bytes_(arena.used()) {
    std::fill_n(scale_, kTileRows, static_cast<T>(walk.problem.scale));
  }

  int64_t bytes() const { return bytes_; }

  void operator()(int64_t batch, int64_t head, int64_t window) {
    const Tokens queries = walk_.queries(window), keys = walk_.keys(window);
    const int64_t n = queries.count(), m = keys.count(), columns = round_up(m, kLanes<T>);
    query_.select(batch, head, queries);
    key_.select(batch, head, keys);
    value_.select(batch, head, keys);
    out_.select(batch, head, queries);
    key_transposed_.set_columns(columns);
    scores_.set_columns(columns);
    query_.gather();
    key_.gather_transposed(key_transposed_.row(0), columns);
    value_.gather();

    const T* bias = walk_.bias(head);
    const BiasWindow bias_window = walk_.bias_window(window);
    const int64_t blocks = parts(n, kTileRows);
    for (int64_t block = 0, first = 0; block < blocks; ++block) {
      const int64_t rows = (n - first) / (blocks - block);
      gemm_rows<T>(rows, columns / kLanes<T>, walk_.problem.dim, query_.rows(), first, key_transposed_.rows(),
                   scores_.rows(), 0, scale_);
      T factor[kTileRows];
      for (int64_t r = 0; r < rows; ++r) {
        if (bias != nullptr) add_bias(bias_window, bias, first + r, scores_.row(r));
        std::tie(top_[first + r], sum_[first + r]) = exponentiate(scores_.row(r), m);
        factor[r] = T{1} / sum_[first + r];
      }
      gemm_rows<T>(rows, parts(walk_.problem.dim, kLanes<T>), m, scores_.rows(), 0, value_.rows(), out_.rows(), first,
                   factor);
      first += rows;
    }
    out_.scatter();
    if (lse_ != nullptr) write_lse(batch, head, queries);
  }

 private:
  void write_lse(int64_t batch, int64_t head, const Tokens& queries) {
    const int64_t n = queries.count();
    std::fill(sum_ + n, sum_ + round_up(n, kLanes<T>), T{1});
    for (int64_t i = 0; i < n; i += kLanes<T>) store(top_ + i, load(top_ + i) + log_positive<T>(load(sum_ + i)));
    const int64_t columns = queries.columns.size;
    for (int64_t i = 0; i < n; i += columns) {
      std::copy_n(top_ + i, columns, lse_ + walk_.statistic(batch, head, queries, i));
    }
  }

  const Walk<T>& walk_;
  T* lse_;
  Operand<S> query_, key_, value_, out_;
  Matrix<T> key_transposed_;  // [D][columns]
  Matrix<T> scores_;          // [kTileRows][columns]
  T *top_, *sum_;             // of each query's row of scores
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
        key_transposed_(walk.problem.dim, walk.padded_keys, arena),
        value_transposed_(walk.problem.dim, walk.padded_keys, arena),
        probabilities_(walk.most_queries, walk.padded_keys, arena),
        scores_grad_(walk.most_queries, walk.padded_keys, arena),
        key_offset_(arena.take<int64_t>(walk.padded_keys)),
        bytes_(arena.used()) {
    std::fill_n(scale_, kTileRows, static_cast<T>(walk.problem.scale));
    std::fill_n(one_, kTileRows, T{1});
    if (key_offset_ != nullptr) std::iota(key_offset_, key_offset_ + walk.padded_keys, int64_t{0});
  }

  int64_t bytes() const { return bytes_; }

  // bias_sum, if not null, is what the gradients of the scores are added to.
  void operator()(int64_t batch, int64_t head, int64_t window, T* bias_sum) {
    const Tokens queries = walk_.queries(window), keys = walk_.keys(window);
    const int64_t n = queries.count(), m = keys.count(), columns = round_up(m, kLanes<T>);
    for (Operand<S>* operand : {&grad_, &query_, &grad_query_}) operand->select(batch, head, queries);
    for (Operand<S>* operand : {&key_, &value_, &grad_key_, &grad_value_}) operand->select(batch, head, keys);
    for (Matrix<T>* matrix : {&key_transposed_, &value_transposed_, &probabilities_, &scores_grad_}) {
      matrix->set_columns(columns);
    }
    grad_.gather();
    query_.gather();
    key_.gather();
    key_.gather_transposed(key_transposed_.row(0), columns);
    value_.gather_transposed(value_transposed_.row(0), columns);

    const T* bias = walk_.bias(head);
    const BiasWindow bias_window = walk_.bias_window(window);
    const int64_t dim = walk_.problem.dim, dim_vectors = parts(dim, kLanes<T>);
    const int64_t blocks = parts(n, kTileRows);
    for (int64_t block = 0, first = 0; block < blocks; ++block) {
      const int64_t rows = (n - first) / (blocks - block);
      gemm_rows<T>(rows, columns / kLanes<T>, dim, query_.rows(), first, key_transposed_.rows(), probabilities_.rows(),
                   first, scale_);
      gemm_rows<T>(rows, columns / kLanes<T>, dim, grad_.rows(), first, value_transposed_.rows(), scores_grad_.rows(),
                   first, one_);
      for (int64_t i = first; i < first + rows; ++i) {
        if (bias != nullptr) add_bias(bias_window, bias, i, probabilities_.row(i));
        softmax_backward(probabilities_.row(i), scores_grad_.row(i), lse_[walk_.statistic(batch, head, queries, i)], m);
        if (bias_sum != nullptr) add_bias_grad(bias_window, bias_sum, i, scores_grad_.row(i));
      }
      gemm_rows<T>(rows, dim_vectors, m, scores_grad_.rows(), first, key_.rows(), grad_query_.rows(), first, scale_);
      first += rows;
    }
    const int64_t key_blocks = parts(m, kTileRows);
    for (int64_t block = 0, first = 0; block < key_blocks; ++block) {
      const int64_t rows = (m - first) / (key_blocks - block);
      gemm_rows<T>(rows, dim_vectors, n, transposed(scores_grad_, columns), first, query_.rows(), grad_key_.rows(),
                   first, scale_);
      gemm_rows<T>(rows, dim_vectors, n, transposed(probabilities_, columns), first, grad_.rows(), grad_value_.rows(),
                   first, one_);
      first += rows;
    }
    grad_query_.scatter();
    grad_key_.scatter();
    grad_value_.scatter();
  }

 private:
  Rows<const T> transposed(const Matrix<T>& matrix, int64_t columns) const {
    return {matrix.row(0), key_offset_, columns};
  }

  const Walk<T>& walk_;
  const T* lse_;
  Operand<S> grad_, query_, key_, value_, grad_query_, grad_key_, grad_value_;
  Matrix<T> key_transposed_, value_transposed_;  // [D][columns]
  Matrix<T> probabilities_, scores_grad_;        // [n][columns]
  int64_t* key_offset_;                          // 0, 1, 2, ...
  T scale_[kTileRows], one_[kTileRows];
  int64_t bytes_;
};

// ---- all windows ----------------------------------------------------------------------------------------------------

template <class S>
void forward_of(const WindowAttentionForward& call) {
  const Walk<Compute<S>> walk(call.problem);
  const int64_t bytes = ForwardWindow<S>(call, walk, Arena()).bytes();
  const int64_t items = call.problem.batch * call.problem.heads * walk.windows;
  parallel_for(items, walk.grain(), [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    ForwardWindow<S> compute(call, walk, Arena(scratch.data()));
    walk.for_each(begin, end, compute);
  });
}

template <class S>
void backward_of(const WindowAttentionBackward& call) {
  using T = Compute<S>;
  const WindowAttentionProblem& problem = call.problem;
  const Walk<T> walk(problem);
  const int64_t bytes = BackwardWindow<S>(call, walk, Arena()).bytes();
  if (call.bias_grad == nullptr) {
    parallel_for(problem.batch * problem.heads * walk.windows, walk.grain(), [&](int64_t begin, int64_t end) {
      const Scratch scratch(bytes);
      BackwardWindow<S> compute(call, walk, Arena(scratch.data()));
      walk.for_each(begin, end, [&](int64_t batch, int64_t head, int64_t window) {
        compute(batch, head, window, nullptr);
      });
    });
    return;
  }
  const int64_t bias_size = problem.queries() * problem.keys();
  parallel_for(problem.heads * call.splits, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    BackwardWindow<S> compute(call, walk, Arena(scratch.data()));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / call.splits, split = task % call.splits;
      const int64_t items = problem.batch * walk.windows;
      T* sum = static_cast<T*>(call.bias_grad) + task * bias_size;
      std::fill_n(sum, bias_size, T{0});
      for (int64_t item = items * split / call.splits; item < items * (split + 1) / call.splits; ++item) {
        compute(item / walk.windows, head, item % walk.windows, sum);
      }
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
