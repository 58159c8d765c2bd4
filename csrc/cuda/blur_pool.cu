// The blur pooling operators on NVIDIA GPUs: arguments, launches, and the sums over blocks.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "blur_pool_maps.h"
#include "cuda/blur_pool_kernel.h"

namespace vitfast {
namespace {

using cuda::Blur;
using cuda::BlurAxis;
using cuda::BlurPass;
using cuda::BlurThread;
using cuda::kBlurThreads;
using torch::headeronly::ScalarType;

// ---- kernels -------------------------------------------------------------------------------------------------------

// Body: see cuda::with_body.
template <class Body>
__global__ void __launch_bounds__(kBlurThreads, Body::kBlocks)
    blur_pool_kernel(const __grid_constant__ Blur<typename Body::Compute> blur) {
  using Thread = BlurThread<Body>;
  extern __shared__ double shares[];  // and after them the terms, where sums are wanted
  auto* terms = reinterpret_cast<typename Body::Compute*>(shares + Thread::kShares);
  const Thread thread(blur, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(threadIdx.x));
  thread.compute(terms);
  if (Body::kPass != BlurPass::kTranspose || blur.partial == nullptr) return;
  __syncthreads();
  thread.add_terms(terms, shares);
  __syncthreads();
  thread.add_shares(shares);
}

constexpr int kSumChannels = 8, kSumLanes = 32;  // of a block: a line of the cache, by many that read at once

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
  // the headers name their own check of such codes anew in every version
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "vitfast::blur_pool2d: PyTorch has no current CUDA stream");
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

template <class Body>
void launch(const Blur<typename Body::Compute>& blur, cudaStream_t stream) {
  using Thread = BlurThread<Body>;
  check_blur(blur.layout.groups < int64_t{1} << 31, "the map has too many values for one launch");
  const size_t shared =
      blur.partial == nullptr ? 0 : Thread::kShares * sizeof(double) + Thread::kTerms * sizeof(typename Body::Compute);
  const dim3 grid(static_cast<unsigned>(blur.layout.groups), static_cast<unsigned>(blur.layout.parts));
  blur_pool_kernel<Body><<<grid, kBlurThreads, shared, stream>>>(blur);
  check_cuda(cudaGetLastError());
}

// What is counted in 32 bits: the pixels of a plane or image, and the values of a row.
template <class Compute>
void check_size(const Blur<Compute>& blur) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const int64_t height = std::max(blur.rows.size, blur.rows.outputs);
  const int64_t width = std::max(blur.columns.size, blur.columns.outputs);
  check_blur(height * width < kLimit && width * (blur.channels_last ? blur.channels : 1) < kLimit,
             "the map has too many values for one launch");
}

bool is_aligned(const void* map) { return reinterpret_cast<uintptr_t>(map) % 16 == 0; }

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
  blur.channels_last = call.channels_last;
  blur.aligned = is_aligned(blur.in) && is_aligned(blur.primal) && is_aligned(blur.out);
  check_size(blur);
  const cudaStream_t stream = current_stream(like);
  const bool sums = call.grad_scale != nullptr;
  int64_t parts = 0;
  std::optional<Tensor> partial;
  cuda::with_body<Scalar>(blur, call.transpose, [&](auto body) {
    using Body = decltype(body);
    blur.layout = cuda::layout_of<Body>(blur, sums);
    if (sums) {
      parts = int64_t{blur.batch} * blur.layout.parts;
      partial = torch::stable::new_empty(like, {parts, int64_t{blur.channels}, 2}, ScalarType::Double);
      blur.partial = static_cast<double*>(partial->data_ptr());
    }
    launch<Body>(blur, stream);
  });
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
    return cuda::axis_of(small(places), small(outputs), small(stride[dim]), small(before), small(after), small(taps),
                         static_cast<BlurPadding>(padding_mode));
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

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes);
}

void check_folded(const std::optional<Tensor>& mean, const std::optional<Tensor>& variance) {
  check_blur(!mean.has_value() && !variance.has_value(), "a normalisation comes as scale and shift on a GPU");
}

Tensor blur_pool2d_cuda(Tensor x, Tensor kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
                        int64_t padding_mode, std::optional<Tensor> scale, std::optional<Tensor> shift,
                        std::optional<Tensor> mean, std::optional<Tensor> variance, double eps, int64_t activation,
                        double temperature) {
  const bool channels_last = is_channels_last(x);
  check_map(x, channels_last);
  check_folded(mean, variance);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call call = call_of(x, x.size(2), x.size(3), kernel, stride, padding, padding_mode, scale, shift, activation,
                      temperature, channels_last, false);
  const Tensor out = new_map(x, call.blur.rows.outputs, call.blur.columns.outputs, channels_last, new_tensor);
  call.blur.in = x.data_ptr();
  call.blur.out = out.data_ptr();
  if (out.numel() > 0) run(call, x);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> blur_pool2d_backward_cuda(Tensor grad, std::optional<Tensor> x, Tensor kernel,
                                                             std::vector<int64_t> size, std::vector<int64_t> stride,
                                                             std::vector<int64_t> padding, int64_t padding_mode,
                                                             std::optional<Tensor> scale, std::optional<Tensor> shift,
                                                             std::optional<Tensor> mean, std::optional<Tensor> variance,
                                                             double eps, int64_t activation, double temperature,
                                                             bool sums) {
  const bool channels_last = is_channels_last(x.has_value() ? *x : grad);
  check_map(grad, channels_last);
  check_folded(mean, variance);
  check_blur(size.size() == 2, "size must be the height and width of x");
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  Call call = call_of(grad, size[0], size[1], kernel, stride, padding, padding_mode, scale, shift, activation,
                      temperature, channels_last, true);
  check_blur(grad.size(2) == call.blur.rows.outputs && grad.size(3) == call.blur.columns.outputs,
             "grad must have the size of the output");
  const bool prologue = call.blur.activation != BlurActivation::kNone || scale.has_value() || shift.has_value();
  check_blur(x.has_value() == prologue, "x is needed with a prologue, and only then");
  const Tensor grad_x = new_map(grad, size[0], size[1], channels_last, new_tensor);
  const int64_t channels = grad.size(1);
  check_blur(!sums || prologue, "there are sums with a prologue only");
  Tensor totals = torch::stable::new_empty(grad, {2, sums ? channels : 0}, ScalarType::Double);
  Tensor grad_scale = torch::stable::select(totals, 0, 0), grad_shift = torch::stable::select(totals, 0, 1);
  call.blur.in = grad.data_ptr();
  call.blur.out = grad_x.data_ptr();
  if (x.has_value()) {
    check_map(*x, channels_last);
    check_blur(x->scalar_type() == grad.scalar_type() && x->size(0) == grad.size(0) && x->size(1) == channels &&
                   x->size(2) == size[0] && x->size(3) == size[1],
               "x must have the dtype of grad, and its own size");
    call.blur.primal = x->data_ptr();
  }
  if (sums) {
    call.grad_scale = static_cast<double*>(grad_scale.data_ptr());
    call.grad_shift = static_cast<double*>(grad_shift.data_ptr());
  }
  if (grad_x.numel() > 0) {
    run(call, grad);
  } else {
    torch::stable::zero_(totals);
  }
  return {grad_x, grad_scale, grad_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitfast, CUDA, m) {
  m.impl("blur_pool2d", TORCH_BOX(&blur_pool2d_cuda));
  m.impl("blur_pool2d_backward", TORCH_BOX(&blur_pool2d_backward_cuda));
}

}  // namespace vitfast
