// What the kernels of blur pooling share: the prologue and its derivative, and weighted sums of rows.
#pragma once

#include "cpu/blur_pool.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// ---- the prologue and its derivative --------------------------------------------------------------------------------

template <class T>
inline Vec<T> relu(Vec<T> z) {
  return max<T>(Vec<T>{}, z);  // NaN stays
}

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

template <class T, BlurActivation kActivation>
inline Vec<T> activate(Vec<T> z, T temperature) {
  if constexpr (kActivation == BlurActivation::kNone) return z;
  if constexpr (kActivation == BlurActivation::kRelu) return relu<T>(z);
  if constexpr (kActivation == BlurActivation::kRelu6) {
    const Vec<T> positive = relu<T>(z);
    return positive > T{6} ? broadcast(T{6}) : positive;
  }
  if constexpr (kActivation == BlurActivation::kTanhRelu) {
    return temperature * tanh_nonnegative(relu<T>(z) / temperature);
  }
}

// The derivative at z times g, as PyTorch has it where there is none.
template <class T, BlurActivation kActivation>
inline Vec<T> activate_backward(Vec<T> z, Vec<T> g, T temperature) {
  constexpr Vec<T> zero{};
  if constexpr (kActivation == BlurActivation::kNone) return g;
  if constexpr (kActivation == BlurActivation::kRelu) return z <= zero ? zero : g;
  if constexpr (kActivation == BlurActivation::kRelu6) {
    const Vec<T> below = z <= zero ? zero : g;
    return z >= T{6} ? zero : below;
  }
  if constexpr (kActivation == BlurActivation::kTanhRelu) {
    const Vec<T> t = tanh_nonnegative(relu<T>(z) / temperature);
    return z <= zero ? zero : g * (1 - t * t);
  }
}

template <BlurActivation kActivation>
using ActivationTag = std::integral_constant<BlurActivation, kActivation>;

template <class F>
inline void with_activation(BlurActivation activation, F f) {
  switch (activation) {
    case BlurActivation::kNone:
      return f(ActivationTag<BlurActivation::kNone>{});
    case BlurActivation::kRelu:
      return f(ActivationTag<BlurActivation::kRelu>{});
    case BlurActivation::kRelu6:
      return f(ActivationTag<BlurActivation::kRelu6>{});
    case BlurActivation::kTanhRelu:
      return f(ActivationTag<BlurActivation::kTanhRelu>{});
  }
}

// ---- weighted sums of rows ------------------------------------------------------------------------------------------

// Calls f with the number of taps as a constant, or with 0 where it is none of the most frequent.
template <class F>
inline void with_taps(int64_t taps, F f) {
  switch (taps) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

// As many sums of the same weights: in all rows, each begins `step` values further than the one before, and what it
// gives `to_step` further.
struct Repeat {
  int64_t count = 1, step = 0, to_step = 0;
};

// Calls put(place, weighted sum of rows, lanes that count) for every vector of [0, length), `inner` times, and all of
// that `outer` times.
template <class T, int kTaps, class Put>
inline void combine_taps(const T* const* rows, const T* weights, int64_t length, Repeat inner, Repeat outer, Put put) {
  const T* row[kTaps];
  Vec<T> weight[kTaps];
#pragma GCC unroll 4
  for (int t = 0; t < kTaps; ++t) row[t] = rows[t], weight[t] = broadcast(weights[t]);
  const auto advance = [&](int64_t step) {
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) row[t] += step;
  };
  const auto sum_at = [&](auto load_at) {
    Vec<T> sum = weight[0] * load_at(row[0]);
#pragma GCC unroll 4
    for (int t = 1; t < kTaps; ++t) sum = sum + weight[t] * load_at(row[t]);
    return sum;
  };
  const int64_t whole = length / kLanes<T> * kLanes<T>;
  for (int64_t o = 0; o < outer.count; ++o) {
    int64_t to = o * outer.to_step;
    for (int64_t i = 0; i < inner.count; ++i) {
      for (int64_t j = 0; j < whole; j += kLanes<T>) {
        put(to + j, sum_at([&](const T* p) { return load(p + j); }), int64_t{kLanes<T>});
      }
      if (whole < length) {
        const Vec<T> last = sum_at([&](const T* p) { return load_partial(p + whole, length - whole); });
        put(to + whole, last, length - whole);
      }
      advance(inner.step);
      to += inner.to_step;
    }
    advance(outer.step - inner.count * inner.step);
  }
}

template <class T, class Put>
inline void combine(const T* const* rows, const T* weights, int64_t taps, int64_t length, Repeat inner, Repeat outer,
                    Put put) {
  with_taps(taps, [&](auto count) {
    if constexpr (count > 0) {
      return combine_taps<T, count>(rows, weights, length, inner, outer, put);
    }
    // None, where there is nothing but zeros of the margin, or many.
    for (int64_t o = 0; o < outer.count; ++o) {
      for (int64_t i = 0; i < inner.count; ++i) {
        const int64_t from = o * outer.step + i * inner.step, to = o * outer.to_step + i * inner.to_step;
        for (int64_t j = 0; j < length; j += kLanes<T>) {
          Vec<T> sum{};
          for (int64_t t = 0; t < taps; ++t) sum = sum + weights[t] * load_up_to(rows[t] + from + j, length - j);
          put(to + j, sum, std::min<int64_t>(length - j, kLanes<T>));
        }
      }
    }
  });
}

template <class T, class Put>
inline void combine(const T* const* rows, const T* weights, int64_t taps, int64_t length, Put put) {
  combine(rows, weights, taps, length, {}, {}, put);
}

// ---- results that no cache will hold -------------------------------------------------------------------------------

// From here on a result is written past the caches: it would be gone from them before anyone reads it, and would drive
// out the input. Half of the third level of common processors; what the system says of it may be the sum of several.
constexpr int64_t kStreamedBytes = 16 << 20;

template <class S>
inline bool is_streamed(const BlurCall& call) {
  const int64_t values = call.batch * call.channels * call.out_height * call.out_width;
  return std::is_same_v<S, Compute<S>> && values * static_cast<int64_t>(sizeof(S)) >= kStreamedBytes;
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
