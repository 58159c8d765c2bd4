// The operators for convolutions with 3x3 filters on the CPU. Arguments come from vitfast/ops/convolution.py; what is
// checked here only keeps a direct call within bounds.
#include "cpu/winograd.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/dispatch.h"
#include "operators.h"

namespace vitfast {
namespace {

using torch::headeronly::ScalarType;

const cpu::WinogradKernels& kernels() {
  return cpu::kernels_for(cpu::avx512::winograd_kernels, cpu::avx2::winograd_kernels, cpu::baseline::winograd_kernels);
}

void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, "vitfast::conv3x3: ", what); }

struct Sizes {
  int64_t images, channels, height, width;
};

// Maps (K, images, channels, height, width), or one for all without K; `sizes` are set by the first.
cpu::ChannelsLast maps(const Tensor& tensor, int64_t count, std::optional<Sizes>& sizes) {
  const bool is_one = tensor.dim() == 4;
  check(tensor.scalar_type() == ScalarType::Float && (is_one || (tensor.dim() == 5 && tensor.size(0) == count)),
        "maps must be float32, (images, channels, height, width), maybe with K in front");
  const int64_t d = is_one ? 0 : 1;
  const Sizes own{tensor.size(d), tensor.size(d + 1), tensor.size(d + 2), tensor.size(d + 3)};
  if (!sizes.has_value()) sizes = own;
  check(own.images == sizes->images && own.channels == sizes->channels && own.height == sizes->height &&
            own.width == sizes->width,
        "maps that are added up must have one shape");
  check(tensor.stride(d + 1) == 1 && own.channels % cpu::kConvolutionChannels == 0,
        "channels must be a multiple of 16, and adjacent");
  return {static_cast<const float*>(tensor.data_ptr()), is_one ? 0 : tensor.stride(0), tensor.stride(d),
          tensor.stride(d + 2), tensor.stride(d + 3)};
}

// Filters (K, rows, columns, 3, 3), or one for all without K.
cpu::Filters filters(const Tensor& tensor, int64_t count, int64_t rows, int64_t columns) {
  const int64_t d = tensor.dim() - 4;
  check(tensor.scalar_type() == ScalarType::Float && (d == 0 || (d == 1 && tensor.size(0) == count)) &&
            tensor.size(d) == rows && tensor.size(d + 1) == columns && tensor.size(d + 2) == 3 &&
            tensor.size(d + 3) == 3,
        "filters must be float32, (outputs, inputs, 3, 3), maybe with K in front");
  check(tensor.stride(d) == 9 * columns && tensor.stride(d + 1) == 9 && tensor.stride(d + 2) == 3 &&
            tensor.stride(d + 3) == 1,
        "each filter must be contiguous");
  return {static_cast<const float*>(tensor.data_ptr()), d == 0 ? 0 : tensor.stride(0)};
}

cpu::ConvolutionShape shape_of(int64_t count, const Sizes& in, const Sizes& out, int64_t padding) {
  check(padding >= 0 && padding <= 2, "padding must be 0, 1 or 2");
  check(out.images == in.images && out.height == in.height + 2 * padding - 2 && out.width == in.width + 2 * padding - 2,
        "results must be 2 - 2 padding pixels smaller than the maps");
  check(count > 0 && in.images > 0 && in.channels > 0 && out.channels > 0 && out.height > 0 && out.width > 0,
        "nothing may be empty");
  return {count, in.images, in.height, in.width, in.channels, out.height, out.width, out.channels, padding};
}

}  // namespace

void conv3x3_cpu(std::optional<Tensor> x_t, std::optional<Tensor> weight, std::optional<Tensor> x,
                 std::optional<Tensor> weight_t, int64_t padding, bool transposed, Tensor out) {
  check(out.dim() == 5, "out must be (K, images, channels, height, width)");
  const int64_t count = out.size(0);
  std::optional<Sizes> in, result;
  cpu::SumOfConvolutions call{};
  const cpu::ChannelsLast to = maps(out, count, result);
  const int64_t row = result->channels * result->width, image = row * result->height;
  check(to.pixel == result->channels && to.row == row && to.image == image && to.step == image * result->images,
        "out must be dense, with channels last");
  call.out = const_cast<float*>(to.data);
  const auto add = [&](const std::optional<Tensor>& map, const std::optional<Tensor>& filter) {
    if (!map.has_value() || !filter.has_value()) return;
    const cpu::ChannelsLast from = maps(*map, count, in);
    call.pairs[call.terms++] = {from, transposed ? filters(*filter, count, in->channels, result->channels)
                                                 : filters(*filter, count, result->channels, in->channels)};
  };
  add(x_t, weight);
  add(x, weight_t);
  check(call.terms > 0, "there must be a map and a filter for it");
  call.shape = shape_of(count, *in, *result, padding);
  call.transposed = transposed;
  kernels().convolve(call);
}

void conv3x3_weight_gradient_cpu(std::optional<Tensor> x_t, std::optional<Tensor> grad, std::optional<Tensor> x,
                                 std::optional<Tensor> grad_t, int64_t padding, Tensor out) {
  check(out.dim() == 5, "out must be (K, outputs, inputs, 3, 3)");
  const int64_t count = out.size(0);
  std::optional<Sizes> in, result;
  cpu::SumOfFilterGradients call{};
  const auto add = [&](const std::optional<Tensor>& map, const std::optional<Tensor>& gradient) {
    if (!map.has_value() || !gradient.has_value()) return;
    const cpu::ChannelsLast from = maps(*map, count, in), by = maps(*gradient, count, result);
    call.pairs[call.terms++] = {from, by};
  };
  add(x_t, grad);
  add(x, grad_t);
  check(call.terms > 0, "there must be a map and a gradient for it");
  call.shape = shape_of(count, *in, *result, padding);
  const cpu::Filters to = filters(out, count, result->channels, in->channels);
  check(to.step == 9 * in->channels * result->channels, "out must be contiguous");
  call.out = const_cast<float*>(to.data);
  kernels().filter_gradient(call);
}

}  // namespace vitfast
