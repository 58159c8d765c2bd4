// What the kernels of blur pooling share: outputs with the same taps, the prologue with its derivative, and what is
// done about large maps.
#pragma once

#include "cpu/blur_pool.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// ---- outputs with the same taps -------------------------------------------------------------------------------------

// Outputs first, first + period, ...: the inputs of each lie `step` further than those of the one before.
struct BlurSeries {
  int64_t first, count, step;
};

// A tap in the type that is computed in. `at` is an input, or where the row that it is begins.
template <class T>
struct BlurTapOf {
  int64_t at, line;
  T weight;
};

// How much further the inputs of output b lie than those of output a, or 0 if the taps differ in anything else.
inline int64_t step_between(const BlurMatrix& matrix, int64_t a, int64_t b) {
  const int64_t count = matrix.taps_of(a);
  const BlurTap *from = matrix.first_tap(a), *to = matrix.first_tap(b);
  if (count == 0 || matrix.taps_of(b) != count) return 0;
  const int64_t step = to->from - from->from;
  for (int64_t t = 0; t < count; ++t) {
    const bool alike = to[t].from - from[t].from == step && to[t].line == from[t].line;
    if (!alike || to[t].weight != from[t].weight) return 0;
  }
  return std::max<int64_t>(step, 0);
}

// The outputs [first, last) in series; those of a series have the same taps in all matrices.
inline std::vector<BlurSeries> series_of(const BlurMatrix* begin, const BlurMatrix* end, int64_t first, int64_t last,
                                         int64_t period) {
  std::vector<BlurSeries> series;
  for (int64_t phase = first; phase < std::min(first + period, last); ++phase) {
    for (int64_t o = phase; o < last; o += period) {
      int64_t step = o > phase ? step_between(*begin, o - period, o) : 0;
      for (const BlurMatrix* other = begin + 1; other < end; ++other) {
        if (o > phase && step_between(*other, o - period, o) != step) step = 0;
      }
      if (step > 0 && (series.back().count == 1 || series.back().step == step)) {
        series.back().step = step;
        ++series.back().count;
      } else {
        series.push_back({o, 1, 0});
      }
    }
  }
  return series;
}

// ---- the prologue and its derivative --------------------------------------------------------------------------------

// tanh(a) for a >= 0.
inline Vec<float> tanh_nonnegative(Vec<float> a) {
  // Its series near 0, where the other formula cancels; the first term left out is 1e-8 of the sum at 0.35.
  const Vec<float> s = a * a;
  const Vec<float> series =
      a + a * s * (-0.33333333f + s * (0.13333333f + s * (-0.05396825f + s * (0.021869488f - s * 0.0088632355f))));
  const Vec<float> e = exp2_nonpositive<float>(a * (-2 * kLog2E<float>));  // exp(-2 a)
  return a < 0.35f ? series : (1.0f - e) / (1.0f + e);
}

inline Vec<double> tanh_nonnegative(Vec<double> a) {
  for (int l = 0; l < kLanes<double>; ++l) a[l] = std::tanh(a[l]);
  return a;
}

// Where one of the operands is NaN, the second.
template <class T>
inline Vec<T> min(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

// An activation and its derivative. All but kTanhRelu keep z between bounds, of which those that do not exist are NaN.
template <class T>
class BlurActivate {
 public:
  explicit BlurActivate(const BlurPrologue& prologue)
      : has_high_(prologue.activation == BlurActivation::kRelu6), temperature_(static_cast<T>(prologue.temperature)) {
    constexpr T kNone = std::numeric_limits<T>::quiet_NaN();
    low_ = broadcast(prologue.activation == BlurActivation::kNone ? kNone : T{0});
    high_ = broadcast(has_high_ ? T{6} : kNone);
  }

  // All but kTanhRelu. NaN stays.
  Vec<T> clamp(Vec<T> z) const {
    z = max<T>(low_, z);
    return has_high_ ? min<T>(high_, z) : z;
  }
  Vec<T> tanh_relu(Vec<T> z) const { return temperature_ * tanh_nonnegative(clamp(z) / temperature_); }

  // The derivative at z times g, as PyTorch has it where there is none.
  template <bool kTanh>
  Vec<T> backward(Vec<T> z, Vec<T> g) const {
    if constexpr (kTanh) {
      const Vec<T> t = tanh_nonnegative(clamp(z) / temperature_);
      g = g * (1 - t * t);
    }
    g = z <= low_ ? Vec<T>{} : g;
    if (has_high_) g = z >= high_ ? Vec<T>{} : g;
    return g;
  }

 private:
  bool has_high_;
  T temperature_;
  Vec<T> low_, high_;
};

// What becomes of the input before it is added up, and of an output.
enum class BlurMode {
  kPlain,         // both are taken as they are
  kPrepared,      // likewise, from slots
  kClamp,         // the prologue is applied to the input: any but kTanhRelu
  kGradient,      // an output is the gradient of u, from which that of x comes: for the same prologues
  kSumGradient,   // likewise, and from which the sums for the gradients of scale and shift come
  kTanhGradient,  // likewise, for kTanhRelu
};

constexpr bool has_sums(BlurMode mode) { return mode == BlurMode::kSumGradient || mode == BlurMode::kTanhGradient; }

constexpr bool is_gradient(BlurMode mode) { return mode == BlurMode::kGradient || has_sums(mode); }

constexpr bool has_scale(BlurMode mode) { return mode != BlurMode::kPlain && mode != BlurMode::kPrepared; }

// Whether there are versions for the numbers of taps that are frequent: not for what is slow anyway.
constexpr bool has_versions(BlurMode mode) { return mode != BlurMode::kPrepared && mode != BlurMode::kTanhGradient; }

// Calls f with the mode of a call as a constant.
template <class F>
inline void with_mode(const BlurCall& call, F f) {
  if (call.primal != nullptr) {
    if (call.prologue.activation == BlurActivation::kTanhRelu) {
      return f(std::integral_constant<BlurMode, BlurMode::kTanhGradient>{});
    }
    if (call.scale_partial != nullptr) return f(std::integral_constant<BlurMode, BlurMode::kSumGradient>{});
    return f(std::integral_constant<BlurMode, BlurMode::kGradient>{});
  }
  if (call.plan.prepared) return f(std::integral_constant<BlurMode, BlurMode::kPrepared>{});
  if (call.prologue.any()) return f(std::integral_constant<BlurMode, BlurMode::kClamp>{});
  f(std::integral_constant<BlurMode, BlurMode::kPlain>{});
}

// A value for each channel: all of them `otherwise` where there are none.
template <class T>
class BlurChannels {
 public:
  BlurChannels(const void* values, T otherwise) : values_(static_cast<const T*>(values)), otherwise_(otherwise) {}
  Vec<T> of(int64_t channel) const { return broadcast(values_ == nullptr ? otherwise_ : values_[channel]); }
  Vec<T> from(int64_t channel, int64_t lanes) const {
    return values_ == nullptr ? broadcast(otherwise_) : load_up_to(values_ + channel, lanes);
  }

 private:
  const T* values_;
  T otherwise_;
};

// ---- results that no cache will hold -------------------------------------------------------------------------------

// From here on a result is written past the caches: it would be gone from them before anyone reads it, and would drive
// out the input. Half of the third level of common processors; what the system says of it may be the sum of several.
// Smaller results as well, where they and the input fill most of that level.
constexpr int64_t kStreamedBytes = 16 << 20, kStreamedBytesWithInput = 24 << 20;

template <class S>
inline bool is_streamed(const BlurCall& call) {
  const BlurPlan& plan = call.plan;
  const int64_t planes = plan.batch * plan.channels, size = sizeof(S);
  const int64_t in = planes * plan.in_height * plan.in_width * size;
  const int64_t out = planes * plan.out_height * plan.out_width * size;
  return std::is_same_v<S, Compute<S>> && (out >= kStreamedBytes || in + out >= kStreamedBytesWithInput);
}

// Whether the larger of the two maps is likely to come from memory: with the other it fills the third level.
template <class S>
inline bool comes_from_memory(const BlurCall& call) {
  const int64_t in = call.plan.in_height * call.plan.in_width, out = call.plan.out_height * call.plan.out_width;
  return call.plan.batch * call.plan.channels * std::max(in, out) * static_cast<int64_t>(sizeof(S)) >=
         kStreamedBytes / 2;
}

template <class T>
inline bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Vec<T>) == 0;
}

// Copies a buffer, but for its ends, past the caches.
template <class T>
inline void stream_copy(const T* from, int64_t length, T* to) {
  int64_t j = 0;
  while (j < length && !is_aligned(to + j)) to[j] = from[j], ++j;
  for (; j + kLanes<T> <= length; j += kLanes<T>) stream(to + j, load(from + j));
  for (; j < length; ++j) to[j] = from[j];
}

// Enough values for a thread to be worth its start.
constexpr int64_t kBlurGrain = 16384;

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
