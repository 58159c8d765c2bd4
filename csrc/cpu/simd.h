// The one vector type of the CPU kernels.
//
// `Vec<T>` is as wide as the registers of the instruction set that the including file is compiled for; operators come
// from the compiler's vector extensions, so a * b + c is a fused multiply-add where there is one. Include it from
// kernels_<set>.cpp only: VITFAST_ISA names the namespace, VITFAST_VECTOR_BYTES the width.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/storage.h"

// For what must be inlined: vectors that a function takes or gives by address are in memory otherwise.
#ifndef VITFAST_INLINE
#define VITFAST_INLINE __attribute__((always_inline))
#endif

namespace vitfast::cpu::VITFAST_ISA {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

template <class T>
struct VecOf {
  static constexpr int kLanes = VITFAST_VECTOR_BYTES / sizeof(T);
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T type __attribute__((vector_size(VITFAST_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(VITFAST_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  typedef Int ints __attribute__((vector_size(VITFAST_VECTOR_BYTES)));
};

template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using IntVec = typename VecOf<T>::ints;
template <class T>
inline constexpr int kLanes = VecOf<T>::kLanes;

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // compilers drop it: subtracting 0, unlike adding it, changes no value
}

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}

template <class T>
inline void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = x;
}

// Stores to an address that is a multiple of a vector's bytes, past the caches: nothing is read from memory first. What
// is stored is there for other threads after `finish_streaming`.
template <class T>
inline void stream(T* p, Vec<T> x) {
#if VITFAST_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)x);
#elif VITFAST_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)x);
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)x);
#else
  store(p, x);
#endif
}

inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Lane l holds l.
template <class T, int... L>
inline Vec<T> lane_index(std::integer_sequence<int, L...>) {
  return Vec<T>{static_cast<T>(L)...};
}
template <class T>
inline Vec<T> lane_index() {
  return lane_index<T>(std::make_integer_sequence<int, kLanes<T>>{});
}

// The first n lanes, 0 <= n <= lanes; the others read as zero. Touches no memory beyond them.
template <class T>
inline Vec<T> load_partial(const T* p, int64_t n) {
#if VITFAST_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
  }
#elif VITFAST_VECTOR_BYTES == 32
  const auto mask = (__m256i)(lane_index<T>() < static_cast<T>(n));
  if constexpr (std::is_same_v<T, float>) {
    return (Vec<T>)_mm256_maskload_ps(p, mask);
  } else {
    return (Vec<T>)_mm256_maskload_pd(p, mask);
  }
#else
  Vec<T> x{};
  for (int64_t l = 0; l < n; ++l) x[l] = p[l];
  return x;
#endif
}

template <class T>
inline void store_partial(T* p, Vec<T> x, int64_t n) {
#if VITFAST_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)x);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)x);
  }
#elif VITFAST_VECTOR_BYTES == 32
  const auto mask = (__m256i)(lane_index<T>() < static_cast<T>(n));
  if constexpr (std::is_same_v<T, float>) {
    _mm256_maskstore_ps(p, mask, (__m256)x);
  } else {
    _mm256_maskstore_pd(p, mask, (__m256d)x);
  }
#else
  for (int64_t l = 0; l < n; ++l) p[l] = x[l];
#endif
}

template <class T>
inline Vec<T> load_up_to(const T* p, int64_t n) {
  return n >= kLanes<T> ? load(p) : load_partial(p, n);
}

template <class T>
inline void store_up_to(T* p, Vec<T> x, int64_t n) {
  n >= kLanes<T> ? store(p, x) : store_partial(p, x, n);
}

// Where one of the operands is NaN, the second.
template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
#if VITFAST_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
  } else {
    return (Vec<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
  }
#else
  return a > b ? a : b;
#endif
}

// ---- reductions and transposition, by halving ---------------------------------------------------------------------

// Lanes come in groups of kWidth. Folds every group in two, and puts the halves of x and y side by side, in turn.
template <class T, int kWidth, class Combine, int... L>
inline Vec<T> fold(Vec<T> x, Vec<T> y, Combine combine, std::integer_sequence<int, L...>) {
  constexpr int n = kLanes<T>, half = kWidth / 2;
  const Vec<T> low = __builtin_shuffle(x, y, IntVec<T>{(L / half % 2 * n + L / half / 2 * kWidth + L % half)...});
  const Vec<T> high =
      __builtin_shuffle(x, y, IntVec<T>{(L / half % 2 * n + L / half / 2 * kWidth + half + L % half)...});
  return combine(low, high);
}

// Folds pairs of lanes; the results fill the lower half.
template <class T, class Combine, int... L>
inline Vec<T> fold_pairs(Vec<T> x, Combine combine, std::integer_sequence<int, L...>) {
  constexpr int n = kLanes<T>;
  return combine(__builtin_shuffle(x, IntVec<T>{(2 * L % n)...}), __builtin_shuffle(x, IntVec<T>{(2 * L % n + 1)...}));
}

// Lane r of the result combines all lanes of rows[r], r < kRows. Cheaper than row by row: all rows share the shuffles.
template <class T, int kRows, int kWidth = kLanes<T>, class Combine>
inline Vec<T> reduce_rows(Vec<T>* rows, Combine combine) {
  static_assert(kWidth == kRows || kWidth == 2 * kRows || kRows > 1);
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>{};
  if constexpr (kRows > 1) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows / 2; ++r) rows[r] = fold<T, kWidth>(rows[r], rows[r + kRows / 2], combine, lanes);
    return reduce_rows<T, kRows / 2, kWidth / 2>(rows, combine);
  } else if constexpr (kWidth > 1) {
    return fold_pairs<T>(rows[0], combine, lanes);
  } else {
    return rows[0];
  }
}

// Adds the upper half of the lanes to the lower one, and so on.
template <class T, int kHalf, int... L>
inline T sum_of_halves(Vec<T> x, std::integer_sequence<int, L...> lanes) {
  if constexpr (kHalf == 0) {
    return x[0];
  } else {
    return sum_of_halves<T, kHalf / 2>(x + __builtin_shuffle(x, IntVec<T>{((L + kHalf) % kLanes<T>)...}), lanes);
  }
}

template <class T>
inline T sum_of_lanes(Vec<T> x) {
  return sum_of_halves<T, kLanes<T> / 2>(x, std::make_integer_sequence<int, kLanes<T>>{});
}

// The elements of a 128-bit part of a vector, within which shuffles are cheapest.
template <class T>
inline constexpr int kPart = 16 / sizeof(T);

// In every part, the lower (or upper) halves of x and y, element by element in turn.
template <class T, bool kUpper, int... L>
inline Vec<T> interleave(Vec<T> x, Vec<T> y, std::integer_sequence<int, L...>) {
  constexpr int n = kLanes<T>, part = kPart<T>, from = kUpper ? part / 2 : 0;
  return __builtin_shuffle(x, y, IntVec<T>{(L / part * part + from + L % part / 2 + L % 2 * n)...});
}

// The even (or odd) parts of x, then those of y.
template <class T, bool kOdd, int... L>
inline Vec<T> separate(Vec<T> x, Vec<T> y, std::integer_sequence<int, L...>) {
  constexpr int n = kLanes<T>, part = kPart<T>, half = n / 2;
  return __builtin_shuffle(x, y,
                           IntVec<T>{(L / half * n + (L % half / part * 2 + (kOdd ? 1 : 0)) * part + L % part)...});
}

// Transposes lanes x lanes values in registers: first the squares that lie inside of parts, then the parts.
template <class T>
inline void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int n = kLanes<T>, part = kPart<T>;
  constexpr auto lanes = std::make_integer_sequence<int, n>{};
#pragma GCC unroll 2
  for (int step = 1; step < part; step *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 4
    for (int square = 0; square < n; square += part) {
#pragma GCC unroll 2
      for (int r = 0; r < part / 2; ++r) {
        const Vec<T> x = rows[square + r], y = rows[square + r + part / 2];
        next[square + 2 * r] = interleave<T, false>(x, y, lanes);
        next[square + 2 * r + 1] = interleave<T, true>(x, y, lanes);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < n; ++r) rows[r] = next[r];
  }
#pragma GCC unroll 2
  for (int step = part; step < n; step *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 2
    for (int pair = 0; pair < n / 2; pair += part) {
#pragma GCC unroll 4
      for (int r = 0; r < part; ++r) {
        const Vec<T> x = rows[2 * pair + r], y = rows[2 * pair + part + r];
        next[pair + r] = separate<T, false>(x, y, lanes);
        next[pair + n / 2 + r] = separate<T, true>(x, y, lanes);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < n; ++r) rows[r] = next[r];
  }
}

// ---- exponential and logarithm ------------------------------------------------------------------------------------

template <class T>
struct FloatConstants;

template <>
struct FloatConstants<float> {
  static constexpr int kMantissaBits = 23, kExponentBias = 127;
  static constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  // 2^x on |x| <= 1/2, from its Chebyshev expansion; relative error of the rounded coefficients 1.8e-8
  static constexpr float kExp2[] = {1.0f,         0.6931472f,    0.2402265f,    0.05550327f,
                                    0.009618025f, 0.0013400433f, 0.00015469732f};
};

template <>
struct FloatConstants<double> {
  static constexpr int kMantissaBits = 52, kExponentBias = 1023;
  static constexpr double kLog2High = 0.693147180369123816490, kLog2Low = 1.90821492927058770002e-10;
  static constexpr double kExp2[] = {1.0,
                                     0.6931471805599453,
                                     0.24022650695910158,
                                     0.0555041086648217,
                                     0.009618129107587253,
                                     0.001333355814639035,
                                     0.00015403530463727982,
                                     1.5252733856295574e-05,
                                     1.3215432534254118e-06,
                                     1.0178051192117847e-07,
                                     7.074194562613105e-09,
                                     4.456675463639861e-10};  // relative error 2e-17
};

template <class T>
inline constexpr T kLog2E = static_cast<T>(1.442695040888963407359924681);

// 2^x for x up to about 0, to a few rounding errors; 0 below the normal numbers and at -inf, NaN at NaN.
// x = n + f with an integer n and |f| <= 1/2.
template <class T>
inline Vec<T> exp2_nonpositive(Vec<T> x) {
  using C = FloatConstants<T>;
  // Adding kRound leaves n + bias in the lowest bits, from where a shift makes it the exponent of a power of two.
  constexpr T kRound = static_cast<T>(int64_t{3} << (C::kMantissaBits - 1)) + C::kExponentBias;
  x = max<T>(broadcast(static_cast<T>(-C::kExponentBias)), x);  // where that exponent is 0, and the power too
  const Vec<T> shifted = x + kRound;
  const Vec<T> f = x - (shifted - kRound);
  constexpr int kDegree = sizeof(C::kExp2) / sizeof(T) - 1;
  Vec<T> p = broadcast(C::kExp2[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) p = p * f + C::kExp2[i];
  return p * (Vec<T>)((IntVec<T>)shifted << C::kMantissaBits);
}

// log(x) for positive normal x; NaN and infinity pass as NaN.
// x = 2^e m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1), by its series in s^2 <= 0.0295.
template <class T>
inline Vec<T> log_positive(Vec<T> x) {
  using C = FloatConstants<T>;
  using Int = typename VecOf<T>::Int;
  const IntVec<T> half = (IntVec<T>)broadcast(static_cast<T>(0.70710678118654752440));
  const IntVec<T> offset = (IntVec<T>)x - half;
  const IntVec<T> exponent = offset >> C::kMantissaBits;
  const Vec<T> m = (Vec<T>)((offset & ((Int{1} << C::kMantissaBits) - 1)) + half);
  const Vec<T> s = (m - T{1}) / (m + T{1});
  const Vec<T> s2 = s * s;
  constexpr int kTerms = sizeof(T) == 4 ? 5 : 11;
  Vec<T> p{};
#pragma GCC unroll 16
  for (int i = kTerms - 1; i > 0; --i) p = (p + T{1} / static_cast<T>(2 * i + 1)) * s2;
  const Vec<T> e = __builtin_convertvector(exponent, Vec<T>);
  const Vec<T> log_m = s + s + (s + s) * p;
  return e * C::kLog2High + (e * C::kLog2Low + log_m) + (x - x);
}

// ---- storage types ------------------------------------------------------------------------------------------------

// Kernels compute in float or double; float16 and bfloat16 are only stored.
template <class Storage>
using Compute = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

// Calls f with a value of the type that `storage` names.
template <class F>
inline void with_storage(Storage storage, F f) {
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

// As many 16-bit values as a vector has floats, as they are stored and widened.
typedef uint16_t HalfBits __attribute__((vector_size(VITFAST_VECTOR_BYTES / 2)));
typedef uint32_t WideBits __attribute__((vector_size(VITFAST_VECTOR_BYTES)));

template <class S>
inline Vec<float> widen(HalfBits bits) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return (Vec<float>)(__builtin_convertvector(bits, WideBits) << 16);
  } else {
#if VITFAST_VECTOR_BYTES == 64
    return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif VITFAST_VECTOR_BYTES == 32
    return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#else
    Half halves[kLanes<float>];
    std::memcpy(static_cast<void*>(halves), &bits, sizeof(bits));
    Vec<float> x{};
    for (int l = 0; l < kLanes<float>; ++l) x[l] = static_cast<float>(halves[l]);
    return x;
#endif
  }
}

template <class S>
inline HalfBits narrow(Vec<float> x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const WideBits wide = (WideBits)x;
    const WideBits rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;  // to nearest, ties to even
    const WideBits with_nan = x != x ? WideBits{} + 0x7fc0 : rounded;
    return __builtin_convertvector(with_nan, HalfBits);
  } else {
#if VITFAST_VECTOR_BYTES == 64
    return (HalfBits)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif VITFAST_VECTOR_BYTES == 32
    return (HalfBits)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Half halves[kLanes<float>];
    for (int l = 0; l < kLanes<float>; ++l) halves[l] = Half(x[l]);
    HalfBits bits;
    std::memcpy(&bits, static_cast<const void*>(halves), sizeof(bits));
    return bits;
#endif
  }
}

// The first n of them, 0 <= n < lanes; the rest is zero.
inline HalfBits load_halves(const void* p, int64_t n) {
#if VITFAST_VECTOR_BYTES == 64
  return (HalfBits)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
#else
  uint16_t halves[kLanes<float>] = {};
  std::memcpy(halves, p, 2 * n);
  HalfBits bits;
  std::memcpy(&bits, halves, sizeof(bits));
  return bits;
#endif
}

inline void store_halves(void* p, HalfBits bits, int64_t n) {
#if VITFAST_VECTOR_BYTES == 64
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)bits);
#else
  uint16_t halves[kLanes<float>];
  std::memcpy(halves, &bits, sizeof(bits));
  std::memcpy(p, halves, 2 * n);
#endif
}

template <class S>
inline Vec<Compute<S>> load_as_compute(const S* p) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    return load(p);
  } else {
    HalfBits bits;
    std::memcpy(&bits, static_cast<const void*>(p), sizeof(bits));
    return widen<S>(bits);
  }
}

template <class S>
inline void store_as_storage(S* p, Vec<Compute<S>> x) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    store(p, x);
  } else {
    const HalfBits bits = narrow<S>(x);
    std::memcpy(static_cast<void*>(p), &bits, sizeof(bits));
  }
}

// The first n values, converted; the rest of the vector is zero.
template <class S>
inline Vec<Compute<S>> load_as_compute_up_to(const S* p, int64_t n) {
  using C = Compute<S>;
  if (n >= kLanes<C>) return load_as_compute(p);
  if constexpr (std::is_same_v<S, C>) {
    return load_partial(p, n);
  } else {
    return widen<S>(load_halves(p, n));
  }
}

template <class S>
inline void store_as_storage_up_to(S* p, Vec<Compute<S>> x, int64_t n) {
  using C = Compute<S>;
  if (n >= kLanes<C>) {
    store_as_storage(p, x);
  } else if constexpr (std::is_same_v<S, C>) {
    store_partial(p, x, n);
  } else {
    store_halves(p, narrow<S>(x), n);
  }
}

}  // namespace vitfast::cpu::VITFAST_ISA
