// The blur pooling operators on NVIDIA GPUs: arguments, launches, and the sums over blocks.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "blur_pool_maps.h"
#include "cuda/blur_pool_kernel.h"

namespace vitfast {
namespace {

using cuda::Blur;
using cuda::BlurAxis;
using cuda::kBlurThreads;
using torch::headeronly::ScalarType;

// ---- kernels -------------------------------------------------------------------------------------------------------

template <class Scalar, class Compute, bool kChannelsLast, bool kTranspose, int kTaps>
__global__ void __launch_bounds__(kBlurThreads, 4) blur_pool_kernel(const __grid_constant__ Blur<Compute> blur) {
  extern __shared__ __align__(16) unsigned char tile[];
  __shared__ double sums[kTranspose ? 2 * kBlurThreads : 1];
  const int thread = static_cast<int>(threadIdx.x);
  const cuda::BlurBlock<Scalar, Compute, kChannelsLast, kTranspose, kTaps> block(
      blur, static_cast<int>(blockIdx.x), reinterpret_cast<Compute*>(tile), sums);
  block.load(thread);
  __syncthreads();
  block.compute(thread);
  if (kTranspose && blur.partial != nullptr) {
    for (int width = (kBlurThreads >> blur.tiles.log_depth) / 2; width > 0; width /= 2) {
      __syncthreads();
      block.add_sums(thread, width);
    }
    __syncthreads();
    block.write_sums(thread);
  }
}

constexpr int kSumChannels = 32, kSumLanes = 8;  // of a block

// scale[c] and shift[c] from the sums of all parts, (parts, channels, 2), in a fixed order.
__global__ void __launch_bounds__(kSumChannels* kSumLanes)
    add_up_parts(const double* partial, int64_t parts, int64_t channels, double* scale, double* shift) {
  __shared__ double sums[2][kSumLanes][kSumChannels];
  const int lane = static_cast<int>(threadIdx.x) / kSumChannels, column = static_cast<int>(threadIdx.x) % kSumChannels;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kSumChannels + column;
  double scale_sum = 0, shift_sum = 0;
  if (channel < channels) {
    for (int64_t part = lane; part < parts; part += kSumLanes) {
      scale_sum += partial[2 * (part * channels + channel)];
      shift_sum += partial[2 * (part * channels + channel) + 1];
    }
  }
  sums[0][lane][column] = scale_sum;
  sums[1][lane][column] = shift_sum;
  __syncthreads();
  if (lane > 1 || channel >= channels) return;
  double sum = 0;  // of scale by the first lane, of shift by the second
  for (int i = 0; i < kSumLanes; ++i) sum += sums[lane][i][column];
  (lane == 0 ? scale : shift)[channel] = sum;
}

// ---- launches ------------------------------------------------------------------------------------------------------

void check_cuda(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "vitfast::blur_pool2d: ", cudaGetErrorString(status));
}

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A call of either operator, in float64; `Blur` holds it in the type that is computed in.
struct Call {
  ScalarType dtype;
  bool channels_last, transpose;
  Blur<double> blur;
  const void *scale, *shift;
  double *grad_scale = nullptr, *grad_shift = nullptr;  // (channels,), or null if they are not wanted
};

template <class Scalar, class Compute, bool kChannelsLast, bool kTranspose, int kTaps>
void launch(const Blur<Compute>& blur, cudaStream_t stream) {
  const int64_t blocks = blur.tiles.blocks();
  check_blur(blocks < int64_t{1} << 31, "the map has too many values for one launch");
  blur_pool_kernel<Scalar, Compute, kChannelsLast, kTranspose, kTaps>
      <<<static_cast<unsigned>(blocks), kBlurThreads, blur.tiles.shared_values() * sizeof(Compute), stream>>>(blur);
  check_cuda(cudaGetLastError());
}

// The kernels of 2, 3 and 4 taps, the usual ones, are unrolled.
template <class Scalar, class Compute, bool kChannelsLast>
void launch_for_taps(const Blur<Compute>& blur, bool transpose, cudaStream_t stream) {
  const int taps = blur.rows.taps == blur.columns.taps ? blur.rows.taps : 0;
  if (transpose) return launch<Scalar, Compute, kChannelsLast, true, 0>(blur, stream);
  if (taps == 2) return launch<Scalar, Compute, kChannelsLast, false, 2>(blur, stream);
  if (taps == 3) return launch<Scalar, Compute, kChannelsLast, false, 3>(blur, stream);
  if (taps == 4) return launch<Scalar, Compute, kChannelsLast, false, 4>(blur, stream);
  launch<Scalar, Compute, kChannelsLast, false, 0>(blur, stream);
}

// On the device and stream of `like`.
template <class Scalar, class Compute>
void run_as(const Call& call, const Tensor& like) {
  const Blur<double>& given = call.blur;
  Blur<Compute> blur{};
  blur.batch = given.batch;
  blur.channels = given.channels;
  blur.rows = given.rows;
  blur.columns = given.columns;
  blur.padding = given.padding;
  blur.activation = given.activation;
  blur.temperature = static_cast<Compute>(given.temperature);
  blur.weights = given.weights;
  blur.weights_are_double = given.weights_are_double;
  blur.in = given.in;
  blur.primal = given.primal;
  blur.out = given.out;
  blur.scale = static_cast<const Compute*>(call.scale);
  blur.shift = static_cast<const Compute*>(call.shift);
  constexpr int kVector = 16 / sizeof(Scalar);
  const int64_t width = call.transpose ? blur.columns.outputs : blur.columns.size;
  const int64_t contiguous = call.channels_last ? blur.channels : width;
  blur.vectors = contiguous % kVector == 0 && reinterpret_cast<uintptr_t>(blur.in) % 16 == 0;
  blur.tiles = cuda::cut_into_tiles(blur, call.channels_last, call.transpose, kVector);
  const cudaStream_t stream = current_stream(like);
  const bool sums = call.grad_scale != nullptr;
  const int64_t parts = sums ? int64_t{blur.batch} * blur.tiles.along_rows * blur.tiles.along_columns : 0;
  const Tensor partial = torch::stable::new_empty(like, {parts, int64_t{blur.channels}, 2}, ScalarType::Double);
  if (sums) blur.partial = static_cast<double*>(partial.data_ptr());
  if (call.channels_last) {
    launch_for_taps<Scalar, Compute, true>(blur, call.transpose, stream);
  } else {
    launch_for_taps<Scalar, Compute, false>(blur, call.transpose, stream);
  }
  if (!sums) return;
  const int64_t blocks = (blur.channels + kSumChannels - 1) / kSumChannels;
  add_up_parts<<<static_cast<unsigned>(blocks), kSumChannels * kSumLanes, 0, stream>>>(
      blur.partial, parts, blur.channels, call.grad_scale, call.grad_shift);
  check_cuda(cudaGetLastError());
}

void run(const Call& call, const Tensor& like) {
  switch (call.dtype) {
    case ScalarType::Float:
      return run_as<float, float>(call, like);
    case ScalarType::Double:
      return run_as<double, double>(call, like);
    case ScalarType::Half:
      return run_as<__half, float>(call, like);
    case ScalarType::BFloat16:
      return run_as<__nv_bfloat16, float>(call, like);
    default:
      check_blur(false, "maps must be float32, float64, float16 or bfloat16");
  }
}

// ---- calls ---------------------------------------------------------------------------------------------------------

// The blur of a (batch, channels, height, width) map; without its tensors.
Call call_of(const Tensor& like, int64_t height, int64_t width, const Tensor& kernel,
             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, int64_t padding_mode,
             const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t activation,
             double temperature, bool channels_last, bool transpose) {
  check_blur_kernel(kernel);
  check_blur(kernel.get_device_index() == like.get_device_index() && !kernel.is_cpu(), "kernel must be beside the map");
  check_blur(stride.size() == 2 && padding.size() == 4, "stride takes 2 numbers, padding 4");
  check_blur(0 <= activation && activation <= 3, "activation is unknown");
  const auto axis = [&](int64_t places, int dim, int64_t before, int64_t after) {
    const int64_t taps = kernel.size(dim),
                  outputs = blur_outputs(places, taps, stride[dim], before, after, padding_mode);
    check_blur(places + before + after < cuda::kMostPlaces, "the map with its margins is too large");
    const auto small = [](int64_t value) { return static_cast<int>(std::min(value, cuda::kMostPlaces)); };
    return BlurAxis{small(places), small(outputs), small(stride[dim]), small(before), small(after), small(taps)};
  };
  check_blur(like.size(0) * like.size(1) < int64_t{1} << 31, "the map has too many planes");
  Call call{};
  call.dtype = like.scalar_type();
  call.channels_last = channels_last;
  call.transpose = transpose;
  call.blur.batch = static_cast<int>(like.size(0));
  call.blur.channels = static_cast<int>(like.size(1));
  call.blur.rows = axis(height, 0, padding[2], padding[3]);
  call.blur.columns = axis(width, 1, padding[0], padding[1]);
  call.blur.padding = static_cast<BlurPadding>(padding_mode);
  call.blur.activation = static_cast<BlurActivation>(activation);
  call.blur.temperature = temperature;
  call.blur.weights = kernel.data_ptr();
  call.blur.weights_are_double = kernel.scalar_type() == ScalarType::Double;
  const ScalarType compute = call.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  call.scale = per_channel(scale, like.size(1), compute);
  call.shift = per_channel(shift, like.size(1), compute);
  return call;
}

Tensor blur_pool2d_cuda(Tensor x, Tensor kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
                        int64_t padding_mode, std::optional<Tensor> scale, std::optional<Tensor> shift,
                        int64_t activation, double temperature) {
  const bool channels_last = is_channels_last(x);
  check_map(x, channels_last);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call call = call_of(x, x.size(2), x.size(3), kernel, stride, padding, padding_mode, scale, shift, activation,
                      temperature, channels_last, false);
  const Tensor out = new_map(x, call.blur.rows.outputs, call.blur.columns.outputs, channels_last);
  call.blur.in = x.data_ptr();
  call.blur.out = out.data_ptr();
  if (out.numel() > 0) run(call, x);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> blur_pool2d_backward_cuda(Tensor grad, std::optional<Tensor> x, Tensor kernel,
                                                             std::vector<int64_t> size, std::vector<int64_t> stride,
                                                             std::vector<int64_t> padding, int64_t padding_mode,
                                                             std::optional<Tensor> scale, std::optional<Tensor> shift,
                                                             int64_t activation, double temperature) {
  const bool channels_last = is_channels_last(x.has_value() ? *x : grad);
  check_map(grad, channels_last);
  check_blur(size.size() == 2, "size must be the height and width of x");
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  Call call = call_of(grad, size[0], size[1], kernel, stride, padding, padding_mode, scale, shift, activation,
                      temperature, channels_last, true);
  check_blur(grad.size(2) == call.blur.rows.outputs && grad.size(3) == call.blur.columns.outputs,
             "grad must have the size of the output");
  const bool prologue = call.blur.activation != BlurActivation::kNone || scale.has_value() || shift.has_value();
  check_blur(x.has_value() == prologue, "x is needed with a prologue, and only then");
  const Tensor grad_x = new_map(grad, size[0], size[1], channels_last);
  const int64_t channels = grad.size(1);
  Tensor sums = torch::stable::new_empty(grad, {2, prologue ? channels : 0}, ScalarType::Double);
  Tensor grad_scale = torch::stable::select(sums, 0, 0), grad_shift = torch::stable::select(sums, 0, 1);
  call.blur.in = grad.data_ptr();
  call.blur.out = grad_x.data_ptr();
  if (x.has_value()) {
    check_map(*x, channels_last);
    check_blur(x->scalar_type() == grad.scalar_type() && x->size(0) == grad.size(0) && x->size(1) == channels &&
                   x->size(2) == size[0] && x->size(3) == size[1],
               "x must have the dtype of grad, and its own size");
    call.blur.primal = x->data_ptr();
  }
  if (scale.has_value() || shift.has_value()) {  // else nobody asks for the sums
    call.grad_scale = static_cast<double*>(grad_scale.data_ptr());
    call.grad_shift = static_cast<double*>(grad_shift.data_ptr());
  }
  if (grad_x.numel() > 0) {
    run(call, grad);
  } else {
    torch::stable::zero_(sums);
  }
  return {grad_x, grad_scale, grad_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitfast, CUDA, m) {
  m.impl("blur_pool2d", TORCH_BOX(&blur_pool2d_cuda));
  m.impl("blur_pool2d_backward", TORCH_BOX(&blur_pool2d_backward_cuda));
}

}  // namespace vitfast
