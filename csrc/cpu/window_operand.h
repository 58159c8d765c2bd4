// The tokens of a window as matrices: in place in the feature map where that works, copied where it does not.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/kernel_prelude.h"

namespace vitfast::cpu::VITFAST_ISA {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The tokens of one window in one map: those of a span of rows and one of columns, row by row.
struct Tokens {
  Span rows, columns;
  int64_t count() const { return rows.size * columns.size; }
};

// A window of one head and image.
struct Item {
  int64_t batch, head, window;
};

// A matrix in scratch, with room behind it for one vector that is stored over its end.
template <class T>
class Matrix {
 public:
  Matrix() = default;
  Matrix(int64_t rows, int64_t most_columns, Arena& arena)
      : rows_(rows), data_(arena.take<T>(rows * most_columns + kLanes<T>)), offset_(arena.take<int64_t>(rows)) {}

  void set_columns(int64_t columns) {
    if (columns == columns_) return;
    columns_ = columns;
    for (int64_t r = 0; r < rows_; ++r) offset_[r] = r * columns;
  }
  int64_t columns() const { return columns_; }
  T* row(int64_t r) const { return data_ + r * columns_; }
  Rows<T> rows() const { return {data_, offset_, 1}; }

 private:
  int64_t rows_ = 0, columns_ = 0;
  T* data_ = nullptr;
  int64_t* offset_ = nullptr;
};

// dst(c)[r] = src(r)[c] for r < rows, c < columns; zeros from r = rows up to a whole vector.
template <class T, class Source>
void transpose_rows(Source src, int64_t rows, int64_t columns, T* dst, int64_t dst_stride) {
  constexpr int L = kLanes<T>;
  for (int64_t r0 = 0; r0 < rows; r0 += L) {
    const T* row[L];
    const int64_t height = std::min<int64_t>(L, rows - r0);
    for (int64_t r = 0; r < L; ++r) row[r] = src(r0 + std::min(r, height - 1));
    for (int64_t c0 = 0; c0 < columns; c0 += L) {
      const int64_t width = std::min<int64_t>(L, columns - c0);
      Vec<T> block[L];
      if (width == L) {
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) block[r] = load(row[r] + c0);
      } else {
        for (int r = 0; r < L; ++r) block[r] = load_partial(row[r] + c0, width);
      }
      for (int64_t r = height; r < L; ++r) block[r] = Vec<T>{};
      transpose<T>(block);
      for (int64_t c = 0; c < width; ++c) store(dst + (c0 + c) * dst_stride + r0, block[c]);
    }
  }
}

enum class Access {
  kVectors,    // rows of tokens, loaded or stored as vectors
  kBroadcast,  // elements read one by one: the left factor of a product
};

// Fetches runs of memory into the caches, a few at a time, while other work goes on.
class Prefetch {
 public:
  // A run begins at data + y * row_stride + x * column_stride, x < columns the faster, and has `bytes` bytes. Strides are
  // in bytes.
  Prefetch(const void* data, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, int64_t bytes)
      : data_(reinterpret_cast<uintptr_t>(data)),
        row_stride_(row_stride),
        column_stride_(column_stride),
        columns_(columns),
        count_(rows * columns),
        bytes_(bytes) {}

  // Goes on until the share done / all of the runs is fetched.
  void advance(int64_t done, int64_t all) {
    const int64_t until = count_ * done / all;
    int64_t x = x_, y = y_;
    for (int64_t i = next_; i < until; ++i) {
      const uintptr_t run = data_ + y * row_stride_ + x * column_stride_, end = run + bytes_;
      for (uintptr_t line = run & ~uintptr_t{kCacheLine - 1}; line < end; line += kCacheLine) {
        __builtin_prefetch(reinterpret_cast<const void*>(line));
      }
      if (++x == columns_) x = 0, ++y;
    }
    next_ = until, x_ = x, y_ = y;
  }

 private:
  static constexpr uintptr_t kCacheLine = 64;

  uintptr_t data_;
  int64_t row_stride_, column_stride_, columns_, count_, bytes_;
  int64_t y_ = 0, x_ = 0, next_ = 0;
};

// One map's part in the current window and head.
//
// Its tokens are rows where they lie, [count][D], if their elements are adjacent, of the computing dtype and, for access
// by vectors, whole vectors. Otherwise `gather` copies them and `scatter` puts them back. A map whose elements lie apart,
// as in channels-first maps where a row of the window is contiguous, is copied as planes, [D][count], first; the left
// factor of a product is left so.
template <class S>
class Operand {
 public:
  using T = Compute<S>;

  Operand(const MapView& view, int64_t dim, int64_t most_tokens, Arena& arena, Access access = Access::kVectors)
      : view_(view), dim_(dim), offset_(arena.take<int64_t>(most_tokens)) {
    const bool adjacent = view.stride[4] == 1;
    in_place_ = std::is_same_v<S, T> && adjacent && (access == Access::kBroadcast || dim % kLanes<T> == 0);
    as_planes_ = !adjacent && access == Access::kBroadcast;
    if (!adjacent) {
      planes_ = Matrix<T>(dim, round_up(most_tokens, kLanes<T>), arena);
      if (arena.holds_memory()) planes_.set_columns(round_up(most_tokens, kLanes<T>));
    }
    if (!in_place_ && !as_planes_) copy_ = arena.take<T>(most_tokens * round_up(dim, kLanes<T>));
  }

  // Turns to the tokens of another window, head and image. `tokens` must stay until the next call.
  void select(const Item& item, const Tokens& tokens) {
    data_ = first(item, tokens);
    tokens_ = &tokens;
    if (tokens.rows.size == table_rows_ && tokens.columns.size == table_columns_) return;
    table_rows_ = tokens.rows.size;
    table_columns_ = tokens.columns.size;
    const int64_t copy_stride = round_up(dim_, kLanes<T>);
    int64_t i = 0;
    for (int64_t y = 0; y < tokens.rows.size; ++y) {
      for (int64_t x = 0; x < tokens.columns.size; ++x, ++i) {
        offset_[i] = in_place_ ? y * view_.stride[1] + x * view_.stride[2] : as_planes_ ? i : i * copy_stride;
      }
    }
  }

  // Of what `gather` or a product will read after `select`.
  Prefetch prefetch(const Item& item, const Tokens& tokens) const {
    constexpr int64_t size = sizeof(S);
    const S* data = first(item, tokens);
    if (view_.stride[4] == 1) {
      return {data, view_.stride[1] * size, view_.stride[2] * size, tokens.rows.size, tokens.columns.size, dim_ * size};
    }
    const int64_t run = (tokens.columns.size - 1) * view_.stride[2] + 1;  // all of a row in one plane
    return {data, view_.stride[4] * size, view_.stride[1] * size, dim_, tokens.rows.size, run * size};
  }

  // Whether a token's elements are adjacent in `rows()`; they are a column of `planes()` otherwise.
  bool has_rows() const { return !as_planes_; }

  // The tokens as rows of a matrix, [count][D], after `gather` or before `scatter` if copied.
  Rows<T> rows() const {
    if constexpr (std::is_same_v<S, T>) {
      if (in_place_) return {data_, offset_, 1};
    }
    if (as_planes_) return {planes_.row(0), offset_, planes_.columns()};
    return {copy_, offset_, 1};
  }
  Rows<T> planes() const { return planes_.rows(); }

  void gather() {
    if (in_place_) return;
    if (planes_.rows().data == nullptr) {
      for_each_token([&](int64_t i, S* token) { copy_token(token, copy_ + offset_[i]); });
    } else {
      gather_planes(planes_.row(0), planes_.columns());
      if (as_planes_) return;
      transpose_rows<T>([&](int64_t d) { return planes_.row(d); }, dim_, tokens_->count(), copy_,
                        round_up(dim_, kLanes<T>));
    }
  }

  // The first `count` tokens transposed, dst [D][stride], finite up to a whole vector.
  void gather_transposed(int64_t count, T* dst, int64_t stride) {
    if (view_.stride[4] != 1) {
      gather_planes(dst, stride);
    } else {
      gather();
      const Rows<T> source = rows();
      transpose_rows<T>([&](int64_t i) { return source.row(i); }, count, dim_, dst, stride);
    }
  }

  // The last token, [D], zeros up to a whole vector.
  void gather_last(T* dst) const {
    S* token = data_ + (tokens_->rows.size - 1) * view_.stride[1] + (tokens_->columns.size - 1) * view_.stride[2];
    copy_token(token, dst);
  }

  void scatter() {
    if (in_place_) return;
    if (planes_.rows().data == nullptr) {
      for_each_token([&](int64_t i, S* token) {
        for (int64_t d = 0; d < dim_; d += kLanes<T>) {
          store_as_storage_up_to(token + d, load(copy_ + offset_[i] + d), dim_ - d);
        }
      });
    } else {
      transpose_rows<T>([&](int64_t i) { return copy_ + offset_[i]; }, tokens_->count(), dim_, planes_.row(0),
                        planes_.columns());
      scatter_planes();
    }
  }

 private:
  S* first(const Item& item, const Tokens& tokens) const {
    return static_cast<S*>(view_.data) + item.batch * view_.stride[0] + item.head * view_.stride[3] +
           tokens.rows.begin * view_.stride[1] + tokens.columns.begin * view_.stride[2];
  }

  template <class F>
  void for_each_token(F f) const {
    for (int64_t y = 0, i = 0; y < tokens_->rows.size; ++y) {
      for (int64_t x = 0; x < tokens_->columns.size; ++x, ++i) f(i, data_ + y * view_.stride[1] + x * view_.stride[2]);
    }
  }

  void copy_token(S* token, T* dst) const {
    if (view_.stride[4] == 1) {
      for (int64_t d = 0; d < dim_; d += kLanes<T>) store(dst + d, load_as_compute_up_to(token + d, dim_ - d));
    } else {
      std::fill(dst + dim_, dst + round_up(dim_, kLanes<T>), T{0});
      for (int64_t d = 0; d < dim_; ++d) dst[d] = static_cast<T>(token[d * view_.stride[4]]);
    }
  }

  // dst[d][token]. Whole vectors are stored, and the next run or plane overwrites what was too much.
  void gather_planes(T* dst, int64_t stride) const {
    const int64_t columns = tokens_->columns.size;
    for (int64_t d = 0; d < dim_; ++d) {
      T* plane = dst + d * stride;
      for (int64_t y = 0; y < tokens_->rows.size; ++y, plane += columns) {
        const S* run = data_ + d * view_.stride[4] + y * view_.stride[1];
        if (view_.stride[2] == 1) {
          for (int64_t x = 0; x < columns; x += kLanes<T>) {
            store(plane + x, load_as_compute_up_to(run + x, columns - x));
          }
        } else {
          for (int64_t x = 0; x < columns; ++x) plane[x] = static_cast<T>(run[x * view_.stride[2]]);
        }
      }
      if (plane < dst + d * stride + stride) store(plane, Vec<T>{});
    }
  }

  void scatter_planes() const {
    const int64_t columns = tokens_->columns.size;
    for (int64_t d = 0; d < dim_; ++d) {
      const T* plane = planes_.row(d);
      for (int64_t y = 0; y < tokens_->rows.size; ++y, plane += columns) {
        S* run = data_ + d * view_.stride[4] + y * view_.stride[1];
        if (view_.stride[2] == 1) {
          for (int64_t x = 0; x < columns; x += kLanes<T>) {
            store_as_storage_up_to(run + x, load(plane + x), columns - x);
          }
        } else {
          for (int64_t x = 0; x < columns; ++x) run[x * view_.stride[2]] = static_cast<S>(plane[x]);
        }
      }
    }
  }

  MapView view_;
  int64_t dim_;
  int64_t* offset_;
  bool in_place_ = false, as_planes_ = false;
  T* copy_ = nullptr;  // [tokens][D rounded up to whole vectors]
  Matrix<T> planes_;   // [D][tokens]
  S* data_ = nullptr;  // the window's first element
  const Tokens* tokens_ = nullptr;
  int64_t table_rows_ = 0, table_columns_ = 0;  // of the window that offset_ was made for
};

}  // namespace vitfast::cpu::VITFAST_ISA
