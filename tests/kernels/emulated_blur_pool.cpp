// The kernels of csrc/cuda/blur_pool_kernel.h on the host: every block, step by step, one thread after the other.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cuda/blur_pool_kernel.h"

namespace {

using namespace vitfast;
using namespace vitfast::cuda;

// What a test passes, as it is laid out by ctypes.
struct Arguments {
  int32_t batch, channels, channels_last, transpose, padding, activation, vectors;
  int32_t rows[6], columns[6];  // of BlurAxis
  double temperature, weights[kMostTaps * kMostTaps];
  const void *in, *primal, *scale, *shift;
  void* out;
  double* sums;  // (2, channels), or null
};

BlurAxis axis_of(const int32_t (&numbers)[6]) {
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
}

template <class Scalar, bool kChannelsLast, bool kTranspose, int kTaps>
void run(const Arguments& given) {
  Blur<Scalar> blur{};
  blur.batch = given.batch;
  blur.channels = given.channels;
  blur.rows = axis_of(given.rows);
  blur.columns = axis_of(given.columns);
  blur.padding = static_cast<BlurPadding>(given.padding);
  blur.activation = static_cast<BlurActivation>(given.activation);
  blur.temperature = static_cast<Scalar>(given.temperature);
  const std::vector<float> narrow(std::begin(given.weights), std::end(given.weights));
  blur.weights_are_double = sizeof(Scalar) == sizeof(double);
  blur.weights = blur.weights_are_double ? static_cast<const void*>(given.weights) : narrow.data();
  blur.vectors = given.vectors;
  blur.in = given.in;
  blur.primal = given.primal;
  blur.out = given.out;
  blur.scale = static_cast<const Scalar*>(given.scale);
  blur.shift = static_cast<const Scalar*>(given.shift);
  using Block = BlurBlock<Scalar, Scalar, kChannelsLast, kTranspose, kTaps>;
  blur.tiles = cut_into_tiles(blur, kChannelsLast, kTranspose, Block::kVector);
  const int64_t parts = int64_t{blur.batch} * blur.tiles.along_rows * blur.tiles.along_columns;
  std::vector<double> partial(given.sums ? 2 * parts * blur.channels : 0, std::numeric_limits<double>::quiet_NaN());
  if (given.sums) blur.partial = partial.data();
  for (int64_t number = 0; number < blur.tiles.blocks(); ++number) {
    // Of the size that is asked for, so that a sanitizer sees what lies beyond, and with nothing in it.
    std::vector<Scalar> tile(blur.tiles.shared_values(), std::numeric_limits<Scalar>::quiet_NaN());
    std::vector<double> sums(2 * kBlurThreads, std::numeric_limits<double>::quiet_NaN());
    const Block block(blur, static_cast<int>(number), tile.data(), sums.data());
    const auto threads = [](auto step) {
      for (int thread = 0; thread < kBlurThreads; ++thread) step(thread);
    };
    threads([&](int thread) { block.load(thread); });
    threads([&](int thread) { block.compute(thread); });
    if (!kTranspose || !given.sums) continue;
    for (int width = (kBlurThreads >> blur.tiles.log_depth) / 2; width > 0; width /= 2) {
      threads([&](int thread) { block.add_sums(thread, width); });
    }
    threads([&](int thread) { block.write_sums(thread); });
  }
  for (int64_t i = 0; given.sums && i < 2 * blur.channels; ++i) {
    given.sums[i] = 0;
    const int64_t channel = i % blur.channels, which = i / blur.channels;
    for (int64_t part = 0; part < parts; ++part) given.sums[i] += partial[2 * (part * blur.channels + channel) + which];
  }
}

template <class Scalar, bool kChannelsLast>
void run_in_format(const Arguments& given, int taps) {
  if (given.transpose) return run<Scalar, kChannelsLast, true, 0>(given);
  if (taps == 2) return run<Scalar, kChannelsLast, false, 2>(given);
  if (taps == 3) return run<Scalar, kChannelsLast, false, 3>(given);
  if (taps == 4) return run<Scalar, kChannelsLast, false, 4>(given);
  run<Scalar, kChannelsLast, false, 0>(given);
}

template <class Scalar>
void run_for(const Arguments& given) {
  const int taps = given.rows[5] == given.columns[5] ? given.rows[5] : 0;
  if (given.channels_last) {
    run_in_format<Scalar, true>(given, taps);
  } else {
    run_in_format<Scalar, false>(given, taps);
  }
}

}  // namespace

extern "C" void blur_pool_float(const Arguments* given) { run_for<float>(*given); }
extern "C" void blur_pool_double(const Arguments* given) { run_for<double>(*given); }
