// The windows of a call and the bias of their scores: what both forms of the kernels, on tokens
// (window_attention_tokens.h) and on planes (window_attention_planes.h), share.
#pragma once

#include "cpu/softmax.h"
#include "cpu/window_operand.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

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
        padded_keys(round_up(most_keys, kLanes<T>)) {
    for (int64_t i = 0; i < window_rows; ++i) rows_.push_back({p.rows.queries(i), p.rows.keys(i)});
    for (int64_t i = 0; i < window_columns; ++i) columns_.push_back({p.columns.queries(i), p.columns.keys(i)});
  }

  // Of the window in a row and column of the grid of windows.
  Tokens queries(int64_t row, int64_t column) const { return {rows_[row].queries, columns_[column].queries}; }
  Tokens keys(int64_t row, int64_t column) const { return {rows_[row].keys, columns_[column].keys}; }

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
  // The same map as a view with one channel.
  MapView statistics_view(const void* map) const {
    const int64_t width = problem.columns.size, head = problem.rows.size * width;
    return {const_cast<void*>(map), {problem.heads * head, width, 1, head, 0}};
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

  struct Spans {
    Span queries, keys;
  };
  std::vector<Spans> rows_, columns_;  // of the grid of windows
};

// ---- bias ---------------------------------------------------------------------------------------------------------

// The ways in which the edges of the map cut windows. Along an axis only the first and the last window can differ from
// the others, so there are at most nine; windows of one kind see the same part of the bias.
inline constexpr int kWindowKinds = 9;

inline int window_kind(const WindowAttentionProblem& problem, const Tokens& queries) {
  const auto along = [](const Axis& axis, const Span& span) {
    if (span.size == axis.window) return 1;
    return span.local > 0 ? 0 : 2;
  };
  return 3 * along(problem.rows, queries.rows) + along(problem.columns, queries.columns);
}

// Calls f(queries, keys) with the tokens of one window of every kind, of some kinds more than once.
template <class T, class F>
void for_each_window_kind(const Walk<T>& walk, F f) {
  const auto some = [](int64_t windows) {
    return std::array<int64_t, 3>{0, std::min<int64_t>(1, windows - 1), windows - 1};
  };
  for (const int64_t row : some(walk.window_rows)) {
    for (const int64_t column : some(walk.window_columns)) f(walk.queries(row, column), walk.keys(row, column));
  }
}

// Where the scores of a window lie in the bias of a whole window.
struct BiasPart {
  Tokens queries, keys;
  int64_t query_width, key_width, window_keys;  // of a whole window

  BiasPart(const WindowAttentionProblem& problem, const Tokens& window_queries, const Tokens& window_keys_)
      : queries(window_queries),
        keys(window_keys_),
        query_width(problem.columns.window),
        key_width(problem.columns.window / problem.columns.ratio),
        window_keys(problem.keys()) {}

  // Calls f(i, place of the first key's value) for every query i.
  template <class F>
  void for_each_query(F f) const {
    const int64_t first_key = keys.rows.local * key_width + keys.columns.local;
    for (int64_t y = 0, i = 0; y < queries.rows.size; ++y) {
      for (int64_t x = 0; x < queries.columns.size; ++x, ++i) {
        f(i, ((queries.rows.local + y) * query_width + queries.columns.local + x) * window_keys + first_key);
      }
    }
  }
  // The keys' values lie in `runs` runs of `run` values, key_width apart.
  bool one_run() const { return keys.columns.size == key_width; }
  int64_t runs() const { return one_run() ? 1 : keys.rows.size; }
  int64_t run() const { return one_run() ? keys.count() : keys.columns.size; }
};

// The bias of one head as the current window sees it: rows of queries, columns of keys. The bias of a whole window is
// used where it lies. A window that is cut has pieces of its rows, which are copied side by side; columns without a key
// hold -inf, so that their probability is 0.
//
// With `keep`, there is room for the copies of all kinds of windows, and they serve until the head changes.
template <class T>
class WindowBias {
 public:
  WindowBias(const Walk<T>& walk, bool keep, Arena& arena) : WindowBias(walk, walk.problem.bias, keep, arena) {}

  // Of `bias`, in the place of the problem's.
  WindowBias(const Walk<T>& walk, const void* bias, bool keep, Arena& arena)
      : problem_(walk.problem), bias_(static_cast<const T*>(bias)), keep_(keep) {
    std::array<int64_t, kWindowKinds> sizes{}, queries{};
    for_each_window_kind(walk, [&](const Tokens& window_queries, const Tokens& window_keys) {
      const int slot = slot_of(window_queries);
      sizes[slot] = std::max(sizes[slot], copied(window_queries.count(), Columns<T>(window_keys.count())));
      queries[slot] = std::max(queries[slot], window_queries.count());
    });
    for (int slot = 0; slot < kWindowKinds; ++slot) {
      if (queries[slot] == 0) continue;
      slots_[slot].copy = arena.take<T>(sizes[slot] + kLanes<T>);
      slots_[slot].lone = arena.take<T>(queries[slot] + kBlockValues<T>);
      if (arena.holds_memory()) std::fill_n(slots_[slot].lone, queries[slot] + kBlockValues<T>, T{0});
    }
    offset_ = arena.take<int64_t>(walk.most_queries);
    most_queries_ = walk.most_queries;
    if (arena.holds_memory()) std::fill_n(offset_, most_queries_, int64_t{0});
  }

  void select(int64_t head, const Tokens& queries, const Tokens& keys) {
    const Columns<T> columns(keys.count());
    const bool whole = used_in_place(queries.count(), columns);
    const int64_t head_size = problem_.queries() * problem_.keys();
    const T* bias = bias_;
    if (bias != nullptr && !problem_.bias_shared) bias += head * head_size;
    slot_ = &slots_[slot_of(queries)];
    data_ = whole ? bias : slot_->copy;
    set_stride(bias == nullptr ? 0 : whole ? problem_.keys() : round_up(columns.count, kLanes<T>));
    const int kind = window_kind(problem_, queries);
    if (slot_->bias == bias && slot_->kind == kind) return;
    slot_->bias = bias;
    slot_->kind = kind;
    if (bias == nullptr) {
      std::fill_n(slot_->copy, columns.count, T{0});
      end_row(slot_->copy, columns);
      return;
    }
    if (!whole) copy_part(bias, BiasPart(problem_, queries, keys), columns);
    if (!columns.lone) return;
    for (int64_t i = 0; i < queries.count(); ++i) slot_->lone[i] = data_[i * stride_ + columns.last()];
  }

  Rows<const T> rows() const { return {data_, offset_, 1}; }
  // The lone key's column, with room behind it for a block.
  const T* lone() const { return slot_->lone; }

 private:
  // What was selected last, of all windows or of one kind.
  struct Slot {
    T *copy = nullptr, *lone = nullptr;
    const T* bias = nullptr;  // that the copy was made of
    int kind = -1;
  };

  int slot_of(const Tokens& queries) const { return keep_ ? window_kind(problem_, queries) : 0; }
  bool used_in_place(int64_t queries, const Columns<T>& columns) const {
    return bias_ != nullptr && queries == problem_.queries() && columns.width() <= columns.count;
  }
  int64_t copied(int64_t queries, const Columns<T>& columns) const {
    if (used_in_place(queries, columns)) return 0;
    return (bias_ == nullptr ? 1 : queries) * round_up(columns.count, kLanes<T>);
  }
  void set_stride(int64_t stride) {
    if (stride == stride_) return;
    stride_ = stride;
    for (int64_t i = 0; i < most_queries_; ++i) offset_[i] = i * stride;
  }
  void copy_part(const T* bias, const BiasPart& part, const Columns<T>& columns) {
    T* const copy = slot_->copy;
    const int64_t stride = stride_;
    with_mover<T>(part.run(), part.runs(), 1, [&](auto mover) {
      part.for_each_query([&](int64_t i, int64_t place) {
        mover.gather(copy + i * stride, bias + place, part.key_width, part.runs(), part.run());
        end_row(copy + i * stride, columns);
      });
    });
  }
  // -inf behind the last key, up to a whole vector. More is stored, for the next row to overwrite.
  static void end_row(T* row, const Columns<T>& columns) {
    if (columns.width() > columns.count) store(row + columns.count, broadcast(-std::numeric_limits<T>::infinity()));
  }

  const WindowAttentionProblem& problem_;
  const T* bias_;
  bool keep_;
  std::array<Slot, kWindowKinds> slots_{};
  Slot* slot_ = nullptr;
  const T* data_ = nullptr;
  int64_t* offset_ = nullptr;
  int64_t most_queries_ = 0, stride_ = 0;  // that offset_ was made for
};

// The gradient of one head's bias, summed over windows. Each kind of window has a sum of its own, in the layout of its
// scores; in the end they are put where they belong.
template <class T>
class BiasGrad {
 public:
  BiasGrad(const Walk<T>& walk, bool wanted, Arena& arena) : problem_(walk.problem) {
    if (!wanted) return;
    for_each_window_kind(walk, [&](const Tokens& queries, const Tokens& keys) {
      Sum& sum = sums_[window_kind(problem_, queries)];
      if (sum.stride > 0) return;
      sum.stride = round_up(keys.count(), kLanes<T>);
      sum.data = arena.take<T>(queries.count() * sum.stride);
    });
  }

  void begin() {
    for (Sum& sum : sums_) sum.windows = 0;
  }

  void select(const Tokens& queries, const Tokens& keys) {
    sum_ = &sums_[window_kind(problem_, queries)];
    if (sum_->windows++ > 0) return;
    sum_->queries = queries;
    sum_->keys = keys;
    std::fill_n(sum_->data, queries.count() * sum_->stride, T{0});
  }

  // Adds the gradient of the scores of `height` queries, the first of them `first`.
  void add(const Matrix<T>& scores_grad, int64_t first, int64_t height, const Columns<T>& columns) const {
    for (int64_t i = first; i < first + height; ++i) {
      T* sum = sum_->data + i * sum_->stride;
      const T* grad = scores_grad.row(i);
      for (int64_t j = 0; j < columns.width(); j += kLanes<T>) store(sum + j, load(sum + j) + load(grad + j));
      if (columns.lone) sum[columns.last()] += grad[columns.last()];
    }
  }

  // out = the sum over all windows since `begin`.
  void finish(T* out) const {
    std::fill_n(out, problem_.queries() * problem_.keys(), T{0});
    for (const Sum& sum : sums_) {
      if (sum.windows == 0) continue;
      const BiasPart part(problem_, sum.queries, sum.keys);
      part.for_each_query([&](int64_t i, int64_t place) {
        const T* row = sum.data + i * sum.stride;
        for (int64_t run = 0; run < part.runs(); ++run) {
          for (int64_t j = 0; j < part.run(); ++j) out[place + run * part.key_width + j] += *row++;
        }
      });
    }
  }

 private:
  struct Sum {
    T* data = nullptr;
    int64_t stride = 0, windows = 0;
    Tokens queries{}, keys{};
  };

  const WindowAttentionProblem& problem_;
  std::array<Sum, kWindowKinds> sums_{};
  Sum* sum_ = nullptr;
};

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
