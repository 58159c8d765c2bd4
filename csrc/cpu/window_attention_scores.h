// The scores of a window's queries and keys, block by block of queries, and the softmax over the keys: what both forms
// of the kernels, on tokens (window_attention_tokens.h) and on planes (window_attention_planes.h), share.
#pragma once

#include "cpu/window_operand.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// Scores are computed and their softmax taken in blocks of rows, in the caches.
inline constexpr int kBlockRows = tile_rows(kTileVectors) >= 8 ? 8 : 4;

// One value for each row of a block, in whole vectors.
template <class T>
inline constexpr int kBlockValues = std::max(kBlockRows, kLanes<T>);

template <class T>
struct BlockValues {
  alignas(64) T data[kBlockValues<T>];

  T& operator[](int64_t r) { return data[r]; }
  T operator[](int64_t r) const { return data[r]; }
};

// Calls f(first row, rows) on blocks of at most kBlockRows rows, cut evenly.
template <class F>
void for_each_block(int64_t rows, F f) {
  const int64_t blocks = parts(rows, kBlockRows);
  for (int64_t block = 0, first = 0; block < blocks; ++block) {
    const int64_t height = (rows - first) / (blocks - block);
    f(first, height);
    first += height;
  }
}

// Calls f(index of its first value) for every vector of a block's values.
template <class T, class F>
void for_each_vector(F f) {
#pragma GCC unroll 4
  for (int i = 0; i < kBlockValues<T>; i += kLanes<T>) f(i);
}

// One vector for each row of a block.
template <class T>
struct BlockVectors {
  Vec<T> row[kBlockRows];

  explicit BlockVectors(int64_t height) {
    for (int64_t r = height; r < kBlockRows; ++r) row[r] = Vec<T>{};
  }
};

template <class T, class Combine>
BlockValues<T> reduce_block(BlockVectors<T>& rows, Combine combine) {
  constexpr int kAtOnce = std::min(kBlockRows, kLanes<T>);
  BlockValues<T> result;
#pragma GCC unroll 4
  for (int r = 0; r < kBlockRows; r += kAtOnce) store(result.data + r, reduce_rows<T, kAtOnce>(rows.row + r, combine));
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

// x <- scale x + bias
template <class T>
void add_bias(BlockValues<T>& x, T scale, const T* bias) {
  for_each_vector<T>([&](int i) { store(x.data + i, load(x.data + i) * scale + load(bias + i)); });
}

// ---- softmax of a block of rows -----------------------------------------------------------------------------------

template <class T>
struct SoftmaxStatistics {
  BlockValues<T> top, sum;
};

// Rows from `first` on: S <- exp(S - top). `lone` holds the lone key's scores, if there is one.
template <class T>
SoftmaxStatistics<T> exponentiate(const Matrix<T>& scores, int64_t first, int64_t height, const Columns<T>& columns,
                                  BlockValues<T>& lone) {
  constexpr int L = kLanes<T>;
  BlockVectors<T> rows(height);
  for (int64_t r = 0; r < height; ++r) {
    const T* row = scores.row(first + r);
    Vec<T> larger = load(row);
    for (int64_t v = 1; v < columns.vectors; ++v) larger = max<T>(larger, load(row + v * L));
    rows.row[r] = larger;
  }
  SoftmaxStatistics<T> result;
  result.top = reduce_block_max<T>(rows);
  if (columns.lone) {
    for_each_vector<T>(
        [&](int i) { store(result.top.data + i, max<T>(load(result.top.data + i), load(lone.data + i))); });
  }
  for (int64_t r = 0; r < height; ++r) {
    T* row = scores.row(first + r);
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
    for (int64_t r = 0; r < height; ++r) scores.row(first + r)[columns.last()] = lone[r];
  }
  return result;
}

// Rows from `first` on: S <- P = exp(S - lse), and dP <- dS = P (dP - rowsum(P dP)). `lone` and `lone_grad` hold the
// lone key's S and dP. P is divided by its sum, which the rounding of lse keeps from being 1: the rows of dS then add
// up to 0.
template <class T>
void softmax_backward(const Matrix<T>& scores, const Matrix<T>& scores_grad, int64_t first, int64_t height,
                      const Columns<T>& columns, const BlockValues<T>& lse, BlockValues<T>& lone,
                      BlockValues<T>& lone_grad) {
  constexpr int L = kLanes<T>;
  BlockVectors<T> sums(height), products(height);
  for (int64_t r = 0; r < height; ++r) {
    T *row = scores.row(first + r), *row_grad = scores_grad.row(first + r);
    const Vec<T> row_lse = broadcast(lse[r]);
    Vec<T> sum{}, product{};
    for (int64_t v = 0; v < columns.vectors; ++v) {
      const Vec<T> p = exp2_nonpositive<T>((load(row + v * L) - row_lse) * kLog2E<T>);
      store(row + v * L, p);
      sum += p;
      product += p * load(row_grad + v * L);
    }
    sums.row[r] = sum;
    products.row[r] = product;
  }
  BlockValues<T> factor = reduce_block_add<T>(sums), delta = reduce_block_add<T>(products);
  for_each_vector<T>([&](int i) {
    Vec<T> sum = load(factor.data + i), product = load(delta.data + i);
    if (columns.lone) {
      const Vec<T> p = exp2_nonpositive<T>((load(lone.data + i) - load(lse.data + i)) * kLog2E<T>);
      const Vec<T> grad = load(lone_grad.data + i);
      sum += p;
      product += p * grad;
      store(lone.data + i, p / sum);
      store(lone_grad.data + i, p / sum * (grad - product / sum));
    }
    store(factor.data + i, T{1} / sum);
    store(delta.data + i, product / sum);
  });
  for (int64_t r = 0; r < height; ++r) {
    T *row = scores.row(first + r), *row_grad = scores_grad.row(first + r);
    const Vec<T> row_factor = broadcast(factor[r]), row_delta = broadcast(delta[r]);
    for (int64_t v = 0; v < columns.vectors; ++v) {
      const Vec<T> p = load(row + v * L) * row_factor;
      store(row + v * L, p);
      store(row_grad + v * L, p * (load(row_grad + v * L) - row_delta));
    }
    if (columns.lone) {
      row[columns.last()] = lone[r];
      row_grad[columns.last()] = lone_grad[r];
    }
  }
}

// ---- all windows of a call ----------------------------------------------------------------------------------------

template <class T>
struct Walk {
  const WindowAttentionProblem& problem;
  int64_t window_rows, window_columns;
  int64_t most_queries, most_keys, padded_keys;  // in any one window

  explicit Walk(const WindowAttentionProblem& p)
      : problem(p),
        window_rows(p.rows.windows()),
        window_columns(p.columns.windows()),
        most_queries(p.rows.most_queries() * p.columns.most_queries()),
        most_keys(most_queries / (p.rows.ratio * p.columns.ratio)),
        padded_keys(round_up(most_keys, kLanes<T>)) {}

  // Of the window in a row and column of the grid of windows.
  Tokens queries(int64_t row, int64_t column) const {
    return {problem.rows.queries(row), problem.columns.queries(column)};
  }
  Tokens keys(int64_t row, int64_t column) const { return {problem.rows.keys(row), problem.columns.keys(column)}; }

  // One value for each query of a window, from or to a map (B, heads, H, W).
  void gather_statistics(int64_t batch, int64_t head, const Tokens& tokens, const T* map, T* values) const {
    const int64_t width = tokens.columns.size;
    for (int64_t y = 0; y < tokens.rows.size; ++y) {
      std::copy_n(map + statistics(batch, head, tokens, y), width, values + y * width);
    }
  }
  void scatter_statistics(int64_t batch, int64_t head, const Tokens& tokens, const T* values, T* map) const {
    const int64_t width = tokens.columns.size;
    for (int64_t y = 0; y < tokens.rows.size; ++y) {
      std::copy_n(values + y * width, width, map + statistics(batch, head, tokens, y));
    }
  }
  // As many windows as are worth a thread.
  int64_t grain() const {
    constexpr int64_t kWorthwhile = 1 << 20;  // multiply-adds, some 20 microseconds
    return 1 + kWorthwhile / (2 * most_queries * most_keys * problem.dim);
  }

 private:
  // Where the values of a window's row y begin.
  int64_t statistics(int64_t batch, int64_t head, const Tokens& tokens, int64_t y) const {
    return ((batch * problem.heads + head) * problem.rows.size + tokens.rows.begin + y) * problem.columns.size +
           tokens.columns.begin;
  }
};

// The bias of one head as the current window sees it: rows of queries, columns of keys. The bias of a full window is
// used where it lies. A window that is cut off has pieces of its rows, which are copied side by side; columns without a
// key hold -inf, so that their probability is 0.
template <class T>
class WindowBias {
 public:
  WindowBias(const Walk<T>& walk, Arena& arena)
      : problem_(walk.problem),
        most_queries_(walk.most_queries),
        copy_(arena.take<T>(most_copied(walk) + kLanes<T>)),
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
    const bool in_place = used_in_place(queries.count(), columns);
    data_ = in_place ? bias : copy_;
    const int64_t stride = in_place ? window_keys_ : round_up(columns.count, kLanes<T>);
    if (stride != stride_) {
      stride_ = stride;
      for (int64_t i = 0; i < most_queries_; ++i) offset_[i] = i * stride;
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
          if (left == 1) {
            row[at + j] += grad[key + j];  // the lone key was stored alone, and is soonest loaded so
          } else {
            store_up_to<T>(row + at + j, load_up_to(row + at + j, left) + load_up_to(grad + key + j, left), left);
          }
        }
      });
      if (++x == width) x = 0, ++y;
    }
  }

 private:
  bool used_in_place(int64_t queries, const Columns<T>& columns) const {
    return queries == problem_.queries() && columns.width() <= columns.count;
  }

  // The most values that the copy for any window has.
  int64_t most_copied(const Walk<T>& walk) const {
    if (problem_.bias == nullptr) return walk.padded_keys;
    int64_t most = 0;
    for (const int64_t y : kinds(problem_.rows)) {
      for (const int64_t x : kinds(problem_.columns)) {
        const int64_t queries = problem_.rows.queries(y).size * problem_.columns.queries(x).size;
        const Columns<T> columns(problem_.rows.keys(y).size * problem_.columns.keys(x).size);
        if (!used_in_place(queries, columns)) most = std::max(most, queries * round_up(columns.count, kLanes<T>));
      }
    }
    return most;
  }
  // Windows of every size along an axis: only the first and the last can differ from the others.
  static std::array<int64_t, 3> kinds(const Axis& axis) {
    return {0, std::min<int64_t>(1, axis.windows() - 1), axis.windows() - 1};
  }

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
  int64_t most_queries_;
  T* copy_;
  int64_t* offset_;
  T* lone_;
  const T* data_ = nullptr;
  int64_t window_keys_ = 0;
  int64_t stride_ = 0;  // that offset_ was made for
  const Tokens *queries_ = nullptr, *keys_ = nullptr;
};

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
