// The kernels of csrc/cuda/blur_pool_kernel.h on the host: every block, step by step, one thread after the other.
#include <algorithm>
#include <iterator>
#include <limits>
#include <vector>

#include "cuda/blur_pool_kernel.h"

namespace {

using namespace vitfast;
using namespace vitfast::cuda;

// What a test passes, as it is laid out by ctypes.
struct Arguments {
  int32_t batch, channels, channels_last, transpose, padding, activation, aligned;
  int32_t rows[6], columns[6];  // for axis_of
  double temperature, weights[kMostTaps * kMostTaps];
  const void *in, *primal, *scale, *shift;
  void* out;
  double* sums;  // (2, channels), or null
};

BlurAxis axis_from(const int32_t (&numbers)[6], BlurPadding padding) {
  return axis_of(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], padding);
}

template <class Body>
void run_block(const Blur<typename Body::Compute>& blur, int group, int part) {
  using Compute = typename Body::Compute;
  using Thread = BlurThread<Body>;
  // With nothing in them, and none where no sums are wanted: the checks see what lies beyond.
  const bool sums = blur.partial != nullptr;
  std::vector<Compute> terms(sums ? Thread::kTerms : 0, std::numeric_limits<Compute>::quiet_NaN());
  std::vector<double> shares(sums ? Thread::kShares : 0, std::numeric_limits<double>::quiet_NaN());
  const auto threads = [&](auto step) {
    for (int thread = 0; thread < kBlurThreads; ++thread) step(Thread(blur, group, part, thread));
  };
  threads([&](const Thread& thread) { thread.compute(terms.data()); });
  if (!sums) return;
  threads([&](const Thread& thread) { thread.add_terms(terms.data(), shares.data()); });
  threads([&](const Thread& thread) { thread.add_shares(shares.data()); });
}

// The sums over all parts, as add_up_parts in blur_pool.cu.
void add_up(const std::vector<double>& partial, int64_t channels, double* sums) {
  std::fill(sums, sums + 2 * channels, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) {
    const int64_t channel = static_cast<int64_t>(i) / 2 % channels, which = i % 2;
    sums[which * channels + channel] += partial[i];
  }
}

template <class Scalar>
void run(const Arguments& given) {
  Blur<Scalar> blur{};
  blur.batch = given.batch;
  blur.channels = given.channels;
  blur.padding = static_cast<BlurPadding>(given.padding);
  blur.rows = axis_from(given.rows, blur.padding);
  blur.columns = axis_from(given.columns, blur.padding);
  blur.activation = static_cast<BlurActivation>(given.activation);
  blur.temperature = static_cast<Scalar>(given.temperature);
  const std::vector<float> narrow(std::begin(given.weights), std::end(given.weights));
  blur.weights_are_double = sizeof(Scalar) == sizeof(double);
  blur.weights = blur.weights_are_double ? static_cast<const void*>(given.weights) : narrow.data();
  blur.channels_last = given.channels_last;
  blur.aligned = given.aligned;
  blur.in = given.in;
  blur.primal = given.primal;
  blur.out = given.out;
  blur.scale = static_cast<const Scalar*>(given.scale);
  blur.shift = static_cast<const Scalar*>(given.shift);
  with_body<Scalar>(blur, given.transpose, [&](auto body) {
    using Body = decltype(body);
    const bool sums = given.sums != nullptr;
    blur.layout = layout_of<Body>(blur, sums);
    const int64_t parts = int64_t{blur.batch} * blur.layout.parts;
    std::vector<double> partial(sums ? 2 * parts * blur.channels : 0, std::numeric_limits<double>::quiet_NaN());
    if (sums) blur.partial = partial.data();
    for (int group = 0; group < blur.layout.groups; ++group) {
      for (int part = 0; part < blur.layout.parts; ++part) run_block<Body>(blur, group, part);
    }
    if (sums) add_up(partial, blur.channels, given.sums);
  });
}

}  // namespace

extern "C" void blur_pool_float(const Arguments* given) { run<float>(*given); }
extern "C" void blur_pool_double(const Arguments* given) { run<double>(*given); }
