// Threads: PyTorch's own pool, so that torch.set_num_threads holds and no second runtime is loaded.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace vitfast::cpu {

// Calls f(begin, end) on disjoint runs that cover [0, count), at least `grain` long but for the last.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, count, grain, f);
}

// How many threads share the runs at most.
inline int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace vitfast::cpu
