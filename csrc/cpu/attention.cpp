// The attention operators on the CPU: allocation, and the choice of a kernel. Arguments were checked by
// vitfast.functional; what is checked here only keeps a direct call of the operator within bounds.
#include "cpu/attention.h"

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

using cpu::AttentionProblem;
using cpu::AttentionTangents;
using cpu::Batch;
using cpu::BiasView;
using cpu::new_result;
using cpu::new_result_like;
using cpu::SequenceView;
using torch::headeronly::ScalarType;

const cpu::AttentionKernels& kernels() {
  return cpu::kernels_for(cpu::avx512::attention_kernels, cpu::avx2::attention_kernels,
                          cpu::baseline::attention_kernels);
}

void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, "vitfast::attention: ", what); }

// Of a (B, heads, tokens, D) tensor.
SequenceView view_of(const Tensor& x) { return {x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}}; }

// Of a (B, tokens, heads, D) tensor.
SequenceView tokens_first_view(const Tensor& x) {
  return {x.data_ptr(), {x.stride(0), x.stride(2), x.stride(1), x.stride(3)}};
}

// Part 0, 1 or 2 (query, key, value) of a packed (B, N, 3, heads, D) tensor.
SequenceView packed_view(const Tensor& qkv, int64_t part) {
  const int64_t bytes = static_cast<int64_t>(qkv.element_size());
  return {static_cast<char*>(qkv.data_ptr()) + part * qkv.stride(2) * bytes,
          {qkv.stride(0), qkv.stride(3), qkv.stride(1), qkv.stride(4)}};
}

struct Shape {
  ScalarType dtype;
  int64_t batch, heads, queries, keys, dim;

  bool empty() const { return batch == 0 || heads == 0 || queries == 0 || keys == 0 || dim == 0; }
};

Shape shape_of(const Tensor& query, const Tensor& key, const Tensor& value) {
  check(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "query, key and value must be (B, heads, tokens, D)");
  check(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
        "query, key and value must have one dtype");
  for (const int i : {0, 1, 3}) check(key.size(i) == query.size(i), "query and key differ in B, heads or D");
  for (int i = 0; i < 4; ++i) check(key.size(i) == value.size(i), "key and value must have one shape");
  return {query.scalar_type(), query.size(0), query.size(1), query.size(2), key.size(2), query.size(3)};
}

Shape shape_of(const Tensor& qkv) {
  check(qkv.dim() == 5 && qkv.size(2) == 3, "qkv must be (B, N, 3, heads, D)");
  return {qkv.scalar_type(), qkv.size(0), qkv.size(3), qkv.size(1), qkv.size(1), qkv.size(4)};
}

// The output and its gradient are (B, heads, N, D), or (B, N, heads, D) where the input is packed.
void check_outputs(const Shape& shape, const Tensor& grad, const Tensor& out, bool packed) {
  const std::vector<int64_t> sizes = packed ? std::vector<int64_t>{shape.batch, shape.queries, shape.heads, shape.dim}
                                            : std::vector<int64_t>{shape.batch, shape.heads, shape.queries, shape.dim};
  for (const Tensor* x : {&grad, &out}) {
    check(x->scalar_type() == shape.dtype && x->dim() == 4, "grad and out must have the output's shape and dtype");
    for (int i = 0; i < 4; ++i) check(x->size(i) == sizes[i], "grad and out must have the output's shape and dtype");
  }
}

BiasView bias_view(const std::optional<Tensor>& bias, const Shape& shape) {
  if (!bias.has_value()) return {};
  check(bias->dim() == 4 && bias->size(3) == shape.keys, "bias must be (B or 1, heads or 1, N or 1, M)");
  const int64_t sizes[] = {shape.batch, shape.heads, shape.queries};
  BiasView view;
  view.data = bias->data_ptr();
  view.stride[3] = bias->stride(3);
  for (int i = 0; i < 3; ++i) {
    check(bias->size(i) == sizes[i] || bias->size(i) == 1, "bias must be (B or 1, heads or 1, N or 1, M)");
    view.stride[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
  }
  check(bias->scalar_type() == cpu::compute_dtype(shape.dtype), "bias must have the dtype the scores are computed in");
  view.batch = bias->size(0);
  view.heads = bias->size(1);
  view.queries = bias->size(2);
  return view;
}

AttentionProblem problem_of(const Shape& shape, const std::optional<Tensor>& bias, double scale) {
  return {cpu::storage_of(shape.dtype), shape.batch, shape.heads, shape.queries, shape.keys, shape.dim, scale,
          bias_view(bias, shape)};
}

// The output is 0 where there are no keys; the logsumexp of nothing is -inf.
std::tuple<Tensor, Tensor> forward(const Shape& shape, const SequenceView& query, const SequenceView& key,
                                   const SequenceView& value, const std::optional<Tensor>& bias, double scale,
                                   bool return_lse, Tensor out, const SequenceView& out_view) {
  const AttentionProblem problem = problem_of(shape, bias, scale);
  const std::vector<int64_t> full = {shape.batch, shape.heads, shape.queries};
  Tensor lse =
      torch::stable::new_empty(out, return_lse ? full : std::vector<int64_t>{0}, cpu::compute_dtype(shape.dtype));
  if (shape.empty()) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  } else {
    kernels().forward({problem, query, key, value, out_view, return_lse ? lse.data_ptr() : nullptr});
  }
  return {out, lse};
}

// Into how many runs the heads that share a bias are cut: a power of two, and no more than give every thread some, as
// each has a partial sum of its own.
int64_t splits_of(const Shape& shape, const BiasView& bias) {
  constexpr int64_t kRuns = 16;
  const int64_t biases = bias.batch * bias.heads, members = shape.batch * shape.heads / biases;
  int64_t splits = 1;
  while (2 * splits <= members && biases * splits < kRuns) splits *= 2;
  return splits;
}

Tensor backward(const Shape& shape, const Tensor& grad, const SequenceView& grad_view, const SequenceView& query,
                const SequenceView& key, const SequenceView& value, const std::optional<Tensor>& bias,
                const Tensor& lse, double scale, const SequenceView& grad_query, const SequenceView& grad_key,
                const SequenceView& grad_value, std::vector<Tensor> grads) {
  const AttentionProblem problem = problem_of(shape, bias, scale);
  check(lse.is_contiguous() && lse.scalar_type() == cpu::compute_dtype(shape.dtype) &&
            lse.numel() == shape.batch * shape.heads * shape.queries,
        "lse must be what the forward returned");
  Tensor bias_grad = bias.has_value()
                         ? torch::stable::new_empty(*bias, {bias->size(0), bias->size(1), bias->size(2), bias->size(3)})
                         : torch::stable::new_empty(grad, {0});
  if (shape.empty()) {
    grads.push_back(bias_grad);
    for (Tensor& x : grads) torch::stable::zero_(x);
    return bias_grad;
  }
  const int64_t splits = bias.has_value() ? splits_of(shape, problem.bias) : 1;
  const int64_t biases = problem.bias.batch * problem.bias.heads, size = problem.bias.queries * shape.keys;
  const Tensor partial = splits == 1 ? bias_grad : torch::stable::new_empty(bias_grad, {biases, splits, size});
  kernels().backward({problem, grad_view, query, key, value, grad_query, grad_key, grad_value, lse.data_ptr(),
                      bias.has_value() ? partial.data_ptr() : nullptr, splits});
  if (splits > 1) cpu::add_up_partial_sums(partial, biases, splits, size, bias_grad);
  return bias_grad;
}

// Of a (K, B, heads, tokens, D) tensor.
Batch<SequenceView> batch_of(const std::optional<Tensor>& x, const Tensor& primal, int64_t count) {
  if (!x.has_value()) return {};
  check(cpu::is_batch_of(*x, primal, primal.scalar_type(), count), "tangents must be (K, *shape of the primal)");
  return {{x->data_ptr(), {x->stride(1), x->stride(2), x->stride(3), x->stride(4)}}, x->stride(0)};
}

Batch<BiasView> bias_batch_of(const std::optional<Tensor>& x, const std::optional<Tensor>& bias, int64_t count,
                              const Shape& shape) {
  if (!x.has_value()) return {};
  check(bias.has_value() && cpu::is_batch_of(*x, *bias, bias->scalar_type(), count),
        "the bias's tangents must be (K, *shape of the bias)");
  return {bias_view(torch::stable::select(*x, 0, 0), shape), x->stride(0)};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_cpu(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                         double scale, bool return_lse) {
  const Shape shape = shape_of(query, key, value);
  const Tensor out =
      torch::stable::transpose(new_result(query, {shape.batch, shape.queries, shape.heads, shape.dim}), 1, 2);
  return forward(shape, view_of(query), view_of(key), view_of(value), bias, scale, return_lse, out, view_of(out));
}

std::tuple<Tensor, Tensor> attention_qkvpacked_cpu(Tensor qkv, std::optional<Tensor> bias, double scale,
                                                   bool return_lse) {
  const Shape shape = shape_of(qkv);
  const Tensor out = new_result(qkv, {shape.batch, shape.queries, shape.heads, shape.dim});
  return forward(shape, packed_view(qkv, 0), packed_view(qkv, 1), packed_view(qkv, 2), bias, scale, return_lse, out,
                 tokens_first_view(out));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                                  std::optional<Tensor> bias, Tensor out, Tensor lse,
                                                                  double scale) {
  const Shape shape = shape_of(query, key, value);
  check_outputs(shape, grad, out, false);
  const Tensor grad_query = new_result_like(query), grad_key = new_result_like(key),
               grad_value = new_result_like(value);
  const Tensor bias_grad =
      backward(shape, grad, view_of(grad), view_of(query), view_of(key), view_of(value), bias, lse, scale,
               view_of(grad_query), view_of(grad_key), view_of(grad_value), {grad_query, grad_key, grad_value});
  return {grad_query, grad_key, grad_value, bias_grad};
}

std::tuple<Tensor, Tensor> attention_qkvpacked_backward_cpu(Tensor grad, Tensor qkv, std::optional<Tensor> bias,
                                                            Tensor out, Tensor lse, double scale) {
  const Shape shape = shape_of(qkv);
  check_outputs(shape, grad, out, true);
  const Tensor grad_qkv = new_result_like(qkv);
  const Tensor bias_grad = backward(shape, grad, tokens_first_view(grad), packed_view(qkv, 0), packed_view(qkv, 1),
                                    packed_view(qkv, 2), bias, lse, scale, packed_view(grad_qkv, 0),
                                    packed_view(grad_qkv, 1), packed_view(grad_qkv, 2), {grad_qkv});
  return {grad_qkv, bias_grad};
}

void attention_tangents_cpu(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                            std::optional<Tensor> grad, std::optional<Tensor> query_t, std::optional<Tensor> key_t,
                            std::optional<Tensor> value_t, std::optional<Tensor> bias_t, std::optional<Tensor> grad_t,
                            int64_t count, double scale, std::optional<Tensor> out_t,
                            std::optional<Tensor> query_grad_t, std::optional<Tensor> key_grad_t,
                            std::optional<Tensor> value_grad_t, std::optional<Tensor> bias_grad_t) {
  const Shape shape = shape_of(query, key, value);
  if (grad.has_value()) check_outputs(shape, *grad, *grad, false);
  AttentionTangents call{};
  call.problem = problem_of(shape, bias, scale);
  call.count = count;
  call.query = view_of(query), call.key = view_of(key), call.value = view_of(value);
  if (grad.has_value()) call.grad = view_of(*grad);
  call.query_t = batch_of(query_t, query, count);
  call.key_t = batch_of(key_t, key, count);
  call.value_t = batch_of(value_t, value, count);
  call.grad_t = batch_of(grad_t, query, count);
  call.bias_t = bias_batch_of(bias_t, bias, count, shape);
  call.out_t = batch_of(out_t, query, count);
  call.query_grad_t = batch_of(query_grad_t, query, count);
  call.key_grad_t = batch_of(key_grad_t, key, count);
  call.value_grad_t = batch_of(value_grad_t, value, count);
  if (!cpu::prepare_results(call, shape.empty() || count == 0, out_t, query_grad_t, key_grad_t, value_grad_t,
                            bias_grad_t)) {
    return;
  }
  check(grad.has_value() || !cpu::wants_gradients(call, bias_grad_t), "tangents of gradients need grad");
  if (!bias_grad_t.has_value()) return kernels().tangents(call);
  check(bias.has_value() && cpu::is_batch_of(*bias_grad_t, *bias, bias->scalar_type(), count) &&
            bias_grad_t->is_contiguous(),
        "bias_grad_t must be contiguous, (K, *shape of the bias)");
  const BiasView& view = call.problem.bias;
  const int64_t biases = view.batch * view.heads, size = view.queries * shape.keys;
  call.splits = splits_of(shape, view);
  const Tensor partial =
      call.splits == 1 ? *bias_grad_t : torch::stable::new_empty(*bias_grad_t, {count * biases, call.splits, size});
  call.bias_grad_t = partial.data_ptr();
  kernels().tangents(call);
  if (call.splits > 1) cpu::add_up_partial_sums(partial, count * biases, call.splits, size, *bias_grad_t);
}

}  // namespace vitfast
