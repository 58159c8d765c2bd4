// Residual branches of transformers on the CPU, some rows of a map at a time: layer normalisation, matrix products, the
// factor of stochastic depth and the residual addition while the rows are in the caches. Arguments come from
// vitfast/ops/branches.py; what is checked here only keeps a direct call within bounds.
//
// A block is the rows of a map x (rows, channels) that `index` names, each of which `scale` has a factor for; without
// them it is all of x. Maps of results are written in these rows, matrices of a block have a row for each of them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "cpu/dispatch.h"
#include "cpu/gelu.h"
#include "cpu/layer_norm.h"
#include "cpu/matrix_sum.h"
#include "cpu/scratch.h"
#include "cpu/weight_gradient.h"
#include "operators.h"

namespace vitfast {
namespace {

using torch::headeronly::ScalarType;

// Widths of matrices are multiples of this.
constexpr int64_t kWidth = std::max({cpu::kMatrixSumColumns, cpu::kWeightGradientInputs, cpu::kLayerNormChannels});

void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, "vitfast: residual branch: ", what); }

float* matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  check(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 && tensor.is_contiguous() &&
            tensor.size(0) == rows && tensor.size(1) == columns && columns % kWidth == 0,
        "matrices must be contiguous in float32, of fitting shapes, and a multiple of 16 columns wide");
  return static_cast<float*>(tensor.data_ptr());
}

float* vector(const std::optional<Tensor>& tensor, int64_t size) {
  if (!tensor.has_value()) return nullptr;
  check(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() && tensor->numel() == size,
        "vectors must be contiguous in float32, of fitting sizes");
  return static_cast<float*>(tensor->data_ptr());
}

// Which rows of a map a block has.
struct Block {
  Block(const Tensor& map, const std::optional<Tensor>& index, const std::optional<Tensor>& scale)
      : map_rows(map.dim() == 2 ? map.size(0) : 0), channels(map.dim() == 2 ? map.size(1) : 0), rows(map_rows) {
    check(map_rows > 0 && channels > 0, "a map must be a matrix with elements");
    if (index.has_value()) {
      check(index->scalar_type() == ScalarType::Long && index->is_contiguous(), "index must be contiguous in int64");
      chosen.index = static_cast<const int64_t*>(index->data_ptr()), rows = index->numel();
      check(std::all_of(chosen.index, chosen.index + rows, [&](int64_t row) { return 0 <= row && row < map_rows; }),
            "index must be of rows of the map");
    }
    check(rows > 0, "a block must have rows");
    chosen.scale = vector(scale, rows);
  }

  float* map(const Tensor& tensor) const { return matrix(tensor, map_rows, channels); }
  cpu::RowTable unscaled() const { return {chosen.index, nullptr}; }

  int64_t map_rows, channels, rows;
  cpu::RowTable chosen;
};

struct Linear {
  Linear(const Tensor& weight, const std::optional<Tensor>& bias, int64_t inputs)
      : inputs(inputs), outputs(weight.dim() == 2 ? weight.size(0) : 0) {
    this->weight = matrix(weight, outputs, inputs);
    check(outputs > 0 && outputs % kWidth == 0, "a linear layer must have a multiple of 16 outputs");
    this->bias = vector(bias, outputs);
  }

  int64_t inputs, outputs;
  const float *weight, *bias;
};

const cpu::LayerNormKernels& layer_norm_kernels() {
  return cpu::kernels_for(cpu::avx512::layer_norm_kernels, cpu::avx2::layer_norm_kernels,
                          cpu::baseline::layer_norm_kernels);
}

// x W^T + b, to be completed.
cpu::MatrixSum apply(const Linear& layer, int64_t rows, const float* x, float* out) {
  cpu::MatrixSum call{};
  call.count = 1, call.rows = rows, call.columns = layer.outputs;
  call.terms[0] = {x, layer.weight, layer.inputs, 0, layer.inputs, 0, 1, layer.inputs};
  call.terms_in_use = 1;
  call.start = layer.bias;
  call.out = out;
  return call;
}

// G W, to be completed.
cpu::MatrixSum apply_transposed(const Linear& layer, int64_t rows, const float* grad, float* out) {
  cpu::MatrixSum call{};
  call.count = 1, call.rows = rows, call.columns = layer.inputs;
  call.terms[0] = {grad, layer.weight, layer.outputs, 0, layer.outputs, 0, layer.inputs, 1};
  call.terms_in_use = 1;
  call.out = out;
  return call;
}

// plus + s (x W^T + b) in the rows of a block.
void add_to_map(const Linear& layer, const Block& block, const float* x, const float* plus, float* out) {
  cpu::MatrixSum call = apply(layer, block.rows, x, out);
  call.out_rows = block.chosen, call.plus = plus;
  cpu::run(call);
}

// s G W of gradients G in the rows of a block.
void take_from_map(const Linear& layer, const Block& block, const float* grad, float* out) {
  cpu::MatrixSum call = apply_transposed(layer, block.rows, grad, out);
  call.a_rows = block.unscaled(), call.out_rows.scale = block.chosen.scale;
  cpu::run(call);
}

// What the parameters of a linear layer get: written or, with `add`, added. A weight that is null gets nothing, nor
// does its bias.
struct LinearGradients {
  LinearGradients(const Linear& layer, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, bool add)
      : weight(weight.has_value() ? matrix(*weight, layer.outputs, layer.inputs) : nullptr),
        bias(vector(bias, layer.outputs)),
        add(add) {
    check(this->weight != nullptr || this->bias == nullptr, "a bias gets its gradient beside the weight");
  }

  void operator()(const Linear& layer, int64_t rows, const float* grad, cpu::RowTable grad_rows, const float* x) const {
    if (weight == nullptr) return;
    const cpu::WeightGradient::Term term{grad, x, 0, layer.outputs, 0, layer.inputs};
    cpu::run(cpu::WeightGradient{1, rows, layer.outputs, layer.inputs, {term}, 1, weight, bias, add, grad_rows});
  }

  float *weight, *bias;
  bool add;
};

// Layer normalisation of a block. The arena has room for its statistics and result.
class Normalization {
 public:
  Normalization(const Tensor& x, const Block& block, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& bias, double eps, cpu::Arena& arena)
      : call_{block.rows,
              block.channels,
              block.map(x),
              block.unscaled(),
              vector(weight, block.channels),
              vector(bias, block.channels),
              static_cast<float>(eps),
              arena.take<float>(block.rows),
              arena.take<float>(block.rows)},
        result_(arena.take<float>(block.rows * block.channels)) {}

  const float* forward() const {
    layer_norm_kernels().forward(call_, result_);
    return result_;
  }
  // Writes the gradient of x, and those of weight and bias, or adds to them; null where they are not wanted.
  void backward(const float* grad, const float* start, float* x_grad, float* weight_grad, float* bias_grad,
                bool add) const {
    // Runs of rows, each with sums of its own: so many at most that these are few beside the rows.
    const int64_t splits = std::clamp<int64_t>(call_.rows / 32, 1, 16), size = 2 * call_.channels;
    const cpu::Scratch scratch(splits * size * static_cast<int64_t>(sizeof(float)));
    float* partial = reinterpret_cast<float*>(scratch.data());
    layer_norm_kernels().backward(call_, grad, start, x_grad, partial, splits);
    const auto add_up = [&](const float* first, float* sums) {
      if (sums == nullptr) return;
      for (int64_t c = 0; c < call_.channels; ++c) {
        float sum = add ? sums[c] : 0.0f;
        for (int64_t split = 0; split < splits; ++split) sum += first[split * size + c];
        sums[c] = sum;
      }
    };
    add_up(partial, weight_grad);
    add_up(partial + call_.channels, bias_grad);
  }

 private:
  cpu::LayerNorm call_;
  float* result_;
};

// Calls f(arena) twice: to count the bytes it takes, and to compute.
template <class F>
void with_arena(F f) {
  cpu::Arena counting;
  f(counting);
  const cpu::Scratch scratch(counting.used());
  cpu::Arena arena(scratch.data());
  f(arena);
}

}  // namespace

void norm_linear_cpu(Tensor x, std::optional<Tensor> index, std::optional<Tensor> norm_weight,
                     std::optional<Tensor> norm_bias, double eps, Tensor weight, std::optional<Tensor> bias,
                     Tensor out) {
  const Block block(x, index, std::nullopt);
  const Linear layer(weight, bias, block.channels);
  float* result = matrix(out, block.rows, layer.outputs);
  with_arena([&](cpu::Arena& arena) {
    const Normalization norm(x, block, norm_weight, norm_bias, eps, arena);
    if (arena.holds_memory()) cpu::run(apply(layer, block.rows, norm.forward(), result));
  });
}

void norm_linear_backward_cpu(Tensor grad, std::optional<Tensor> start, Tensor x, std::optional<Tensor> index,
                              std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps,
                              Tensor weight, bool add, Tensor x_grad, std::optional<Tensor> norm_weight_grad,
                              std::optional<Tensor> norm_bias_grad, std::optional<Tensor> weight_grad,
                              std::optional<Tensor> bias_grad) {
  const Block block(x, index, std::nullopt);
  const Linear layer(weight, std::nullopt, block.channels);
  const LinearGradients accumulate(layer, weight_grad, bias_grad, add);
  const float *rows = matrix(grad, block.rows, layer.outputs),
              *residual = start.has_value() ? block.map(*start) : nullptr;
  float *result = block.map(x_grad), *norm_weight_sum = vector(norm_weight_grad, block.channels);
  float* norm_bias_sum = vector(norm_bias_grad, block.channels);
  with_arena([&](cpu::Arena& arena) {
    const Normalization norm(x, block, norm_weight, norm_bias, eps, arena);
    float* normal_grad = arena.take<float>(block.rows * block.channels);
    if (!arena.holds_memory()) return;
    accumulate(layer, block.rows, rows, {}, norm.forward());
    cpu::run(apply_transposed(layer, block.rows, rows, normal_grad));
    norm.backward(normal_grad, residual, result, norm_weight_sum, norm_bias_sum, add);
  });
}

void add_linear_cpu(Tensor x, Tensor y, std::optional<Tensor> index, std::optional<Tensor> scale, Tensor weight,
                    std::optional<Tensor> bias, Tensor out) {
  const Block block(x, index, scale);
  const Linear layer(weight, bias, y.dim() == 2 ? y.size(1) : 0);
  check(layer.outputs == block.channels, "the layer must have as many outputs as the map has channels");
  add_to_map(layer, block, matrix(y, block.rows, layer.inputs), block.map(x), block.map(out));
}

void add_linear_backward_cpu(Tensor grad, Tensor y, std::optional<Tensor> index, std::optional<Tensor> scale,
                             Tensor weight, bool add, Tensor y_grad, std::optional<Tensor> weight_grad,
                             std::optional<Tensor> bias_grad) {
  const Block block(grad, index, scale);
  const Linear layer(weight, std::nullopt, y.dim() == 2 ? y.size(1) : 0);
  check(layer.outputs == block.channels, "the layer must have as many outputs as the map has channels");
  const LinearGradients accumulate(layer, weight_grad, bias_grad, add);
  const float* grads = block.map(grad);
  accumulate(layer, block.rows, grads, block.chosen, matrix(y, block.rows, layer.inputs));
  take_from_map(layer, block, grads, matrix(y_grad, block.rows, layer.inputs));
}

void residual_mlp_cpu(Tensor x, std::optional<Tensor> index, std::optional<Tensor> scale,
                      std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps, Tensor weight1,
                      std::optional<Tensor> bias1, Tensor weight2, std::optional<Tensor> bias2, Tensor out,
                      std::optional<Tensor> hidden) {
  const Block block(x, index, scale);
  const Linear layer1(weight1, bias1, block.channels), layer2(weight2, bias2, layer1.outputs);
  check(layer2.outputs == block.channels, "the second layer must have as many outputs as the map has channels");
  float *result = block.map(out), *kept = hidden.has_value() ? matrix(*hidden, block.rows, layer1.outputs) : nullptr;
  const int64_t size = block.rows * layer1.outputs;
  with_arena([&](cpu::Arena& arena) {
    const Normalization norm(x, block, norm_weight, norm_bias, eps, arena);
    float* activated = arena.take<float>(size);
    if (!arena.holds_memory()) return;
    float* before = kept == nullptr ? activated : kept;
    cpu::run(apply(layer1, block.rows, norm.forward(), before));
    cpu::gelu_kernels().forward({cpu::Storage::kFloat32, size, before, activated});
    add_to_map(layer2, block, activated, block.map(x), result);
  });
}

void residual_mlp_backward_cpu(Tensor grad, Tensor x, std::optional<Tensor> index, std::optional<Tensor> scale,
                               std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps,
                               Tensor weight1, Tensor weight2, Tensor hidden, bool add, Tensor x_grad,
                               std::optional<Tensor> norm_weight_grad, std::optional<Tensor> norm_bias_grad,
                               std::optional<Tensor> weight1_grad, std::optional<Tensor> bias1_grad,
                               std::optional<Tensor> weight2_grad, std::optional<Tensor> bias2_grad) {
  const Block block(x, index, scale);
  const Linear layer1(weight1, std::nullopt, block.channels), layer2(weight2, std::nullopt, layer1.outputs);
  check(layer2.outputs == block.channels, "the second layer must have as many outputs as the map has channels");
  const LinearGradients accumulate1(layer1, weight1_grad, bias1_grad, add);
  const LinearGradients accumulate2(layer2, weight2_grad, bias2_grad, add);
  const float *grads = block.map(grad), *before = matrix(hidden, block.rows, layer1.outputs);
  float *result = block.map(x_grad), *norm_weight_sum = vector(norm_weight_grad, block.channels);
  float* norm_bias_sum = vector(norm_bias_grad, block.channels);
  const int64_t size = block.rows * layer1.outputs;
  with_arena([&](cpu::Arena& arena) {
    const Normalization norm(x, block, norm_weight, norm_bias, eps, arena);
    float *activated = arena.take<float>(size), *hidden_grad = arena.take<float>(size);
    float* normal_grad = arena.take<float>(block.rows * block.channels);
    if (!arena.holds_memory()) return;
    take_from_map(layer2, block, grads, hidden_grad);
    cpu::gelu_kernels().backward({cpu::Storage::kFloat32, size, before, activated, hidden_grad});
    accumulate2(layer2, block.rows, grads, block.chosen, activated);
    accumulate1(layer1, block.rows, hidden_grad, {}, norm.forward());
    cpu::run(apply_transposed(layer1, block.rows, hidden_grad, normal_grad));
    norm.backward(normal_grad, grads, result, norm_weight_sum, norm_bias_sum, add);
  });
}

}  // namespace vitfast
