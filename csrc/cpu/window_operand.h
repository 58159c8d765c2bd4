// The tokens of a window as matrices: in place in the feature map where that works, copied where it does not.
#pragma once

#include "cpu/matrix.h"
#include "cpu/prefetch.h"

namespace vitfast::cpu::VITFAST_ISA {

// The tokens of one window in one map: those of a span of rows and one of columns, row by row.
struct Tokens {
  Span rows, columns;
  int64_t count() const { return rows.size * columns.size; }
};

// A window of one head and image.
struct Item {
  int64_t batch, head;
  int64_t row, column;  // in the grid of windows
};

template <class S>
S* first_element(const MapView& view, int64_t batch, int64_t head, const Tokens& tokens) {
  return static_cast<S*>(view.data) + batch * view.stride[0] + head * view.stride[3] +
         tokens.rows.begin * view.stride[1] + tokens.columns.begin * view.stride[2];
}

// One map's part in the current window and head, its tokens as rows, [count][D].
//
// They are used where they lie if their elements are adjacent, of the computing dtype and whole vectors. Otherwise
// `gather` copies them and `scatter` puts them back.
template <class S>
class TokenRows {
 public:
  using Storage = S;
  using T = Compute<S>;

  TokenRows(const MapView& view, int64_t dim, int64_t most_tokens, Arena& arena)
      : view_(view),
        dim_(dim),
        copy_stride_(round_up(dim, kLanes<T>)),
        in_place_(std::is_same_v<S, T> && view.stride[4] == 1 && dim % kLanes<T> == 0),
        offset_(arena.take<int64_t>(most_tokens)) {
    if (!in_place_) copy_ = arena.take<T>(most_tokens * copy_stride_);
  }

  // Turns to the tokens of another window, head and image. `tokens` must stay until the next call.
  void select(const Item& item, const Tokens& tokens) {
    data_ = first_element<S>(view_, item.batch, item.head, tokens);
    tokens_ = &tokens;
    if (tokens.rows.size == table_rows_ && tokens.columns.size == table_columns_) return;
    table_rows_ = tokens.rows.size;
    table_columns_ = tokens.columns.size;
    int64_t i = 0;
    for (int64_t y = 0; y < tokens.rows.size; ++y) {
      for (int64_t x = 0; x < tokens.columns.size; ++x, ++i) {
        offset_[i] = in_place_ ? y * view_.stride[1] + x * view_.stride[2] : i * copy_stride_;
      }
    }
  }

  // Of the tokens of an item; of no use to a map whose elements lie apart.
  Prefetch prefetch(const Item& item, const Tokens& tokens, int64_t steps) const {
    constexpr int64_t size = sizeof(S);
    return {first_element<S>(view_, item.batch, item.head, tokens),
            view_.stride[1] * size,
            view_.stride[2] * size,
            tokens.rows.size,
            tokens.columns.size,
            view_.stride[4] == 1 ? dim_ * size : 0,
            steps};
  }

  // After `gather` or before `scatter`.
  Rows<T> rows() const {
    if constexpr (std::is_same_v<S, T>) {
      if (in_place_) return {data_, offset_, 1};
    }
    return {copy_, offset_, 1};
  }

  void gather() {
    if (in_place_) return;
    for_each_token([&](int64_t i, S* token) { load_token(token, copy_ + offset_[i]); });
  }

  // The first `count` tokens transposed, dst [D][stride], zeros up to a whole vector.
  void gather_transposed(int64_t count, T* dst, int64_t stride) {
    gather();
    const Rows<T> source = rows();
    transpose_rows<T>([&](int64_t i) { return source.row(i); }, count, dim_, dst, stride);
  }

  // The last token, [D], zeros up to a whole vector.
  void gather_last(T* dst) const {
    load_token(data_ + (tokens_->rows.size - 1) * view_.stride[1] + (tokens_->columns.size - 1) * view_.stride[2], dst);
  }

  void scatter() {
    if (in_place_) return;
    for_each_token([&](int64_t i, S* token) {
      const T* src = copy_ + offset_[i];
      if (view_.stride[4] == 1) {
        for (int64_t d = 0; d < dim_; d += kLanes<T>) store_as_storage_up_to(token + d, load(src + d), dim_ - d);
      } else {
        for (int64_t d = 0; d < dim_; ++d) token[d * view_.stride[4]] = static_cast<S>(src[d]);
      }
    });
  }

 private:
  template <class F>
  void for_each_token(F f) const {
    for (int64_t y = 0, i = 0; y < tokens_->rows.size; ++y) {
      for (int64_t x = 0; x < tokens_->columns.size; ++x, ++i) f(i, data_ + y * view_.stride[1] + x * view_.stride[2]);
    }
  }

  void load_token(const S* token, T* dst) const {
    if (view_.stride[4] == 1) {
      for (int64_t d = 0; d < dim_; d += kLanes<T>) store(dst + d, load_as_compute_up_to(token + d, dim_ - d));
    } else {
      for (int64_t d = 0; d < dim_; ++d) dst[d] = static_cast<T>(token[d * view_.stride[4]]);
      std::fill(dst + dim_, dst + copy_stride_, T{0});
    }
  }

  MapView view_;
  int64_t dim_, copy_stride_;
  bool in_place_;
  int64_t* offset_;
  T* copy_ = nullptr;  // [tokens][copy_stride]
  S* data_ = nullptr;  // the window's first element
  const Tokens* tokens_ = nullptr;
  int64_t table_rows_ = 0, table_columns_ = 0;  // of the window that offset_ was made for
};

// Rows of a window, `width` values wide, moved between a map, where rows are `stride` apart, and a plane of a copy,
// where they are adjacent. Rows are short, and masked accesses cost more than the work: these move a row of a certain
// length in bytes, in pieces that may overlap.
template <class T, int kPiece>  // kPiece <= bytes <= 2 kPiece
struct MoveRows {
  static bool fits(int64_t width, int64_t) {
    const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
    return kPiece <= bytes && bytes <= 2 * kPiece;
  }
  static void move(T* dst, const T* src, int64_t width) {
    const int64_t second = width - kPiece / static_cast<int64_t>(sizeof(T));
    char first_piece[kPiece], second_piece[kPiece];
    std::memcpy(first_piece, src, kPiece);
    std::memcpy(second_piece, src + second, kPiece);
    std::memcpy(dst, first_piece, kPiece);
    std::memcpy(dst + second, second_piece, kPiece);
  }
  // All rows but the last move too much, which lies in the row after them and is overwritten with it.
  static void gather(T* plane, const T* map, int64_t stride, int64_t height, int64_t width) {
    for (int64_t y = 0; y + 1 < height; ++y, plane += width, map += stride) {
      char piece[2 * kPiece];
      std::memcpy(piece, map, sizeof(piece));
      std::memcpy(plane, piece, sizeof(piece));
    }
    move(plane, map, width);
  }
  static void scatter(const T* plane, T* map, int64_t stride, int64_t height, int64_t width) {
    for (int64_t y = 0; y < height; ++y, plane += width, map += stride) move(map, plane, width);
  }
};

#if VITFAST_VECTOR_BYTES == 64
// A square of 4x4 values, its rows `stride` apart, is one vector.
inline constexpr int64_t kSquareSide = 4;

inline Vec<float> load_square(const float* p, int64_t stride) {
  __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(p));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + stride), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 2 * stride), 2);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 3 * stride), 3);
  return (Vec<float>)x;
}
inline void store_square(float* p, int64_t stride, Vec<float> square) {
  const __m512 x = (__m512)square;
  _mm_storeu_ps(p, _mm512_castps512_ps128(x));
  _mm_storeu_ps(p + stride, _mm512_extractf32x4_ps(x, 1));
  _mm_storeu_ps(p + 2 * stride, _mm512_extractf32x4_ps(x, 2));
  _mm_storeu_ps(p + 3 * stride, _mm512_extractf32x4_ps(x, 3));
}

// Rows of a square, moved as one vector.
struct MoveSquare {
  static bool fits(int64_t width, int64_t height) { return width == kSquareSide && height == kSquareSide; }
  static void gather(float* plane, const float* map, int64_t stride, int64_t, int64_t) {
    store(plane, load_square(map, stride));
  }
  static void scatter(const float* plane, float* map, int64_t stride, int64_t, int64_t) {
    store_square(map, stride, load(plane));
  }
};
#endif

// Rows of any length and storage type, their elements `step` apart. A gather of adjacent elements stores whole vectors;
// what is too much is overwritten by the next row, or the next plane.
template <class S>
struct MoveAnyRows {
  using T = Compute<S>;
  int64_t step;

  void gather(T* plane, const S* map, int64_t stride, int64_t height, int64_t width) const {
    for (int64_t y = 0; y < height; ++y, plane += width, map += stride) {
      if (step == 1) {
        for (int64_t x = 0; x < width; x += kLanes<T>) store(plane + x, load_as_compute_up_to(map + x, width - x));
      } else {
        for (int64_t x = 0; x < width; ++x) plane[x] = static_cast<T>(map[x * step]);
      }
    }
  }
  void scatter(const T* plane, S* map, int64_t stride, int64_t height, int64_t width) const {
    for (int64_t y = 0; y < height; ++y, plane += width, map += stride) {
      if (step == 1) {
        for (int64_t x = 0; x < width; x += kLanes<T>) store_as_storage_up_to(map + x, load(plane + x), width - x);
      } else {
        for (int64_t x = 0; x < width; ++x) map[x * step] = static_cast<S>(plane[x]);
      }
    }
  }
};

// Calls f with the way of moving rows that fits.
template <class S, class F>
void with_mover(int64_t width, int64_t height, int64_t step, F f) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    if (step == 1) {
#if VITFAST_VECTOR_BYTES == 64
      if constexpr (std::is_same_v<S, float>) {
        if (MoveSquare::fits(width, height)) return f(MoveSquare());
      }
#endif
      if (MoveRows<S, 64>::fits(width, height)) return f(MoveRows<S, 64>());
      if (MoveRows<S, 32>::fits(width, height)) return f(MoveRows<S, 32>());
      if (MoveRows<S, 16>::fits(width, height)) return f(MoveRows<S, 16>());
      if (MoveRows<S, 8>::fits(width, height)) return f(MoveRows<S, 8>());
    }
  }
  f(MoveAnyRows<S>{step});
}

// Windows of one head and image that lie side by side and are of one size.
struct Strip {
  int64_t batch, head;
  int64_t row, column;  // of the first window, in the grid of windows
  int64_t windows;      // how many
};

// One map's part in the current strip, its channels as planes, [D][count] for every window.
//
// They are used where they lie if a plane's tokens are adjacent, of the computing dtype, and fill whole vectors but for
// a lone token: then the window is as wide as the map. Otherwise `gather` copies them and `scatter` puts them back, all
// windows of a strip together, because a plane of a strip is adjacent in memory and a plane of a window is not.
template <class S>
class TokenPlanes {
 public:
  using T = Compute<S>;

  TokenPlanes(const MapView& view, int64_t dim, int64_t most_tokens, int64_t most_windows, Arena& arena)
      : view_(view),
        dim_(dim),
        copy_stride_(round_up(most_tokens, kLanes<T>)),
        offset_(arena.take<int64_t>(dim)),
        copy_(arena.take<T>(most_windows * window_size())) {
    if (!arena.holds_memory()) return;
    for (int64_t d = 0; d < dim; ++d) offset_[d] = d * copy_stride_;
  }

  // Turns to the first window, with these tokens, of another strip.
  void select(const Strip& strip, const Tokens& tokens) {
    windows_ = strip.windows;
    tokens_ = tokens;
    window_ = 0;
    map_ = first_element<S>(view_, strip.batch, strip.head, tokens);
    const bool adjacent = view_.stride[2] == 1 && (tokens.rows.size == 1 || view_.stride[1] == tokens.columns.size);
    const Columns<T> columns(tokens.count());
    const bool in_place = std::is_same_v<S, T> && strip.windows == 1 && adjacent && columns.width() <= columns.count;
    if (in_place == in_place_) return;
    in_place_ = in_place;
    for (int64_t d = 0; d < dim_; ++d) offset_[d] = d * stride();
  }
  void select_window(int64_t window) { window_ = window; }

  // Of a strip whose first window has these tokens.
  Prefetch prefetch(const Strip& strip, const Tokens& tokens, int64_t steps) const {
    constexpr int64_t size = sizeof(S);
    const S* data = first_element<S>(view_, strip.batch, strip.head, tokens);
    const int64_t rows = tokens.rows.size, row = (strip.windows * tokens.columns.size - 1) * view_.stride[2] + 1;
    const bool adjacent = view_.stride[1] == row;
    return {data, view_.stride[4] * size, view_.stride[1] * size,
            dim_, adjacent ? 1 : rows,    (adjacent ? rows * row : row) * size,
            steps};
  }

  // The planes, [D][count], after `gather` or before `scatter`.
  Rows<T> rows() const { return {data(), offset_, 1}; }
  // The tokens, [count][D], as a left factor.
  Rows<T> transposed() const { return {data(), nullptr, stride()}; }

  void gather() {
    if (in_place_) return;
    const int64_t count = tokens_.count(), most = copy_stride_;
    for_each_plane([count, most](auto mover, T* plane, const S* map, int64_t stride, int64_t height, int64_t width) {
      mover.gather(plane, map, stride, height, width);
      // Columns without a token must be finite. The next plane overwrites what is too much.
      if (count < most) store(plane + count, Vec<T>{});
    });
  }

  void scatter() {
    if (in_place_) return;
    for_each_plane([](auto mover, const T* plane, S* map, int64_t stride, int64_t height, int64_t width) {
      mover.scatter(plane, map, stride, height, width);
    });
  }

 private:
  // Calls f(mover, plane of the copy, its place in the map, ...) for every plane of all windows, in the map's order.
  template <class F>
  void for_each_plane(F f) const {
    const int64_t height = tokens_.rows.size, width = tokens_.columns.size, windows = windows_;
    const int64_t size = window_size(), plane_stride = copy_stride_;
    const int64_t channel = view_.stride[4], row = view_.stride[1], column = view_.stride[2], dim = dim_;
    T* const copy = copy_;
    S* const map = map_;
    with_mover<S>(width, height, column, [=](auto mover) {
      for (int64_t d = 0; d < dim; ++d) {
        for (int64_t w = 0; w < windows; ++w) {
          f(mover, copy + w * size + d * plane_stride, map + d * channel + w * width * column, row, height, width);
        }
      }
    });
  }

  T* data() const {
    if constexpr (std::is_same_v<S, T>) {
      if (in_place_) return map_;
    }
    return copy_ + window_ * window_size();
  }
  int64_t stride() const { return in_place_ ? view_.stride[4] : copy_stride_; }
  int64_t window_size() const { return dim_ * copy_stride_ + kLanes<T>; }  // with room for what is stored too much

  MapView view_;
  int64_t dim_, copy_stride_;
  int64_t* offset_;  // of the planes
  T* copy_;          // [windows][D][copy_stride]
  bool in_place_ = false;
  S* map_ = nullptr;  // the strip's first element
  Tokens tokens_{};   // of the first window
  int64_t windows_ = 0, window_ = 0;
};

}  // namespace vitfast::cpu::VITFAST_ISA
