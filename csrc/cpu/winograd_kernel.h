// Convolutions with 3x3 filters and stride 1 by Winograd's algorithm F(2x2, 3x3), and the gradients of their filters.
//
// An output of 2x2 pixels is A^T [(G w G^T) o (B^T d B)] A of a filter w and a patch d of 4x4 pixels: 16
// multiplications where the definition makes 36. Summed over input channels, the 16 elementwise products of all tiles
// are 16 matrix products, (tiles x inputs) (inputs x outputs). The gradient of a filter is G^T [sum of (B^T d B) o (A g
// A^T)] G, whose sums over tiles are 16 matrix products too. All transforms take sums, differences and halves only, so
// that the rounding errors stay those of a convolution.
//
// A task handles some tiles and at most 64 channels on either side at a time: the 16 matrices of patches, of one block
// of filters and of results then lie in the second level, where transforms write them and the products find them.
// Patches are transformed again for every 64 channels of the results, which costs a few percent, and filters once for
// every task, which keeps the blocks of all its inputs: as much memory as the tensors, but for 64 outputs only.
//
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
#pragma once

#include "cpu/matrix.h"
#include "cpu/parallel.h"
#include "cpu/winograd.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {
namespace winograd {

constexpr int64_t kChannels = 64;  // at a time, on either side
constexpr int64_t kTiles = 56;     // at a time: whole tiles of the matrix products
constexpr int kPatch = 4, kFilter = 3, kOut = 2;
constexpr int kPoints = kPatch * kPatch, kTaps = kFilter * kFilter, kPixels = kOut * kOut;

// ---- the transforms, in one dimension
// --------------------------------------------------------------------------------
//
// Each is applied to the columns and then to the rows: `in` and `out` have elements that are `step` apart.

using V = Vec<float>;

struct TransformPatch {  // B^T
  static constexpr int kIn = kPatch, kOutputs = kPatch;
  static void apply(const V* in, int in_step, V* out, int out_step) {
    out[0] = in[0] - in[2 * in_step];
    out[out_step] = in[in_step] + in[2 * in_step];
    out[2 * out_step] = in[2 * in_step] - in[in_step];
    out[3 * out_step] = in[in_step] - in[3 * in_step];
  }
};

struct TransformFilter {  // G
  static constexpr int kIn = kFilter, kOutputs = kPatch;
  static void apply(const V* in, int in_step, V* out, int out_step) {
    const V ends = 0.5f * (in[0] + in[2 * in_step]), middle = 0.5f * in[in_step];
    out[0] = in[0];
    out[out_step] = ends + middle;
    out[2 * out_step] = ends - middle;
    out[3 * out_step] = in[2 * in_step];
  }
};

struct TransformOutput {  // A^T
  static constexpr int kIn = kPatch, kOutputs = kOut;
  static void apply(const V* in, int in_step, V* out, int out_step) {
    out[0] = in[0] + (in[in_step] + in[2 * in_step]);
    out[out_step] = (in[in_step] - in[2 * in_step]) - in[3 * in_step];
  }
};

struct TransformGradient {  // A
  static constexpr int kIn = kOut, kOutputs = kPatch;
  static void apply(const V* in, int in_step, V* out, int out_step) {
    out[0] = in[0];
    out[out_step] = in[0] + in[in_step];
    out[2 * out_step] = in[0] - in[in_step];
    out[3 * out_step] = -in[in_step];
  }
};

struct TransformFilterGradient {  // G^T
  static constexpr int kIn = kPatch, kOutputs = kFilter;
  static void apply(const V* in, int in_step, V* out, int out_step) {
    const V sum = 0.5f * (in[in_step] + in[2 * in_step]);
    out[0] = in[0] + sum;
    out[out_step] = 0.5f * (in[in_step] - in[2 * in_step]);
    out[2 * out_step] = sum + in[3 * in_step];
  }
};

// T x T^T, for x of kIn x kIn vectors.
template <class T>
void transform(const V* x, V* out) {
  V half[T::kOutputs * T::kIn];
#pragma GCC unroll 4
  for (int j = 0; j < T::kIn; ++j) T::apply(x + j, T::kIn, half + j, T::kIn);
#pragma GCC unroll 4
  for (int i = 0; i < T::kOutputs; ++i) T::apply(half + i * T::kIn, 1, out + i * T::kOutputs, 1);
}

// ---- 16 matrices
// -----------------------------------------------------------------------------------------------------

// One for each point of a transformed patch: rows of up to kChannels values.
class Points {
 public:
  Points(int64_t rows, Arena& arena)
      : step_(rows * kChannels + Scratch::kAlignment / sizeof(float)),  // one line more: else all 16 share cache sets
        data_(arena.take<float>(kPoints * step_)) {}

  float* at(int64_t row, int64_t channel) const { return data_ + row * kChannels + channel; }
  float* matrix(int point) const { return data_ + point * step_; }

  void scatter(const V* values, int64_t row, int64_t channel) const {
    float* to = at(row, channel);
#pragma GCC unroll 16
    for (int p = 0; p < kPoints; ++p) store(to + p * step_, values[p]);
  }
  void gather(int64_t row, int64_t channel, V* values) const {
    const float* from = at(row, channel);
#pragma GCC unroll 16
    for (int p = 0; p < kPoints; ++p) values[p] = load(from + p * step_);
  }

 private:
  int64_t step_;
  float* data_;
};

// Channels [first, first + count).
struct Range {
  int64_t first, count;
};

// Part `index` of channels that are cut evenly into `count`, in units of kConvolutionChannels.
inline Range channel_part(int64_t channels, int64_t count, int64_t index) {
  const int64_t units = channels / kConvolutionChannels;
  const int64_t begin = units * index / count, end = units * (index + 1) / count;
  return {begin * kConvolutionChannels, (end - begin) * kConvolutionChannels};
}

// ---- tiles of maps
// ---------------------------------------------------------------------------------------------------

// The tiles of all images, row by row: 2x2 pixels of the result, and the 4x4 pixels that they depend on.
class Tiles {
 public:
  explicit Tiles(const ConvolutionShape& shape)
      : shape_(shape), down_(parts(shape.out_height, kOut)), across_(parts(shape.out_width, kOut)) {}

  int64_t count() const { return shape_.images * down_ * across_; }

  // Calls f(t, pixels) for `count` tiles from `first` on. Pixels are pointers to the first of the channels, of a patch
  // of `map` that is transformed or of a tile of the result; to `outside` where there is none.
  template <class T, class F>
  void for_each_patch(const ChannelsLast& map, int64_t k, int64_t channel, int64_t first, int64_t count, T* outside,
                      F f) const {
    visit<kPatch>(map, shape_.height, shape_.width, shape_.padding, k, channel, first, count, outside, f);
  }
  template <class T, class F>
  void for_each_tile(const ChannelsLast& map, int64_t k, int64_t channel, int64_t first, int64_t count, T* outside,
                     F f) const {
    visit<kOut>(map, shape_.out_height, shape_.out_width, 0, k, channel, first, count, outside, f);
  }

 private:
  template <int kSide, class T, class F>
  void visit(const ChannelsLast& map, int64_t height, int64_t width, int64_t padding, int64_t k, int64_t channel,
             int64_t first, int64_t count, T* outside, F f) const {
    T* data = const_cast<T*>(map.data) + k * map.step + channel;
    int64_t x = first % across_, y = first / across_ % down_, image = first / across_ / down_;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t top = kOut * y - padding, left = kOut * x - padding;
      const int64_t corner = image * map.image + top * map.row + left * map.pixel;
      T* pixels[kSide * kSide];
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kSide; ++j) {
          const bool is_inside = top + i >= 0 && top + i < height && left + j >= 0 && left + j < width;
          pixels[i * kSide + j] = is_inside ? data + corner + i * map.row + j * map.pixel : outside;
        }
      }
      f(t, pixels);
      if (++x == across_) {
        x = 0;
        if (++y == down_) y = 0, ++image;
      }
    }
  }

  const ConvolutionShape& shape_;
  int64_t down_, across_;
};

// Channels of `count` tiles, transformed: the patches that results depend on, or the gradients of results.
template <class Transform, class Visit>
void transform_tiles(Visit visit, int64_t channels, const Points& out) {
  visit([&](int64_t t, const float* const* pixels) {
    for (int64_t c = 0; c < channels; c += kLanes<float>) {
      V values[Transform::kIn * Transform::kIn], points[kPoints];
#pragma GCC unroll 16
      for (int i = 0; i < Transform::kIn * Transform::kIn; ++i) values[i] = load(pixels[i] + c);
      transform<Transform>(values, points);
      out.scatter(points, t, c);
    }
  });
}

// ---- convolutions
// ----------------------------------------------------------------------------------------------------

class ConvolutionTask {
 public:
  ConvolutionTask(const SumOfConvolutions& call, Arena arena)
      : call_(call),
        tiles_(call.shape),
        chunks_(parts(call.shape.inputs, kChannels)),
        patches_(kTiles, arena),
        sums_(kTiles, arena),
        transposed_(arena.take<float>(kLane * kTaps * kChannels)),
        turned_(arena.take<float>(kPoints * kLane * kChannels)),
        offset_(arena.take<int64_t>(std::max(kTiles, kChannels))),
        outside_(arena.take<float>(kChannels)) {
    for (int64_t i = 0; i < call.terms * chunks_; ++i) filters_.emplace_back(kChannels, arena);
    bytes_ = arena.used();
    if (!arena.holds_memory()) return;
    for (int64_t i = 0; i < std::max(kTiles, kChannels); ++i) offset_[i] = i * kChannels;
    std::fill_n(outside_, kChannels, 0.0f);
  }

  int64_t bytes() const { return bytes_; }

  // Results `k` of some output channels, for tiles [begin, end).
  void operator()(int64_t k, Range outputs, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < call_.terms * chunks_; ++i) transform_filter(term(i).filter, k, outputs, i);
    const int64_t blocks = parts(end - begin, kTiles);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = begin + (end - begin) * b / blocks, last = begin + (end - begin) * (b + 1) / blocks;
      convolve(k, outputs, first, last - first);
    }
  }

 private:
  static constexpr int64_t kLane = kLanes<float>;

  const SumOfConvolutions::Pair& term(int64_t i) const { return call_.pairs[i / chunks_]; }
  Range inputs(int64_t i) const { return channel_part(call_.shape.inputs, chunks_, i % chunks_); }

  void convolve(int64_t k, Range outputs, int64_t first, int64_t count) {
    for (int64_t i = 0; i < call_.terms * chunks_; ++i) {
      const Range from = inputs(i);
      transform_tiles<TransformPatch>(
          [&](auto f) { tiles_.for_each_patch(term(i).x, k, from.first, first, count, (const float*)outside_, f); },
          from.count, patches_);
      for (int p = 0; p < kPoints; ++p) {
        const Rows<float> sum{sums_.matrix(p), offset_, 1};
        Product<float> product{
            from.count, {patches_.matrix(p), offset_, 1}, 0, {filters_[i].matrix(p), offset_, 1}, sum, 0, 1.0f};
        if (i > 0) product.plus = sum;
        gemm<float>(count, outputs.count / kLane, product);
      }
    }
    const ConvolutionShape& s = call_.shape;
    const ChannelsLast out{call_.out, s.images * s.out_height * s.out_width * s.outputs,
                           s.out_height * s.out_width * s.outputs, s.out_width * s.outputs, s.outputs};
    // What lies outside of the map is written to scratch that nobody reads any more.
    tiles_.for_each_tile(out, k, outputs.first, first, count, turned_, [&](int64_t t, float* const* pixels) {
      for (int64_t c = 0; c < outputs.count; c += kLane) {
        V points[kPoints], values[kPixels];
        sums_.gather(t, c, points);
        transform<TransformOutput>(points, values);
#pragma GCC unroll 4
        for (int i = 0; i < kPixels; ++i) store(pixels[i] + c, values[i]);
      }
    });
  }

  // Filter k of the term, from some inputs to some outputs, as 16 matrices (inputs, outputs).
  void transform_filter(const Filters& filter, int64_t k, Range outputs, int64_t i) {
    const Range from = inputs(i);
    const Points& to = filters_[i];
    // In memory, the channels of the one side are rows, those of the other are columns, of kTaps numbers each.
    const Range rows = call_.transposed ? from : outputs, columns = call_.transposed ? outputs : from;
    const int64_t row = kTaps * (call_.transposed ? call_.shape.outputs : call_.shape.inputs);
    const float* data = filter.data + k * filter.step + rows.first * row + columns.first * kTaps;
    for (int64_t c = 0; c < columns.count; c += kLane) {
      transpose_rows<float>([&](int64_t r) { return data + r * row + c * kTaps; }, rows.count, kLane * kTaps,
                            transposed_, kChannels);
      for (int64_t j = 0; j < kLane; ++j) {
        for (int64_t r = 0; r < rows.count; r += kLane) {
          V taps[kTaps], points[kPoints];
#pragma GCC unroll 16
          for (int tap = 0; tap < kTaps; ++tap) taps[tap] = load(transposed_ + (j * kTaps + tap) * kChannels + r);
          transform<TransformFilter>(taps, points);
          if (call_.transposed) {
            // A filter that is turned has the same points, the outer ones exchanged.
            constexpr int kTurned[kPatch] = {3, 1, 2, 0};
#pragma GCC unroll 16
            for (int p = 0; p < kPoints; ++p) {
              const int point = kTurned[p / kPatch] * kPatch + kTurned[p % kPatch];
              store(turned_ + (point * kLane + j) * kChannels + r, points[p]);
            }
          } else {
            to.scatter(points, c + j, r);
          }
        }
      }
      if (!call_.transposed) continue;
      for (int p = 0; p < kPoints; ++p) {
        transpose_rows<float>([&](int64_t j) { return turned_ + (p * kLane + j) * kChannels; }, kLane, rows.count,
                              to.matrix(p) + c, kChannels);
      }
    }
  }

  const SumOfConvolutions& call_;
  const Tiles tiles_;
  const int64_t chunks_;
  const Points patches_, sums_;
  float *transposed_, *turned_;
  int64_t* offset_;
  float* outside_;
  std::vector<Points> filters_;
  int64_t bytes_;
};

void convolve(const SumOfConvolutions& call) {
  const int64_t across = parts(call.shape.outputs, kChannels), tiles = Tiles(call.shape).count();
  const int64_t whole = call.shape.count * across;
  // Few tasks are cut further, for all threads to have as many.
  const int64_t cuts = std::min(parts(tiles, kTiles), parts(4 * thread_count(), whole));
  parallel_for(whole * cuts, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(ConvolutionTask(call, Arena()).bytes());
    ConvolutionTask run(call, Arena(scratch.data()));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t cut = task % cuts, channels = task / cuts % across, k = task / cuts / across;
      run(k, channel_part(call.shape.outputs, across, channels), tiles * cut / cuts, tiles * (cut + 1) / cuts);
    }
  });
}

// ---- gradients of filters
// --------------------------------------------------------------------------------------------

class FilterGradientTask {
 public:
  FilterGradientTask(const SumOfFilterGradients& call, Arena arena)
      : call_(call),
        tiles_(call.shape),
        patches_(kTiles, arena),
        grads_(kTiles, arena),
        sums_(kChannels, arena),
        taps_(arena.take<float>(kLane * kTaps * kLane)),
        offset_(arena.take<int64_t>(std::max(kTiles, kChannels))),
        outside_(arena.take<float>(kChannels)),
        bytes_(arena.used()) {
    if (!arena.holds_memory()) return;
    for (int64_t i = 0; i < std::max(kTiles, kChannels); ++i) offset_[i] = i * kChannels;
    std::fill_n(outside_, kChannels, 0.0f);
  }

  int64_t bytes() const { return bytes_; }

  void operator()(int64_t k, Range inputs, Range outputs) {
    const int64_t count = tiles_.count(), blocks = parts(count, kTiles);
    for (int64_t term = 0; term < call_.terms; ++term) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = count * b / blocks, size = count * (b + 1) / blocks - first;
        add(call_.pairs[term], k, inputs, outputs, first, size, term > 0 || b > 0);
      }
    }
    write(k, inputs, outputs);
  }

 private:
  static constexpr int64_t kLane = kLanes<float>;

  void add(const SumOfFilterGradients::Pair& pair, int64_t k, Range inputs, Range outputs, int64_t first, int64_t count,
           bool add) {
    const float* outside = outside_;
    transform_tiles<TransformPatch>(
        [&](auto f) { tiles_.for_each_patch(pair.x, k, inputs.first, first, count, outside, f); }, inputs.count,
        patches_);
    transform_tiles<TransformGradient>(
        [&](auto f) { tiles_.for_each_tile(pair.grad, k, outputs.first, first, count, outside, f); }, outputs.count,
        grads_);
    for (int p = 0; p < kPoints; ++p) {
      const Rows<float> sum{sums_.matrix(p), offset_, 1};
      Product<float> product{count, {patches_.matrix(p), nullptr, kChannels}, 0, {grads_.matrix(p), offset_, 1}, sum, 0,
                             1.0f};
      if (add) product.plus = sum;
      gemm<float>(inputs.count, outputs.count / kLane, product);
    }
  }

  // The sums, (inputs, outputs) of each point, as filters (outputs, inputs, 3, 3).
  void write(int64_t k, Range inputs, Range outputs) {
    const ConvolutionShape& s = call_.shape;
    float* data = call_.out + ((k * s.outputs + outputs.first) * s.inputs + inputs.first) * kTaps;
    for (int64_t o = 0; o < outputs.count; o += kLane) {
      for (int64_t i = 0; i < inputs.count; i += kLane) {
        for (int64_t j = 0; j < kLane; ++j) {
          V points[kPoints], taps[kTaps];
          sums_.gather(i + j, o, points);
          transform<TransformFilterGradient>(points, taps);
#pragma GCC unroll 16
          for (int tap = 0; tap < kTaps; ++tap) store(taps_ + (j * kTaps + tap) * kLane, taps[tap]);
        }
        // (inputs x taps) x outputs
        transpose_rows<float>([&](int64_t row) { return taps_ + row * kLane; }, kLane * kTaps, kLane,
                              data + (o * s.inputs + i) * kTaps, s.inputs * kTaps);
      }
    }
  }

  const SumOfFilterGradients& call_;
  const Tiles tiles_;
  const Points patches_, grads_, sums_;
  float* taps_;
  int64_t* offset_;
  float* outside_;
  int64_t bytes_;
};

void filter_gradient(const SumOfFilterGradients& call) {
  // A task goes over all tiles, so that the order of every sum is the same for any number of threads. Few tasks are cut
  // further, for all threads to have as many.
  const int64_t threads = thread_count();
  int64_t most_inputs = kChannels, most_outputs = kChannels, across, down;
  for (;;) {
    across = parts(call.shape.inputs, most_inputs), down = parts(call.shape.outputs, most_outputs);
    const int64_t tasks = call.shape.count * across * down;
    if (tasks % threads == 0 || tasks >= 4 * threads || most_inputs == kConvolutionChannels) break;
    (most_outputs == most_inputs ? most_outputs : most_inputs) /= 2;
  }
  parallel_for(call.shape.count * across * down, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(FilterGradientTask(call, Arena()).bytes());
    FilterGradientTask run(call, Arena(scratch.data()));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task % across, o = task / across % down, k = task / across / down;
      run(k, channel_part(call.shape.inputs, across, i), channel_part(call.shape.outputs, down, o));
    }
  });
}

}  // namespace winograd
}  // namespace

extern const WinogradKernels winograd_kernels = {winograd::convolve, winograd::filter_gradient};

}  // namespace vitfast::cpu::VITFAST_ISA
