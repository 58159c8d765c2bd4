// The one vector type of the CPU kernels.
//
// `Vec<T>` is as wide as the registers of the instruction set that the including file is compiled for; operators come
// from the compiler's vector extensions, so a * b + c is a fused multiply-add where there is one. Include it from
// kernels_<set>.cpp only: VITFAST_ISA names the namespace, VITFAST_VECTOR_BYTES the width.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

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
  return Vec<T>{} + x;
}

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}

template <class T>
inline void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = x;
}

// The first n lanes, 0 < n <= lanes; the others read as zero. Touches no memory beyond them.
template <class T>
inline Vec<T> load_partial(const T* p, int64_t n) {
#if VITFAST_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
  }
#else
  Vec<T> x{};
  std::memcpy(&x, p, n * sizeof(T));
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
#else
  std::memcpy(p, &x, n * sizeof(T));
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

// Lane l holds l.
template <class T>
inline Vec<T> lane_index() {
  Vec<T> x{};
  for (int l = 0; l < kLanes<T>; ++l) x[l] = static_cast<T>(l);
  return x;
}

// NaN in either operand gives the second operand's lane only if that is NaN: call as max(bound, x) to keep NaN in x.
template <class T>
inline Vec<T> max(Vec<T> bound, Vec<T> x) {
  return bound > x ? bound : x;
}

// ---- reductions and transposition, by halving --------------------------------------------------------------------------

template <class T, int... L>
inline Vec<T> rotate_lanes(Vec<T> x, int by, std::integer_sequence<int, L...>) {
  return __builtin_shuffle(x, IntVec<T>{((L + by) % kLanes<T>)...});
}

template <class T, class Combine>
inline T reduce(Vec<T> x, Combine combine) {
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    x = combine(x, rotate_lanes<T>(x, half, std::make_integer_sequence<int, kLanes<T>>{}));
  }
  return x[0];
}

template <class T>
inline T reduce_add(Vec<T> x) {
  return reduce<T>(x, [](Vec<T> a, Vec<T> b) { return a + b; });
}

// NaN in any lane gives NaN.
template <class T>
inline T reduce_max(Vec<T> x) {
  return reduce<T>(x, [](Vec<T> a, Vec<T> b) {
    const Vec<T> larger = a > b ? a : b;
    return a != a ? a : larger;
  });
}

// Transposes lanes x lanes values in registers: every step interleaves row r with row r + lanes / 2.
template <class T, int... L>
inline void interleave(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high, std::integer_sequence<int, L...>) {
  constexpr int n = kLanes<T>;
  low = __builtin_shuffle(a, b, IntVec<T>{(L / 2 + (L % 2) * n)...});
  high = __builtin_shuffle(a, b, IntVec<T>{(n / 2 + L / 2 + (L % 2) * n)...});
}

template <class T>
inline void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 8
    for (int r = 0; r < n / 2; ++r) {
      interleave<T>(rows[r], rows[r + n / 2], next[2 * r], next[2 * r + 1], std::make_integer_sequence<int, n>{});
    }
#pragma GCC unroll 16
    for (int r = 0; r < n; ++r) rows[r] = next[r];
  }
}

// ---- exponential and logarithm -----------------------------------------------------------------------------------------

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  static constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  static constexpr float kLowest = -88.0f;  // rounds to the exponent -127, whose power of two is written as 0
  static constexpr int32_t kExponentBias = 127, kMantissaBits = 23;
  // e^r on |r| <= log(2) / 2 by its Chebyshev expansion; relative error of the rounded coefficients 2e-8
  static constexpr float kExp[] = {1.0f,           1.0f,           0.5f,           0.16666415334f,
                                   0.04166635126f, 0.00837513432f, 0.00139411190f};
};

template <>
struct ExpConstants<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2High = 0.693147180369123816490, kLog2Low = 1.90821492927058770002e-10;
  static constexpr double kLowest = -709.0;  // rounds to the exponent -1023
  static constexpr int64_t kExponentBias = 1023, kMantissaBits = 52;
  static constexpr double kExp[] = {1.0,
                                    1.0,
                                    0.5000000000000019,
                                    0.1666666666666668,
                                    0.04166666666648795,
                                    0.008333333333319589,
                                    0.0013888888952352863,
                                    0.00019841269890076403,
                                    2.4801485441561313e-05,
                                    2.755724088722987e-06,
                                    2.763265472252779e-07,
                                    2.5110049204818658e-08};  // relative error 2e-16
};

// e^x for x <= 0, with a relative error of a few rounding errors; 0 below the normal numbers and at -inf, NaN at NaN.
// x = n log 2 + r with |r| <= log(2) / 2.
template <class T>
inline Vec<T> exp_nonpositive(Vec<T> x) {
  using C = ExpConstants<T>;
  constexpr T kLog2E = static_cast<T>(1.442695040888963407359924681);
  x = max<T>(broadcast(C::kLowest), x);
  const Vec<T> shifted = x * kLog2E + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  const Vec<T> r = (x - n * C::kLog2High) - n * C::kLog2Low;
  constexpr int kDegree = sizeof(C::kExp) / sizeof(T) - 1;
  Vec<T> p = broadcast(C::kExp[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) p = p * r + C::kExp[i];
  const IntVec<T> power = ((IntVec<T>)shifted << C::kMantissaBits) + (C::kExponentBias << C::kMantissaBits);
  return p * (Vec<T>)power;
}

// log(x) for positive normal x; NaN and infinity pass as NaN.
// x = 2^e m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1), by its series in s^2 <= 0.0295.
template <class T>
inline Vec<T> log_positive(Vec<T> x) {
  using C = ExpConstants<T>;
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

// ---- storage types -----------------------------------------------------------------------------------------------------

// Kernels compute in float or double; float16 and bfloat16 are only stored.
template <class Storage>
using Compute = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

// As many 16-bit values as a vector has floats, as they are stored and widened.
typedef uint16_t HalfBits __attribute__((vector_size(VITFAST_VECTOR_BYTES / 2)));
typedef uint32_t WideBits __attribute__((vector_size(VITFAST_VECTOR_BYTES)));

template <class S>
inline Vec<Compute<S>> load_as_compute(const S* p) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    return load(p);
  } else {
    HalfBits bits;
    std::memcpy(&bits, p, sizeof(bits));
    if constexpr (std::is_same_v<S, BFloat16>) {
      return (Vec<float>)(__builtin_convertvector(bits, WideBits) << 16);
    } else {
#if VITFAST_VECTOR_BYTES == 64
      return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif VITFAST_VECTOR_BYTES == 32
      return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#else
      Vec<float> x{};
      for (int l = 0; l < kLanes<float>; ++l) x[l] = static_cast<float>(p[l]);
      return x;
#endif
    }
  }
}

template <class S>
inline void store_as_storage(S* p, Vec<Compute<S>> x) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    store(p, x);
  } else {
    if constexpr (std::is_same_v<S, BFloat16>) {
      const WideBits wide = (WideBits)x;
      const WideBits rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;  // to nearest, ties to even
      const WideBits with_nan = x != x ? WideBits{} + 0x7fc0 : rounded;
      const HalfBits bits = __builtin_convertvector(with_nan, HalfBits);
      std::memcpy(p, &bits, sizeof(bits));
    } else {
#if VITFAST_VECTOR_BYTES == 64
      const __m256i bits = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      std::memcpy(p, &bits, sizeof(bits));
#elif VITFAST_VECTOR_BYTES == 32
      const __m128i bits = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      std::memcpy(p, &bits, sizeof(bits));
#else
      for (int l = 0; l < kLanes<float>; ++l) p[l] = Half(x[l]);
#endif
    }
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
    alignas(64) S padded[kLanes<C>] = {};
    std::memcpy(static_cast<void*>(padded), static_cast<const void*>(p), n * sizeof(S));
    return load_as_compute(padded);
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
    alignas(64) S padded[kLanes<C>];
    store_as_storage(padded, x);
    std::memcpy(static_cast<void*>(p), static_cast<const void*>(padded), n * sizeof(S));
  }
}

}  // namespace vitfast::cpu::VITFAST_ISA
