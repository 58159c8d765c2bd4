// The window attention operators on the CPU: allocation, and the choice of a kernel. Arguments were checked by
// vitfast.functional; what is checked here only keeps a direct call of the operator within bounds.
#include "cpu/window_attention.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/results.h"
#include "cpu/tangents_of.h"
#include "operators.h"

namespace vitfast {
namespace {

using cpu::Batch;
using cpu::MapView;
using cpu::new_result_like;
using cpu::WindowAttentionProblem;
using cpu::WindowAttentionTangents;
using torch::headeronly::ScalarType;

const cpu::WindowAttentionKernels& kernels() {
  return cpu::kernels_for(cpu::avx512::window_attention_kernels, cpu::avx2::window_attention_kernels,
                          cpu::baseline::window_attention_kernels);
}

MapView view_of(const Tensor& x) {
  MapView view;
  view.data = x.data_ptr();
  for (int i = 0; i < 5; ++i) view.stride[i] = x.stride(i);
  return view;
}

// Part 0, 1 or 2 (query, key, value) of a packed (B, H, W, 3, heads, D) tensor.
MapView packed_view(const Tensor& qkv, int64_t part) {
  const int64_t bytes = static_cast<int64_t>(qkv.element_size());
  return {static_cast<char*>(qkv.data_ptr()) + part * qkv.stride(3) * bytes,
          {qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(4), qkv.stride(5)}};
}

void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, "vitfast::window_attention: ", what); }

// The bias must be contiguous; the caller keeps the returned tensor alive.
std::optional<Tensor> contiguous_bias(const std::optional<Tensor>& bias) {
  if (!bias.has_value() || bias->is_contiguous()) return bias;
  return torch::stable::contiguous(*bias);
}

struct Shape {
  ScalarType dtype;
  int64_t batch, height, width, heads, dim, key_height, key_width;
};

Shape shape_of(const Tensor& query, const Tensor& key, const Tensor& value) {
  check(query.dim() == 5 && key.dim() == 5 && value.dim() == 5, "query, key and value must be (B, H, W, heads, D)");
  check(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
        "query, key and value must have one dtype");
  for (const int i : {0, 3, 4}) check(key.size(i) == query.size(i), "query and key differ in B, heads or D");
  for (int i = 0; i < 5; ++i) check(key.size(i) == value.size(i), "key and value must have one shape");
  return {query.scalar_type(), query.size(0), query.size(1), query.size(2),
          query.size(3),       query.size(4), key.size(1),   key.size(2)};
}

Shape shape_of(const Tensor& qkv) {
  check(qkv.dim() == 6 && qkv.size(3) == 3, "qkv must be (B, H, W, 3, heads, D)");
  return {qkv.scalar_type(), qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(4), qkv.size(5), qkv.size(1), qkv.size(2)};
}

int64_t ratio(int64_t size, int64_t key_size, int64_t window, int64_t shift) {
  const int64_t ratio = key_size == 0 ? 1 : size / key_size;
  check(ratio * key_size == size && ratio > 0 && window % ratio == 0 && shift % ratio == 0,
        "the key map must be smaller by a factor that divides the map, the window and the shift");
  return ratio;
}

WindowAttentionProblem problem_of(const Shape& shape, const std::optional<Tensor>& bias,
                                  const std::vector<int64_t>& window, const std::vector<int64_t>& shift, double scale,
                                  const MapView& query) {
  check(window.size() == 2 && shift.size() == 2, "window_size and shift must be pairs");
  constexpr int64_t kLargestWindow = std::numeric_limits<int32_t>::max();  // so that no count of tokens overflows
  for (const int i : {0, 1}) {
    check(0 < window[i] && window[i] <= kLargestWindow, "needs 0 < window_size < 2^31");
    check(0 <= shift[i] && shift[i] < window[i], "needs 0 <= shift < window_size");
  }
  WindowAttentionProblem problem{};
  problem.storage = cpu::storage_of(shape.dtype);
  problem.batch = shape.batch;
  problem.heads = shape.heads;
  problem.dim = shape.dim;
  problem.rows = {shape.height, window[0], shift[0], ratio(shape.height, shape.key_height, window[0], shift[0])};
  problem.columns = {shape.width, window[1], shift[1], ratio(shape.width, shape.key_width, window[1], shift[1])};
  problem.scale = scale;
  problem.channels_last = query.stride[4] == 1;
  if (bias.has_value()) {
    check(bias->dim() == 3 && bias->size(1) == problem.queries() && bias->size(2) == problem.keys() &&
              (bias->size(0) == 1 || bias->size(0) == shape.heads),
          "bias must be (heads or 1, window queries, window keys)");
    check(bias->scalar_type() == cpu::compute_dtype(shape.dtype),
          "bias must have the dtype the scores are computed in");
    problem.bias = bias->data_ptr();
    problem.bias_shared = bias->size(0) == 1;
  }
  return problem;
}

bool empty(const Shape& s) { return s.batch == 0 || s.height == 0 || s.width == 0 || s.heads == 0 || s.dim == 0; }

Tensor new_statistics(const Tensor& like, const Shape& shape, bool wanted) {
  const std::vector<int64_t> full = {shape.batch, shape.heads, shape.height, shape.width};
  return torch::stable::new_empty(like, wanted ? full : std::vector<int64_t>{0}, cpu::compute_dtype(shape.dtype));
}

std::tuple<Tensor, Tensor> forward(const Shape& shape, const MapView& query, const MapView& key, const MapView& value,
                                   const std::optional<Tensor>& bias, const std::vector<int64_t>& window,
                                   const std::vector<int64_t>& shift, double scale, bool return_lse, Tensor out) {
  const std::optional<Tensor> dense_bias = contiguous_bias(bias);
  const WindowAttentionProblem problem = problem_of(shape, dense_bias, window, shift, scale, query);
  Tensor lse = new_statistics(out, shape, return_lse);
  if (!empty(shape)) {
    kernels().forward({problem, query, key, value, view_of(out), return_lse ? lse.data_ptr() : nullptr});
  }
  return {out, lse};
}

// How many runs the windows of a head are cut into: a power of two, so that threads share them evenly, and none of
// fewer windows than this, so that the partial sums take little memory beside the scores that are never stored.
constexpr int64_t kWindowsPerSplit = 32;
constexpr int64_t kMostSplits = 64;

int64_t splits_of(int64_t windows) {
  int64_t splits = 1;
  while (splits < kMostSplits && windows / (2 * splits) >= kWindowsPerSplit) splits *= 2;
  return splits;
}

void check_grad(const Shape& shape, const Tensor& grad) {
  check(grad.dim() == 5 && grad.scalar_type() == shape.dtype && grad.size(0) == shape.batch &&
            grad.size(1) == shape.height && grad.size(2) == shape.width && grad.size(3) == shape.heads &&
            grad.size(4) == shape.dim,
        "grad must have the output's shape and dtype");
}

Tensor backward(const Shape& shape, const Tensor& grad, const MapView& query, const MapView& key, const MapView& value,
                const std::optional<Tensor>& bias, const Tensor& lse, const std::vector<int64_t>& window,
                const std::vector<int64_t>& shift, double scale, const MapView& grad_query, const MapView& grad_key,
                const MapView& grad_value) {
  const std::optional<Tensor> dense_bias = contiguous_bias(bias);
  const WindowAttentionProblem problem = problem_of(shape, dense_bias, window, shift, scale, query);
  check_grad(shape, grad);
  check(lse.is_contiguous() && lse.scalar_type() == cpu::compute_dtype(shape.dtype) &&
            lse.numel() == shape.batch * shape.heads * shape.height * shape.width,
        "lse must be what the forward returned");
  if (!dense_bias.has_value()) {
    Tensor none = torch::stable::new_empty(grad, {0});
    if (!empty(shape)) {
      kernels().backward(
          {problem, view_of(grad), query, key, value, grad_query, grad_key, grad_value, lse.data_ptr(), nullptr, 0});
    }
    return none;
  }
  Tensor bias_grad = torch::stable::new_empty(*dense_bias, {dense_bias->size(0), problem.queries(), problem.keys()});
  if (empty(shape)) return torch::stable::zero_(bias_grad), bias_grad;
  const int64_t splits = splits_of(shape.batch * problem.windows());
  const int64_t sums_per_bias = problem.bias_shared ? shape.heads * splits : splits;
  const Tensor partial = sums_per_bias == 1 ? bias_grad
                                            : torch::stable::new_empty(
                                                  bias_grad, {shape.heads * splits, problem.queries(), problem.keys()});
  kernels().backward({problem, view_of(grad), query, key, value, grad_query, grad_key, grad_value, lse.data_ptr(),
                      partial.data_ptr(), splits});
  if (sums_per_bias > 1) {
    cpu::add_up_partial_sums(partial, dense_bias->size(0), sums_per_bias, problem.queries() * problem.keys(),
                             bias_grad);
  }
  return bias_grad;
}

// Of a (K, B, H, W, heads, D) tensor.
Batch<MapView> batch_of(const std::optional<Tensor>& x, const Tensor& primal, int64_t count) {
  if (!x.has_value()) return {};
  check(cpu::is_batch_of(*x, primal, primal.scalar_type(), count), "tangents must be (K, *shape of the primal)");
  MapView view;
  view.data = x->data_ptr();
  for (int i = 0; i < 5; ++i) view.stride[i] = x->stride(i + 1);
  return {view, x->stride(0)};
}

}  // namespace

std::tuple<Tensor, Tensor> window_attention_cpu(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                                std::vector<int64_t> window_size, std::vector<int64_t> shift,
                                                double scale, bool return_lse) {
  return forward(shape_of(query, key, value), view_of(query), view_of(key), view_of(value), bias, window_size, shift,
                 scale, return_lse, new_result_like(query));
}

std::tuple<Tensor, Tensor> window_attention_qkvpacked_cpu(Tensor qkv, std::optional<Tensor> bias,
                                                          std::vector<int64_t> window_size, std::vector<int64_t> shift,
                                                          double scale, bool return_lse) {
  const Shape shape = shape_of(qkv);
  return forward(shape, packed_view(qkv, 0), packed_view(qkv, 1), packed_view(qkv, 2), bias, window_size, shift, scale,
                 return_lse, new_result_like(torch::stable::select(qkv, 3, 0)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward_cpu(Tensor grad, Tensor query, Tensor key,
                                                                         Tensor value, std::optional<Tensor> bias,
                                                                         Tensor lse, std::vector<int64_t> window_size,
                                                                         std::vector<int64_t> shift, double scale) {
  const Tensor grad_query = new_result_like(query), grad_key = new_result_like(key),
               grad_value = new_result_like(value);
  const Tensor bias_grad =
      backward(shape_of(query, key, value), grad, view_of(query), view_of(key), view_of(value), bias, lse, window_size,
               shift, scale, view_of(grad_query), view_of(grad_key), view_of(grad_value));
  return {grad_query, grad_key, grad_value, bias_grad};
}

std::tuple<Tensor, Tensor> window_attention_qkvpacked_backward_cpu(Tensor grad, Tensor qkv, std::optional<Tensor> bias,
                                                                   Tensor lse, std::vector<int64_t> window_size,
                                                                   std::vector<int64_t> shift, double scale) {
  const Shape shape = shape_of(qkv);
  const Tensor grad_qkv = new_result_like(qkv);
  const Tensor bias_grad =
      backward(shape, grad, packed_view(qkv, 0), packed_view(qkv, 1), packed_view(qkv, 2), bias, lse, window_size,
               shift, scale, packed_view(grad_qkv, 0), packed_view(grad_qkv, 1), packed_view(grad_qkv, 2));
  return {grad_qkv, bias_grad};
}

void window_attention_tangents_cpu(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                   std::optional<Tensor> grad, std::optional<Tensor> query_t,
                                   std::optional<Tensor> key_t, std::optional<Tensor> value_t,
                                   std::optional<Tensor> bias_t, std::optional<Tensor> grad_t, int64_t count,
                                   std::vector<int64_t> window_size, std::vector<int64_t> shift, double scale,
                                   std::optional<Tensor> out_t, std::optional<Tensor> query_grad_t,
                                   std::optional<Tensor> key_grad_t, std::optional<Tensor> value_grad_t,
                                   std::optional<Tensor> bias_grad_t) {
  const Shape shape = shape_of(query, key, value);
  const std::optional<Tensor> dense_bias = contiguous_bias(bias);
  WindowAttentionTangents call{};
  call.problem = problem_of(shape, dense_bias, window_size, shift, scale, view_of(query));
  call.count = count;
  call.query = view_of(query), call.key = view_of(key), call.value = view_of(value);
  if (grad.has_value()) {
    check_grad(shape, *grad);
    call.grad = view_of(*grad);
  }
  call.query_t = batch_of(query_t, query, count);
  call.key_t = batch_of(key_t, key, count);
  call.value_t = batch_of(value_t, value, count);
  call.grad_t = batch_of(grad_t, query, count);
  const std::optional<Tensor> dense_bias_t = contiguous_bias(bias_t);
  if (bias_t.has_value()) {
    check(bias.has_value() && cpu::is_batch_of(*bias_t, *bias, bias->scalar_type(), count),
          "the bias's tangents must be (K, *shape of the bias)");
    call.bias_t = {{dense_bias_t->data_ptr()}, dense_bias_t->stride(0)};
  }
  call.out_t = batch_of(out_t, query, count);
  call.query_grad_t = batch_of(query_grad_t, query, count);
  call.key_grad_t = batch_of(key_grad_t, key, count);
  call.value_grad_t = batch_of(value_grad_t, value, count);
  if (!cpu::prepare_results(call, empty(shape) || count == 0, out_t, query_grad_t, key_grad_t, value_grad_t,
                            bias_grad_t)) {
    return;
  }
  check(grad.has_value() || !cpu::wants_gradients(call, bias_grad_t), "tangents of gradients need grad");
  if (!bias_grad_t.has_value()) return kernels().tangents(call);
  check(bias.has_value() && cpu::is_batch_of(*bias_grad_t, *bias, bias->scalar_type(), count) &&
            bias_grad_t->is_contiguous(),
        "bias_grad_t must be contiguous, (K, *shape of the bias)");
  const WindowAttentionProblem& problem = call.problem;
  call.splits = splits_of(shape.batch * problem.windows());
  const int64_t sums_per_bias = problem.bias_shared ? shape.heads * call.splits : call.splits;
  const Tensor partial =
      sums_per_bias == 1 ? *bias_grad_t
                         : torch::stable::new_empty(
                               *bias_grad_t, {count * shape.heads * call.splits, problem.queries(), problem.keys()});
  call.bias_grad_t = partial.data_ptr();
  kernels().tangents(call);
  if (sums_per_bias > 1) {
    cpu::add_up_partial_sums(partial, count * bias->size(0), sums_per_bias, problem.queries() * problem.keys(),
                             *bias_grad_t);
  }
}

}  // namespace vitfast
