// The operator for tangents of normalisations on the CPU. Arguments come from vitfast/ops/layers.py; what is
// checked here only keeps a direct call within bounds.
#include "cpu/normalization_tangents.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "cpu/dispatch.h"
#include "operators.h"

namespace vitfast {
namespace {

using torch::headeronly::ScalarType;

cpu::NormalizationKernel kernel() {
  return cpu::kernels_for(cpu::avx512::normalization_tangents_kernel, cpu::avx2::normalization_tangents_kernel,
                          cpu::baseline::normalization_tangents_kernel);
}

void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, "vitfast::normalization_tangents: ", what); }

// Runs of rows: enough for every thread, and few beside the rows, as each has sums of its own.
int64_t splits_of(int64_t rows) { return std::clamp<int64_t>(rows / 32, 1, 16); }

}  // namespace

void normalization_tangents_cpu(Tensor x, Tensor mean, Tensor inverse, bool per_channel, std::optional<Tensor> weight,
                                std::optional<Tensor> grad, std::optional<Tensor> x_t, std::optional<Tensor> weight_t,
                                std::optional<Tensor> bias_t, std::optional<Tensor> grad_t, int64_t count,
                                std::optional<Tensor> out_t, std::optional<Tensor> x_grad_t,
                                std::optional<Tensor> weight_grad_t, std::optional<Tensor> bias_grad_t) {
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double, "takes float32 and float64");
  check(x.dim() == 2 && x.is_contiguous(), "x must be (rows, channels), contiguous");
  const int64_t rows = x.size(0), channels = x.size(1), statistics = per_channel ? channels : rows;
  check(count >= 0 && count <= std::numeric_limits<int64_t>::max() / std::max<int64_t>(rows * channels, 1),
        "count must be at least 0, and no more than there can be");
  const auto data = [&](const std::optional<Tensor>& tensor, int64_t size) -> void* {
    if (!tensor.has_value()) return nullptr;
    check(tensor->scalar_type() == dtype && tensor->is_contiguous() && tensor->numel() == size,
          "tensors must be contiguous, of one dtype, and of the sizes of x, with `count` in front of tangents");
    return tensor->data_ptr();
  };
  const int64_t map = count * rows * channels, vector = count * channels;
  cpu::NormalizationTangents call{};
  call.is_double = dtype == ScalarType::Double;
  call.count = count, call.rows = rows, call.channels = channels;
  call.per_channel = per_channel;
  call.x = x.data_ptr(), call.mean = data(mean, statistics), call.inverse = data(inverse, statistics);
  call.weight = data(weight, channels), call.grad = data(grad, rows * channels);
  call.x_t = data(x_t, map), call.weight_t = data(weight_t, vector);
  call.bias_t = data(bias_t, vector), call.grad_t = data(grad_t, map);
  call.out_t = data(out_t, map), call.x_grad_t = data(x_grad_t, map);
  data(weight_grad_t, vector), data(bias_grad_t, vector);
  check(grad.has_value() || (!x_grad_t.has_value() && !weight_grad_t.has_value() && !bias_grad_t.has_value()),
        "tangents of gradients need grad");
  call.splits = splits_of(rows);
  std::optional<Tensor> weight_sums, bias_sums;
  const auto sums = [&](const std::optional<Tensor>& result, std::optional<Tensor>& partial) -> void* {
    if (!result.has_value()) return nullptr;
    partial = torch::stable::new_empty(*result, {call.splits, vector});
    return partial->data_ptr();
  };
  call.weight_grad_t = sums(weight_grad_t, weight_sums), call.bias_grad_t = sums(bias_grad_t, bias_sums);
  kernel()(call);
  if (weight_sums.has_value()) cpu::add_up_partial_sums(*weight_sums, 1, call.splits, vector, *weight_grad_t);
  if (bias_sums.has_value()) cpu::add_up_partial_sums(*bias_sums, 1, call.splits, vector, *bias_grad_t);
}

}  // namespace vitfast
