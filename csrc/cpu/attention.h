// Attention on the CPU: what the operator (attention.cpp) and its kernels (attention_kernel.h) share.
#pragma once

#include <array>
#include <cstdint>

#include "cpu/storage.h"
#include "cpu/tangents.h"

namespace vitfast::cpu {

// A (B, heads, tokens, D) tensor; strides in elements.
struct SequenceView {
  void* data = nullptr;
  std::array<int64_t, 4> stride{};
};

// A bias of shape (B or 1, heads or 1, N or 1, M) in the computing dtype; strides in elements, 0 where it is broadcast.
struct BiasView {
  const void* data = nullptr;  // null if there is no bias
  std::array<int64_t, 4> stride{};
  int64_t batch = 1, heads = 1, queries = 1;  // its sizes
};

struct AttentionProblem {
  Storage storage;
  int64_t batch, heads, queries, keys, dim;
  double scale;
  BiasView bias;
};

struct AttentionForward {
  AttentionProblem problem;
  SequenceView query, key, value, out;
  void* lse;  // (B, heads, N) contiguous in the computing dtype, or null
};

// Heads of images that share a bias add to one gradient. They are cut into `splits` runs, each summed in order by one
// task: the result does not depend on the number of threads.
struct AttentionBackward {
  AttentionProblem problem;
  SequenceView grad, query, key, value, grad_query, grad_key, grad_value;
  const void* lse;
  // Sums of the scores' gradients, (biases, splits, N or 1, M) in the computing dtype, or null without a bias.
  void* bias_grad;
  int64_t splits;
};

using AttentionTangents = TangentsCall<AttentionProblem, SequenceView, BiasView>;

struct AttentionKernels {
  void (*forward)(const AttentionForward&);
  void (*backward)(const AttentionBackward&);
  void (*tangents)(const AttentionTangents&);
};

namespace baseline {
extern const AttentionKernels attention_kernels;
}
namespace avx2 {
extern const AttentionKernels attention_kernels;
}
namespace avx512 {
extern const AttentionKernels attention_kernels;
}

}  // namespace vitfast::cpu
