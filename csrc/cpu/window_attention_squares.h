// Windows of 4x4 tokens in channels-first maps: with AVX-512 the 16 tokens of a channel are one vector of float32.
//
// All matrices of scores are then 16 vectors, and stay in registers where they are used:
//
//   S^T = K Q^T      16 sums over the channels, one for each key
//   O^T = V^T P^T    P^T in registers, and every channel of V a row of 16 factors; likewise
//   dQ^T = scale K^T dS^T,  dK^T = scale Q^T dS,  dV^T = G^T P
//
// Every element of a map is read once for each product, so maps are used where they lie: the vectors are put together
// from four rows on their way into a register, results go to their four rows from there, and nothing is copied.
#pragma once

#include "cpu/window_attention_planes.h"

#if VITFAST_VECTOR_BYTES == 64

namespace vitfast::cpu::VITFAST_ISA {
namespace {

inline constexpr int64_t kSquareTokens = kSquareSide * kSquareSide;
static_assert(kSquareTokens == kLanes<float>);

// Windows that lie side by side are taken together, as many as share cache lines.
inline constexpr int64_t kSquaresTogether = 4;

class SquareTasks : public StripTasks<float> {
 public:
  explicit SquareTasks(const Walk<float>& walk)
      : StripTasks<float>(walk, std::min(kSquaresTogether, walk.window_columns)) {}
};

// A map's part in a strip of windows, and where the next strip lies. A channel of a strip fills as many cache lines as
// it has windows, if it fills any: each window prefetches one of them, channel by channel, as it goes through its own.
struct SquareMap {
  float* data;  // the first channel of the first window
  int64_t channel, row;
  int64_t line = 0;   // from a window's cache line of the next strip to the next window's
  int64_t ahead = 0;  // from the data to the cache line to prefetch

  SquareMap(const MapView& view, const Strip& strip)
      : data(static_cast<float*>(view.data) + strip.batch * view.stride[0] + strip.head * view.stride[3] +
             strip.row * kSquareSide * view.stride[1] + strip.column * kSquareSide),
        channel(view.stride[4]),
        row(view.stride[1]) {}
  SquareMap(const MapView& view, const Strip& strip, const Strip& next) : SquareMap(view, strip) {
    line = row == next.windows * kSquareSide ? kSquareTokens : row;
    ahead = SquareMap(view, next).data - data;
  }

  SquareMap of(int64_t window) const {
    SquareMap part = *this;
    part.data += window * kSquareSide;
    part.ahead += window * (line - kSquareSide);
    return part;
  }
  // What is asked for is then in the caches already.
  SquareMap prefetching_itself() const {
    SquareMap part = *this;
    part.line = kSquareSide;
    part.ahead = 0;
    return part;
  }
};

// Both products are kept out of line: inlined, the strides of many maps would push their rows out of the registers.

// matrix = left^T right, [16][16] = [channels][16]^T [channels][16].
__attribute__((noinline)) void multiply_tokens(const SquareMap& left, const SquareMap& right, int64_t channels,
                                               float* matrix) {
  Vec<float> sum[kSquareTokens] = {};
  const float *from = left.data, *vectors = right.data;
  for (int64_t d = 0; d < channels; ++d, from += left.channel, vectors += right.channel) {
    prefetch_into_second_level(from + left.ahead);
    prefetch_into_second_level(vectors + right.ahead);
    const Vec<float> vector = load_square(vectors, right.row);
#pragma GCC unroll 4
    for (int y = 0; y < kSquareSide; ++y) {
#pragma GCC unroll 4
      for (int x = 0; x < kSquareSide; ++x) {
        sum[y * kSquareSide + x] += broadcast(from[y * left.row + x]) * vector;
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kSquareTokens; ++j) store(matrix + j * kSquareTokens, sum[j]);
}

// out = alpha map matrix, [channels][16] = [channels][16] [16][16].
__attribute__((noinline)) void multiply_matrix(const SquareMap& map, const float* matrix, int64_t channels, float alpha,
                                               const SquareMap& out) {
  Vec<float> rows[kSquareTokens];
#pragma GCC unroll 16
  for (int j = 0; j < kSquareTokens; ++j) rows[j] = load(matrix + j * kSquareTokens) * alpha;
  const float* from = map.data;
  float* to = out.data;
  for (int64_t d = 0; d < channels; ++d, from += map.channel, to += out.channel) {
    prefetch_into_second_level(from + map.ahead);
    prefetch_into_second_level(to + out.ahead);
    Vec<float> sum[2] = {};  // two, whose additions wait for each other less
#pragma GCC unroll 4
    for (int y = 0; y < kSquareSide; ++y) {
#pragma GCC unroll 4
      for (int x = 0; x < kSquareSide; ++x) {
        sum[y % 2] += broadcast(from[y * map.row + x]) * rows[y * kSquareSide + x];
      }
    }
    store_square(to, out.row, sum[0] + sum[1]);
  }
}

inline float* take_square_matrix(Arena& arena) { return arena.take<float>(kSquareTokens * kSquareTokens); }

// The bias of one head, transposed: rows of keys, columns of queries. Zeros if there is none.
class SquareBias {
 public:
  SquareBias(const WindowAttentionProblem& problem, Arena& arena)
      : bias_(static_cast<const float*>(problem.bias)),
        head_stride_(problem.bias_shared ? 0 : kSquareTokens * kSquareTokens),
        transposed_(take_square_matrix(arena)) {
    if (arena.holds_memory()) std::fill_n(transposed_, kSquareTokens * kSquareTokens, 0.0f);
  }

  void select(int64_t head) {
    if (bias_ == nullptr) return;
    const float* bias = bias_ + head * head_stride_;
    if (bias == selected_) return;
    selected_ = bias;
    transpose_rows<float>([&](int64_t i) { return bias + i * kSquareTokens; }, kSquareTokens, kSquareTokens,
                          transposed_, kSquareTokens);
  }

  Vec<float> of_key(int64_t key) const { return load(transposed_ + key * kSquareTokens); }

 private:
  const float* bias_;
  int64_t head_stride_;
  float* transposed_;
  const float* selected_ = nullptr;
};

// The gradient of one head's bias, summed over windows.
class SquareBiasGrad {
 public:
  explicit SquareBiasGrad(Arena& arena) : sum_(take_square_matrix(arena)) {}

  void begin() { std::fill_n(sum_, kSquareTokens * kSquareTokens, 0.0f); }
  void add(const Vec<float> (&scores_grad)[kSquareTokens]) {
#pragma GCC unroll 16
    for (int i = 0; i < kSquareTokens; ++i) {
      float* row = sum_ + i * kSquareTokens;
      store(row, load(row) + scores_grad[i]);
    }
  }
  void finish(float* out) const { std::copy_n(sum_, kSquareTokens * kSquareTokens, out); }

 private:
  float* sum_;  // [queries][keys]
};

class ForwardSquares {
 public:
  using T = float;
  using Tasks = SquareTasks;

  ForwardSquares(const WindowAttentionForward& call, const Walk<float>& walk, Arena arena)
      : call_(call),
        statistics_(walk.statistics_view(call.lse)),
        scale_(static_cast<float>(call.problem.scale)),
        bias_(call.problem, arena),
        scores_(take_square_matrix(arena)),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  // Meanwhile it prefetches what `next` will read and write.
  void operator()(const Strip& strip, const Strip& next) {
    const int64_t dim = call_.problem.dim;
    const SquareMap query(call_.query, strip, next), key(call_.key, strip, next), value(call_.value, strip, next),
        out(call_.out, strip, next);
    bias_.select(strip.head);
    for (int64_t w = 0; w < strip.windows; ++w) {
      multiply_tokens(key.of(w), query.of(w), dim, scores_);
      const Vec<float> lse = softmax();
      multiply_matrix(value.of(w), scores_, dim, 1.0f, out.of(w));
      if (call_.lse == nullptr) continue;
      const SquareMap statistics(statistics_, strip);
      store_square(statistics.of(w).data, statistics.row, lse);
    }
  }

 private:
  // K Q^T -> P^T, both [keys][queries]; returns the logsumexp.
  Vec<float> softmax() const {
    Vec<float> row[kSquareTokens];
    Vec<float> top{};
#pragma GCC unroll 16
    for (int j = 0; j < kSquareTokens; ++j) {
      row[j] = load(scores_ + j * kSquareTokens) * scale_ + bias_.of_key(j);
      top = j == 0 ? row[j] : max<float>(top, row[j]);
    }
    Vec<float> sum{};
#pragma GCC unroll 16
    for (int j = 0; j < kSquareTokens; ++j) {
      row[j] = exp2_nonpositive<float>((row[j] - top) * kLog2E<float>);
      sum += row[j];
    }
    const Vec<float> factor = 1.0f / sum;
#pragma GCC unroll 16
    for (int j = 0; j < kSquareTokens; ++j) store(scores_ + j * kSquareTokens, row[j] * factor);
    return top + log_positive<float>(sum);
  }

  const WindowAttentionForward& call_;
  MapView statistics_;
  float scale_;
  SquareBias bias_;
  float* scores_;  // S^T, then P^T, [keys][queries]
  int64_t bytes_;
};

class BackwardSquares {
 public:
  using T = float;
  using Tasks = SquareTasks;

  BackwardSquares(const WindowAttentionBackward& call, const Walk<float>& walk, Arena arena)
      : call_(call),
        statistics_(walk.statistics_view(call.lse)),
        scale_(static_cast<float>(call.problem.scale)),
        bias_(call.problem, arena),
        bias_grad_(arena),
        probabilities_(take_square_matrix(arena)),
        transposed_grad_(take_square_matrix(arena)),
        scores_grad_(take_square_matrix(arena)),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  static int64_t heads_in_turn(const WindowAttentionBackward&) { return 1; }  // their planes lie far apart
  SquareBiasGrad& bias_grad(int64_t) { return bias_grad_; }

  // Meanwhile it prefetches what `next` will read and write.
  void operator()(const Strip& strip, const Strip& next) {
    const int64_t dim = call_.problem.dim;
    const SquareMap grad(call_.grad, strip, next), query(call_.query, strip, next), key(call_.key, strip, next),
        value(call_.value, strip, next), grad_query(call_.grad_query, strip, next),
        grad_key(call_.grad_key, strip, next), grad_value(call_.grad_value, strip, next),
        statistics(statistics_, strip);
    bias_.select(strip.head);
    for (int64_t w = 0; w < strip.windows; ++w) {
      multiply_tokens(key.of(w), query.of(w), dim, probabilities_);
      multiply_tokens(value.of(w), grad.of(w), dim, transposed_grad_);
      differentiate_softmax(load_square(statistics.of(w).data, statistics.row));
      multiply_matrix(key.prefetching_itself().of(w), transposed_grad_, dim, scale_, grad_query.of(w));
      multiply_matrix(query.prefetching_itself().of(w), scores_grad_, dim, scale_, grad_key.of(w));
      multiply_matrix(grad.prefetching_itself().of(w), probabilities_, dim, 1.0f, grad_value.of(w));
    }
  }

 private:
  // From K Q^T and dP^T of a window to P, dS^T and dS, and the sum of the bias's gradient. P is divided by its sum, as
  // in `softmax_backward`.
  void differentiate_softmax(Vec<float> lse) {
    Vec<float> row[kSquareTokens];
    Vec<float> sum{}, product{};
#pragma GCC unroll 16
    for (int j = 0; j < kSquareTokens; ++j) {
      const Vec<float> score = load(probabilities_ + j * kSquareTokens) * scale_ + bias_.of_key(j);
      row[j] = exp2_nonpositive<float>((score - lse) * kLog2E<float>);
      sum += row[j];
      product += row[j] * load(transposed_grad_ + j * kSquareTokens);
    }
    const Vec<float> factor = 1.0f / sum, delta = product / sum;
    Vec<float> row_grad[kSquareTokens];
#pragma GCC unroll 16
    for (int j = 0; j < kSquareTokens; ++j) {
      float* at = transposed_grad_ + j * kSquareTokens;
      row[j] *= factor;
      row_grad[j] = row[j] * (load(at) - delta);
      store(at, row_grad[j]);
    }
    transpose<float>(row);
    transpose<float>(row_grad);
#pragma GCC unroll 16
    for (int i = 0; i < kSquareTokens; ++i) {
      store(probabilities_ + i * kSquareTokens, row[i]);
      store(scores_grad_ + i * kSquareTokens, row_grad[i]);
    }
    if (call_.bias_grad != nullptr) bias_grad_.add(row_grad);
  }

  const WindowAttentionBackward& call_;
  MapView statistics_;
  float scale_;
  SquareBias bias_;
  SquareBiasGrad bias_grad_;
  float* probabilities_;    // S^T, [keys][queries], then P, [queries][keys]
  float* transposed_grad_;  // dP^T, then dS^T, [keys][queries]
  float* scores_grad_;      // dS, [queries][keys]
  int64_t bytes_;
};

// Whether all windows of a call are squares of 4x4 tokens whose rows are adjacent in all maps.
bool as_squares(const WindowAttentionProblem& problem, std::initializer_list<const MapView*> maps) {
  for (const Axis* axis : {&problem.rows, &problem.columns}) {
    if (axis->window != kSquareSide || axis->shift != 0 || axis->ratio != 1 || axis->size % kSquareSide != 0) {
      return false;
    }
  }
  return problem.storage == Storage::kFloat32 &&
         std::all_of(maps.begin(), maps.end(), [](const MapView* map) { return map->stride[2] == 1; });
}

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA

#endif
