// Window attention, forward and backward, fused: no roll, no partition, no score matrix in memory.
//
// For each window and head, with n queries and m keys (n = m = 49 in a full 7x7 window):
//
//   forward    S = scale Q K^T + bias,  P = softmax(S),  O = P V,  lse = log sum exp S
//   backward   P = exp(S - lse),  dP = G V^T,  dS = P (dP - rowsum(P dP))
//              dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T G,  dbias += dS
//
// What is saved for the backward is lse alone.
#pragma once

#include "cpu/window_attention_squares.h"
#include "cpu/window_attention_tangents.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// The tasks of all heads and images, in an order that reads maps as they lie in memory.
template <class Tasks>
auto task_at(const Tasks& tasks, const WindowAttentionProblem& problem, int64_t index) {
  if (problem.channels_last) {
    const int64_t head = index % problem.heads, rest = index / problem.heads;
    return tasks.task(rest / tasks.per_map(), head, rest % tasks.per_map());
  }
  const int64_t rest = index / tasks.per_map();
  return tasks.task(rest / problem.heads, rest % problem.heads, index % tasks.per_map());
}

// Computes the tasks from `begin` to `end`, telling each what comes next.
template <class Window, class TaskAt>
void run_tasks(Window& compute, int64_t begin, int64_t end, TaskAt task_at) {
  if (begin == end) return;
  auto current = task_at(begin);
  for (int64_t i = begin; i < end; ++i) {
    const auto next = i + 1 < end ? task_at(i + 1) : current;
    compute(current, next);
    current = next;
  }
}

template <class Window>
void forward_of(const WindowAttentionForward& call) {
  const WindowAttentionProblem& problem = call.problem;
  const Walk<typename Window::T> walk(problem);
  const typename Window::Tasks tasks(walk);
  const int64_t bytes = Window(call, walk, Arena()).bytes();
  parallel_for(problem.batch * problem.heads * tasks.per_map(), tasks.grain(), [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    Window compute(call, walk, Arena(scratch.data()));
    run_tasks(compute, begin, end, [&](int64_t i) { return task_at(tasks, problem, i); });
  });
}

// Computes all windows of a call that sums up gradients of the bias. The windows of a head are cut into `call.splits`
// runs that have one sum each: `begin(compute, head)` and `finish(compute, head, run)` are called around them.
template <class Window, class Call, class Begin, class Finish>
void run_windows(const Call& call, bool sums_bias, Begin begin_run, Finish finish_run) {
  const WindowAttentionProblem& problem = call.problem;
  const Walk<typename Window::T> walk(problem);
  const typename Window::Tasks tasks(walk);
  const int64_t bytes = Window(call, walk, Arena()).bytes();
  if (!sums_bias) {
    parallel_for(problem.batch * problem.heads * tasks.per_map(), tasks.grain(), [&](int64_t begin, int64_t end) {
      const Scratch scratch(bytes);
      Window compute(call, walk, Arena(scratch.data()));
      run_tasks(compute, begin, end, [&](int64_t i) { return task_at(tasks, problem, i); });
    });
    return;
  }
  const int64_t heads = problem.heads, splits = call.splits, windows = problem.batch * tasks.per_map();
  parallel_for(splits * heads, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    Window compute(call, walk, Arena(scratch.data()));
    for (int64_t next = begin; next < end;) {
      const int64_t split = next / heads, head = next % heads;
      const int64_t in_turn = std::min({Window::heads_in_turn(call), heads - head, end - next});
      for (int64_t h = head; h < head + in_turn; ++h) begin_run(compute, h);
      run_tasks(compute, windows * split / splits * in_turn, windows * (split + 1) / splits * in_turn, [&](int64_t i) {
        const int64_t window = i / in_turn;
        return tasks.task(window / tasks.per_map(), head + i % in_turn, window % tasks.per_map());
      });
      for (int64_t h = head; h < head + in_turn; ++h) finish_run(compute, h, h * splits + split);
      next += in_turn;
    }
  });
}

template <class Window>
void backward_of(const WindowAttentionBackward& call) {
  using T = typename Window::T;
  const int64_t bias_size = call.problem.queries() * call.problem.keys();
  run_windows<Window>(
      call, call.bias_grad != nullptr, [](Window& compute, int64_t head) { compute.bias_grad(head).begin(); },
      [&](Window& compute, int64_t head, int64_t run) {
        compute.bias_grad(head).finish(static_cast<T*>(call.bias_grad) + run * bias_size);
      });
}

template <class S>
void tangents_of(const WindowAttentionTangents& call) {
  using T = Compute<S>;
  using Window = WindowTangents<S>;
  const int64_t bias_size = call.problem.queries() * call.problem.keys();
  const int64_t step = call.problem.heads * call.splits * bias_size;
  run_windows<Window>(
      call, call.bias_grad_t != nullptr,
      [](Window& compute, int64_t) {
        for (BiasGrad<T>& grad_t : compute.bias_grads_t()) grad_t.begin();
      },
      [&](Window& compute, int64_t, int64_t run) {
        T* out = static_cast<T*>(call.bias_grad_t) + run * bias_size;
        for (const BiasGrad<T>& grad_t : compute.bias_grads_t()) grad_t.finish(out), out += step;
      });
}

// Channels-first maps: no map's elements are adjacent.
bool as_planes(std::initializer_list<const MapView*> maps) {
  return std::all_of(maps.begin(), maps.end(), [](const MapView* map) { return map->stride[4] != 1; });
}

void forward(const WindowAttentionForward& call) {
  const auto maps = {&call.query, &call.key, &call.value, &call.out};
#if VITFAST_VECTOR_BYTES == 64
  if (as_squares(call.problem, maps)) return forward_of<ForwardSquares>(call);
#endif
  const bool planes = as_planes(maps);
  with_storage(call.problem.storage, [&](auto s) {
    using S = decltype(s);
    planes ? forward_of<ForwardPlanes<S>>(call) : forward_of<ForwardTokens<S>>(call);
  });
}

void backward(const WindowAttentionBackward& call) {
  const auto maps = {&call.grad,       &call.query,    &call.key,       &call.value,
                     &call.grad_query, &call.grad_key, &call.grad_value};
#if VITFAST_VECTOR_BYTES == 64
  if (as_squares(call.problem, maps)) return backward_of<BackwardSquares>(call);
#endif
  const bool planes = as_planes(maps);
  with_storage(call.problem.storage, [&](auto s) {
    using S = decltype(s);
    planes ? backward_of<BackwardPlanes<S>>(call) : backward_of<BackwardTokens<S>>(call);
  });
}

void tangents(const WindowAttentionTangents& call) {
  with_storage(call.problem.storage, [&](auto s) { tangents_of<decltype(s)>(call); });
}

}  // namespace

extern const WindowAttentionKernels window_attention_kernels = {forward, backward, tangents};

}  // namespace vitfast::cpu::VITFAST_ISA
