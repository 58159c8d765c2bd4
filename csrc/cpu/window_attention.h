// Window attention on the CPU: what the operator (window_attention.cpp) and its kernels (window_attention_kernel.h)
// share.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "cpu/storage.h"
#include "cpu/tangents.h"

namespace vitfast::cpu {

// A (B, H, W, heads, D) tensor; strides in elements.
struct MapView {
  void* data = nullptr;
  std::array<int64_t, 5> stride{};
};

// One axis of the grid of windows: where window `index` lies on the map.
struct Span {
  int64_t begin;  // first row (or column) of the map in the window
  int64_t size;   // how many of the window's rows lie on the map
  int64_t local;  // the place of `begin` inside the window
};

struct Axis {
  int64_t size;    // of the query map
  int64_t window;  // of the queries
  int64_t shift;
  int64_t ratio;  // queries per key along this axis

  int64_t first() const { return shift == 0 ? 0 : shift - window; }  // where the grid begins
  int64_t windows() const { return (size - first() + window - 1) / window; }
  Span queries(int64_t index) const {
    const int64_t begin = first() + index * window;
    const int64_t from = std::max<int64_t>(begin, 0), to = std::min(begin + window, size);
    return {from, to - from, from - begin};
  }
  int64_t most_queries() const {  // in any one window
    int64_t most = 0;
    for (int64_t index = 0; index < windows(); ++index) most = std::max(most, queries(index).size);
    return most;
  }
  Span keys(int64_t index) const {
    const Span span = queries(index);
    if (ratio == 1) return span;
    return {span.begin / ratio, span.size / ratio, span.local / ratio};
  }
};

struct WindowAttentionProblem {
  Storage storage;
  int64_t batch, heads, dim;
  Axis rows, columns;
  double scale;
  const void* bias;    // (heads or 1, queries, keys) contiguous in the computing dtype, or null
  bool bias_shared;    // by all heads
  bool channels_last;  // the heads of a token lie side by side in the query: they are then taken in turn

  int64_t windows() const { return rows.windows() * columns.windows(); }
  int64_t queries() const { return rows.window * columns.window; }  // of a full window
  int64_t keys() const { return queries() / (rows.ratio * columns.ratio); }
};

struct WindowAttentionForward {
  WindowAttentionProblem problem;
  MapView query, key, value, out;
  void* lse;  // (B, heads, H, W) contiguous in the computing dtype, or null
};

struct WindowAttentionBackward {
  WindowAttentionProblem problem;
  MapView grad, query, key, value, grad_query, grad_key, grad_value;
  const void* lse;
  // Sums of the scores' gradients, (heads, splits, queries, keys) in the computing dtype, or null. The windows of a
  // head are cut into `splits` runs, each summed in order by one task: the result does not depend on the number of
  // threads.
  void* bias_grad;
  int64_t splits;
};

// Of the form of `WindowAttentionProblem::bias`.
struct WindowBiasView {
  const void* data = nullptr;
};

using WindowAttentionTangents = TangentsCall<WindowAttentionProblem, MapView, WindowBiasView>;

struct WindowAttentionKernels {
  void (*forward)(const WindowAttentionForward&);
  void (*backward)(const WindowAttentionBackward&);
  void (*tangents)(const WindowAttentionTangents&);
};

namespace baseline {
extern const WindowAttentionKernels window_attention_kernels;
}
namespace avx2 {
extern const WindowAttentionKernels window_attention_kernels;
}
namespace avx512 {
extern const WindowAttentionKernels window_attention_kernels;
}

}  // namespace vitfast::cpu
