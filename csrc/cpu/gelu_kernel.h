// The Gaussian error linear unit, x Phi(x), and its derivative, Phi(x) + x phi(x): one pass over contiguous values.
//
// Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415.
#pragma once

#include "cpu/gelu.h"
#include "cpu/matrix.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

template <class T>
struct Normal {
  Vec<T> cdf, density;
};

// Phi(x) and phi(x) of the standard normal distribution.
inline Normal<float> normal(Vec<float> x) {
  // Phi(-a) exp(a^2 / 2) = t P(t) with t = 1 / (1 + 0.35 a), for 0 <= a <= 13.3, beyond which exp is 0. P is minimax in
  // relative error, by reweighted least squares: 3.2e-8.
  constexpr float kPolynomial[] = {0.13962166f, 0.13985756f,  0.11986307f, 0.10539221f,  -0.022843578f,
                                   0.15879678f, -0.25539118f, 0.1438185f,  -0.029115031f};
  constexpr float kInverseRoot2Pi = 0.3989422804f;
  const Vec<float> a = x < 0.0f ? -x : x;
  const Vec<float> t = 1.0f / (1.0f + 0.35f * a);
  Vec<float> p = broadcast(kPolynomial[8]);
#pragma GCC unroll 8
  for (int i = 7; i >= 0; --i) p = p * t + kPolynomial[i];
  const Vec<float> exponential = exp2_nonpositive<float>(a * a * (-0.5f * kLog2E<float>));
  const Vec<float> tail = exponential * (t * p);
  return {x < 0.0f ? tail : 1.0f - tail, exponential * kInverseRoot2Pi};
}

// float64 is for checks: as exact as the C library, lane by lane.
inline Normal<double> normal(Vec<double> x) {
  Normal<double> result{};
  for (int l = 0; l < kLanes<double>; ++l) {
    result.cdf[l] = 0.5 * std::erfc(-0.70710678118654752440 * x[l]);
    result.density[l] = 0.39894228040143267794 * std::exp(-0.5 * x[l] * x[l]);
  }
  return result;
}

// Enough values for a thread to be worth its start.
constexpr int64_t kGeluGrain = 16384;

// Calls f(first, count) for every vector of [0, size), in parallel.
template <class T, class F>
void for_each_vector(int64_t size, F f) {
  const int64_t vectors = (size + kLanes<T> - 1) / kLanes<T>;
  parallel_for(vectors, kGeluGrain / kLanes<T>, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) f(v * kLanes<T>, size - v * kLanes<T>);
  });
}

void gelu_forward(const GeluForward& call) {
  with_storage(call.storage, [&](auto value) {
    using S = decltype(value);
    using T = Compute<S>;
    const S* x = static_cast<const S*>(call.x);
    S* out = static_cast<S*>(call.out);
    for_each_vector<T>(call.size, [&](int64_t first, int64_t count) {
      const Vec<T> z = load_as_compute_up_to(x + first, count);
      store_as_storage_up_to(out + first, z * normal(z).cdf, count);
    });
  });
}

void gelu_backward(const GeluBackward& call) {
  with_storage(call.storage, [&](auto value) {
    using S = decltype(value);
    using T = Compute<S>;
    const S* x = static_cast<const S*>(call.x);
    S *out = static_cast<S*>(call.out), *grad = static_cast<S*>(call.grad);
    for_each_vector<T>(call.size, [&](int64_t first, int64_t count) {
      const Vec<T> z = load_as_compute_up_to(x + first, count), g = load_as_compute_up_to(grad + first, count);
      const Normal<T> at = normal(z);
      store_as_storage_up_to(out + first, z * at.cdf, count);
      store_as_storage_up_to(grad + first, g * (at.cdf + z * at.density), count);
    });
  });
}

// With y = x Phi(x), its first derivative a = Phi + x phi and its second b = (2 - x^2) phi: y. = a x., and of the
// gradient dx = a g, dx. = a g. + b g x. A block of values at a time, whose a and b g serve all tangents.
template <class T>
void gelu_tangents_of(const GeluTangents& call) {
  constexpr int64_t kBlock = 1024;
  const auto at = [](const void* tensor, int64_t i) { return static_cast<const T*>(tensor) + i; };
  parallel_for(parts(call.size, kBlock), kGeluGrain / kBlock, [&](int64_t begin, int64_t end) {
    alignas(64) T first[kBlock], second[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t start = block * kBlock, size = std::min(call.size - start, kBlock);
      for (int64_t i = 0; i < size; i += kLanes<T>) {
        const Vec<T> x = load_up_to(at(call.x, start + i), size - i);
        const Normal<T> normal_x = normal(x);
        store(first + i, normal_x.cdf + x * normal_x.density);
        if (call.grad == nullptr) continue;
        const Vec<T> grad = load_up_to(at(call.grad, start + i), size - i);
        store(second + i, (T{2} - x * x) * normal_x.density * grad);
      }
      for (int64_t k = 0; k < call.count; ++k) {
        const int64_t offset = k * call.size + start;
        T* out = static_cast<T*>(call.grad == nullptr ? call.out_t : call.x_grad_t) + offset;
        for (int64_t i = 0; i < size; i += kLanes<T>) {
          Vec<T> sum{};
          const void* by_first = call.grad == nullptr ? call.x_t : call.grad_t;
          if (by_first != nullptr) sum = load(first + i) * load_up_to(at(by_first, offset + i), size - i);
          if (call.grad != nullptr && call.x_t != nullptr) {
            sum += load(second + i) * load_up_to(at(call.x_t, offset + i), size - i);
          }
          store_up_to(out + i, sum, size - i);
        }
      }
    }
  });
}

void gelu_tangents(const GeluTangents& call) {
  call.is_double ? gelu_tangents_of<double>(call) : gelu_tangents_of<float>(call);
}

}  // namespace

const GeluKernels gelu_kernels = {gelu_forward, gelu_backward, gelu_tangents};

}  // namespace vitfast::cpu::VITFAST_ISA
