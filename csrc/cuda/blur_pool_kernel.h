// Blur pooling on the GPU: what one thread does.
//
//     blur:            y[o, p] = sum over i, j of k[i, j] * u[o s + i - top, p s + j - left],  u = prologue(x)
//     its transpose:   gu[at] = sum of k[i, j] * g[o, p] over all o s + i - top = at, likewise for columns;
//                      places of the padded map that repeat one of the map add to it
//
// A thread reads what it needs from memory itself, and leaves it to the first cache that its neighbours need most of it
// too. At each of its positions it writes some values that lie side by side, its lanes:
//
//     BlurOfPixel      one pixel, of one channel or, if maps are channels_last, of as many as a vector of 16 bytes
//     BlurOfColumns    some columns of a row, where rows are made of whole vectors
//
// The transpose writes the gradient of x, through the prologue if there is one. The sums for the gradients of scale and
// shift are those of a block, in an order that does not depend on chance; blur_pool.cu adds up those of all blocks.
//
// The steps between two barriers are functions of a thread's number. A compiler for the host takes this file as it is,
// and runs them one thread after the other: that is how it is tested without a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "blur_pool_options.h"

#ifdef __CUDACC__
#define VITFAST_DEVICE __device__ __forceinline__
#define VITFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VITFAST_DEVICE inline
#define VITFAST_HOST_DEVICE inline
#endif

namespace vitfast::cuda {

constexpr int kBlurThreads = 256;  // of a block
constexpr int kMostTaps = 7;

// One axis of the blur, from `size` places of the map to `outputs`. All numbers of places are below kMostPlaces, the
// margins included: coordinates are of 32 bits, for which a division is a few instructions and no call; the start of a
// row in memory is counted in 64.
constexpr int64_t kMostPlaces = int64_t{1} << 30;
struct BlurAxis {
  int size, outputs, stride, before, after, taps;
  int inner_begin, inner_end;  // the places that no margin repeats
};

// How threads share the work. A block is 2^log_across threads wide, and as high as kBlurThreads allow. Planes: threads
// side by side take positions that follow each other, rows of threads take planes. channels_last: threads side by side
// take channels, rows of threads take positions. The grid is (groups, parts): groups of planes, or groups of channels
// of an image, and parts of their positions.
struct BlurLayout {
  int log_across, channel_groups, parts;
  int64_t groups;

  VITFAST_HOST_DEVICE int across() const { return 1 << log_across; }
  VITFAST_HOST_DEVICE int high() const { return kBlurThreads >> log_across; }
};

template <class Compute>
struct Blur {
  int batch, channels;  // whose product is below 2^31
  BlurAxis rows, columns;
  BlurLayout layout;
  BlurPadding padding;
  BlurActivation activation;
  Compute temperature;
  const void* weights;      // of the kernel, row by row, where the maps are: reading them here would wait for the GPU
  bool weights_are_double;  // or float
  bool channels_last;
  bool aligned;             // whether all maps begin at a multiple of 16 bytes
  const void *in, *primal;  // primal: x for the transpose with a prologue, else null
  void* out;
  const Compute *scale, *shift;  // (channels,), or null
  double* partial;               // (batch * parts, channels, 2), the sums for scale and shift, or null

  VITFAST_DEVICE Compute scale_of(int channel) const { return scale == nullptr ? Compute(1) : scale[channel]; }
  VITFAST_DEVICE Compute shift_of(int channel) const { return shift == nullptr ? Compute(0) : shift[channel]; }
};

VITFAST_DEVICE int floor_divide(int value, int divisor) {
  if (divisor == 1) return value;
  if (divisor == 2) return value >> 1;
  const int quotient = value / divisor;
  return quotient * divisor > value ? quotient - 1 : quotient;
}

// The place of the map that is read where a place of the padded one is, or -1 for a zero.
VITFAST_DEVICE int source_of(BlurPadding padding, int at, int size) {
  if (0 <= at && at < size) return at;
  if (padding == BlurPadding::kZeros) return -1;
  if (padding == BlurPadding::kReplicate) return at < 0 ? 0 : size - 1;
  if (size == 1) return 0;
  // Once, unless the margin is larger than the map: quicker than a division, which would take registers, too.
  while (at < 0 || at >= size) {
    if (padding == BlurPadding::kCircular) {
      at += at < 0 ? size : -size;
    } else {
      at = at < 0 ? -at : 2 * (size - 1) - at;
    }
  }
  return at;
}

// Only the first and the last places may be repeated by margins.
inline BlurAxis axis_of(int size, int outputs, int stride, int before, int after, int taps, BlurPadding padding) {
  int first = 0, last = 0;  // how many
  if (padding == BlurPadding::kReplicate) first = last = 1;
  if (padding == BlurPadding::kCircular) first = after, last = before;
  if (padding == BlurPadding::kReflect) first = before + 1, last = after + 1;
  const bool back_and_forth = padding != BlurPadding::kZeros && (before >= size || after >= size);
  if (back_and_forth) first = size;
  if (before + after == 0) first = last = 0;
  return {size, outputs, stride, before, after, taps, first, size - last};
}

// The place of the padded axis that repeats place `at` of the map next, after `place`; from size + after on, none does.
// The first one is `at` itself.
VITFAST_DEVICE int next_repetition(BlurPadding padding, const BlurAxis& axis, int at, int place) {
  const int end = axis.size + axis.after;
  if (axis.inner_begin <= at && at < axis.inner_end) return end;
  if (place == at) place = -axis.before - 1;
  for (;;) {
    if (++place == 0) place = axis.size;
    if (place >= end || source_of(padding, place, axis.size) == at) return place;
  }
}

// activate(scale * x + shift) of some values: what depends on the activation is decided once for all of them.
template <class Compute, int kValues>
VITFAST_DEVICE void activate(Compute (&values)[kValues], BlurActivation activation, Compute temperature) {
  if (activation == BlurActivation::kNone) return;
  if (activation == BlurActivation::kTanhRelu) {
#pragma unroll
    for (Compute& z : values) z = temperature * tanh(z / temperature);
  }
#pragma unroll
  for (Compute& z : values) {
    const bool cut = activation == BlurActivation::kRelu6 && z > Compute(6);
    z = cut ? Compute(6) : z <= Compute(0) ? Compute(0) : z;  // NaN stays
  }
}

// The gradient of z for that of activate(z).
template <class Compute>
VITFAST_DEVICE Compute activate_backward(Compute grad, Compute z, BlurActivation activation, Compute temperature) {
  if (activation == BlurActivation::kNone) return grad;
  if (z <= Compute(0) || (activation == BlurActivation::kRelu6 && z >= Compute(6))) return Compute(0);
  if (activation != BlurActivation::kTanhRelu) return grad;
  const Compute t = tanh(z / temperature);
  return grad * (Compute(1) - t * t);
}

// ---- memory --------------------------------------------------------------------------------------------------------

// What no thread writes, so that a compiler may load it early and once.
template <class T>
VITFAST_DEVICE T load_constant(const T* from) {
#ifdef __CUDA_ARCH__
  return __ldg(from);
#else
  return *from;
#endif
}

// Whose copy is one instruction.
template <class Scalar, int kValues>
struct alignas(kValues * sizeof(Scalar)) Vector {
  Scalar values[kValues];
};

// As many of some values as are loaded and stored at once.
template <class Scalar, int kValues>
constexpr int kAtOnce = kValues * sizeof(Scalar) <= 16 ? kValues : 16 / sizeof(Scalar);

template <int kValues, class Scalar, class Compute>
VITFAST_DEVICE void load(const Scalar* from, Compute* values) {
  using Piece = Vector<Scalar, kAtOnce<Scalar, kValues>>;
#pragma unroll
  for (int i = 0; i < kValues; i += kAtOnce<Scalar, kValues>) {
    const Piece piece = *reinterpret_cast<const Piece*>(from + i);
#pragma unroll
    for (int v = 0; v < kAtOnce<Scalar, kValues>; ++v) values[i + v] = static_cast<Compute>(piece.values[v]);
  }
}

template <int kValues, class Scalar, class Compute>
VITFAST_DEVICE void store(const Compute* values, Scalar* to) {
  using Piece = Vector<Scalar, kAtOnce<Scalar, kValues>>;
#pragma unroll
  for (int i = 0; i < kValues; i += kAtOnce<Scalar, kValues>) {
    Piece piece;
#pragma unroll
    for (int v = 0; v < kAtOnce<Scalar, kValues>; ++v) piece.values[v] = static_cast<Scalar>(values[i + v]);
    *reinterpret_cast<Piece*>(to + i) = piece;
  }
}

// ---- what the sums run over ----------------------------------------------------------------------------------------

enum class BlurPass { kBlur, kBlurOfPrologue, kTranspose };

// The steps of a sum along one axis: taps of the kernel, and the places of the input that they are multiplied by. They
// are those for the output `at`; or, for the transpose, for place `at` of the padded map.
template <BlurPass kPass>
class StepsFrom {
 public:
  VITFAST_DEVICE StepsFrom(const BlurAxis& axis, BlurPadding padding, int at) : axis_(axis), padding_(padding) {
    if constexpr (kTranspose) {
      const int from = at + axis.before;
      first_place_ = floor_divide(from, axis.stride);
      first_tap_ = from - first_place_ * axis.stride;
    } else {
      first_place_ = at * axis.stride - axis.before;
      first_tap_ = 0;
    }
  }

  VITFAST_DEVICE int count() const { return kTranspose ? (axis_.taps - 1) / axis_.stride + 1 : axis_.taps; }
  VITFAST_DEVICE int tap(int i) const {
    const int tap = tap_of(i);
    return tap < axis_.taps ? tap : 0;
  }
  // Or -1 for a zero, by which any tap may be multiplied.
  VITFAST_DEVICE int place(int i) const {
    if constexpr (!kTranspose) return source_of(padding_, first_place_ + i, axis_.size);
    const int output = first_place_ - i;
    return tap_of(i) < axis_.taps && 0 <= output && output < axis_.outputs ? output : -1;
  }

 private:
  static constexpr bool kTranspose = kPass == BlurPass::kTranspose;

  VITFAST_DEVICE int tap_of(int i) const { return kTranspose ? first_tap_ + i * axis_.stride : i; }

  const BlurAxis& axis_;
  BlurPadding padding_;
  int first_place_, first_tap_;
};

// kSteps of them with their places in registers; or, for 0, as many as there are, each when it is asked for.
template <BlurPass kPass, int kSteps>
class Steps : public StepsFrom<kPass> {
 public:
  VITFAST_DEVICE Steps(const BlurAxis& axis, BlurPadding padding, int at) : StepsFrom<kPass>(axis, padding, at) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) places_[i] = StepsFrom<kPass>::place(i);
  }
  VITFAST_DEVICE int count() const { return kSteps; }
  VITFAST_DEVICE int place(int i) const { return places_[i]; }

 private:
  int places_[kSteps];
};

template <BlurPass kPass>
class Steps<kPass, 0> : public StepsFrom<kPass> {
 public:
  using StepsFrom<kPass>::StepsFrom;
};

// How many of kSteps steps down the kernel are unrolled, so that the loads of all its rows are on their way at once:
// all of them or none. Of more, registers run out, of which the transpose needs some for its sums; and the code of a
// prologue is long, and hides the loads of a row.
template <BlurPass kPass, int kSteps>
constexpr int kUnrolled =
    kPass == BlurPass::kBlurOfPrologue || kSteps > (kPass == BlurPass::kTranspose ? 2 : 3) ? 0 : kSteps;

// A plane, or one channel or kChannels neighbouring ones of an image, as the sums read it.
template <class Scalar, class Compute, BlurPass kPass, int kChannels>
class BlurInput {
 public:
  VITFAST_DEVICE BlurInput(const Blur<Compute>& blur, const Scalar* in, int channel) : blur_(blur), in_(in) {
    pixel_stride_ = blur.channels_last ? blur.channels : 1;
    if constexpr (kPass == BlurPass::kBlurOfPrologue) {
#pragma unroll
      for (int v = 0; v < kChannels; ++v) {
        scale_[v] = blur.scale_of(channel + v);
        shift_[v] = blur.shift_of(channel + v);
      }
    }
  }

  VITFAST_DEVICE const Blur<Compute>& blur() const { return blur_; }
  VITFAST_DEVICE int width() const {
    return kPass == BlurPass::kTranspose ? blur_.columns.outputs : blur_.columns.size;
  }

  // Where a row, and a pixel of it, begin. For a place of -1 that is another one: its value is loaded without a branch,
  // and dropped.
  VITFAST_DEVICE const Scalar* row(int place) const {
    return in_ + int64_t{place < 0 ? 0 : place} * (width() * pixel_stride_);
  }
  VITFAST_DEVICE const Scalar* pixel(const Scalar* row, int place) const {
    return row + (place < 0 ? 0 : place) * pixel_stride_;
  }

  VITFAST_DEVICE Compute weight(int row, int column) const {
    const int at = row * blur_.columns.taps + column;
    if (blur_.weights_are_double) {
      return static_cast<Compute>(load_constant(static_cast<const double*>(blur_.weights) + at));
    }
    return static_cast<Compute>(load_constant(static_cast<const float*>(blur_.weights) + at));
  }

  // From values as they were loaded to those that the blur is applied to.
  template <int kValues>
  VITFAST_DEVICE void apply_prologue(Compute (&values)[kValues]) const {
    if constexpr (kPass == BlurPass::kBlurOfPrologue) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        const int channel = kChannels == 1 ? 0 : v;
        values[v] = scale_[channel] * values[v] + shift_[channel];
      }
      activate(values, blur_.activation, blur_.temperature);
    }
  }

 private:
  const Blur<Compute>& blur_;
  const Scalar* in_;
  int pixel_stride_;
  Compute scale_[kChannels], shift_[kChannels];  // with a prologue
};

// ---- sums ----------------------------------------------------------------------------------------------------------

// Without a branch, over which loads that come later could not be moved. What is dropped may be NaN: a weight of zero
// would not do.
template <class Compute, int kValues>
VITFAST_DEVICE void zero_unless(bool there, Compute (&values)[kValues]) {
#pragma unroll
  for (Compute& value : values) value = there ? value : Compute(0);
}

// kChannels neighbouring channels of one pixel. kSteps: of the sum along both axes, or 0 for any number.
template <class Scalar_, class Compute_, BlurPass kPass_, int kChannels_, int kSteps>
struct BlurOfPixel {
  using Scalar = Scalar_;
  using Compute = Compute_;
  static constexpr BlurPass kPass = kPass_;
  static constexpr bool kTranspose = kPass == BlurPass::kTranspose;
  static constexpr int kChannels = kChannels_, kColumns = 1;
  static constexpr int kLanes = kChannels;
  // Of threads, at once on a multiprocessor: as many as leave enough registers to each other.
  static constexpr int kBlocks = kPass == BlurPass::kBlur ? 4 : kTranspose && kChannels * sizeof(Compute) > 4 ? 2 : 3;
  using Input = BlurInput<Scalar, Compute, kPass, kChannels>;

  // Adds the sum for an output; or, for the transpose, for a place of the map.
  static VITFAST_DEVICE void add(const Input& input, int row, int column, Compute (&sums)[kLanes]) {
    if constexpr (kTranspose) {
      const Blur<Compute>& blur = input.blur();
      const BlurAxis &rows = blur.rows, &columns = blur.columns;
      for (int r = row; r < rows.size + rows.after; r = next_repetition(blur.padding, rows, row, r)) {
        for (int c = column; c < columns.size + columns.after; c = next_repetition(blur.padding, columns, column, c)) {
          add_unpadded(input, r, c, sums);
        }
      }
    } else {
      add_unpadded(input, row, column, sums);
    }
  }

  // Likewise, but for a place of the padded map.
  static VITFAST_DEVICE void add_unpadded(const Input& input, int row, int column, Compute (&sums)[kLanes]) {
    const Blur<Compute>& blur = input.blur();
    constexpr int kRowSteps = kUnrolled<kPass, kSteps>;
    const Steps<kPass, kRowSteps> rows(blur.rows, blur.padding, row);
    const Steps<kPass, kSteps> columns(blur.columns, blur.padding, column);
#pragma unroll(kRowSteps > 0 ? kRowSteps : 1)
    for (int i = 0; i < rows.count(); ++i) {
      const int down = rows.place(i);
      const Scalar* line = input.row(down);
#pragma unroll(kSteps > 0 ? kSteps : 1)
      for (int j = 0; j < columns.count(); ++j) {
        const int right = columns.place(j);
        Compute values[kLanes];
        load<kLanes>(input.pixel(line, right), values);
        input.apply_prologue(values);
        zero_unless(down >= 0 && right >= 0, values);
        const Compute weight = input.weight(rows.tap(i), columns.tap(j));
#pragma unroll
        for (int v = 0; v < kLanes; ++v) sums[v] += weight * values[v];
      }
    }
  }
};

// Outputs of the blur that BlurOfColumns covers, along with kStride as many places each.
template <class Scalar>
constexpr int kOutputsAtOnce = sizeof(Scalar) == sizeof(double) ? 2 : 4;

// Neighbouring columns of a row. The kernel is square, its margin `before` is (taps - 1) / 2, and every place but those
// of the margins belongs to one of the outputs: the window that some outputs need begins where whole vectors do, but
// for a few places on both sides.
template <class Scalar_, class Compute_, BlurPass kPass_, int kTaps, int kStride>
struct BlurOfColumns {
  using Scalar = Scalar_;
  using Compute = Compute_;
  static constexpr BlurPass kPass = kPass_;
  static constexpr bool kTranspose = kPass == BlurPass::kTranspose;
  static constexpr int kCells = kOutputsAtOnce<Scalar>;
  static constexpr int kChannels = 1, kColumns = kTranspose ? kCells * kStride : kCells;
  static constexpr int kLanes = kColumns;
  static constexpr int kBlocks = 3;
  using Input = BlurInput<Scalar, Compute, kPass, kChannels>;

  static VITFAST_DEVICE void add(const Input& input, int row, int column, Compute (&sums)[kLanes]) {
    if constexpr (kTranspose) {
      const Blur<Compute>& blur = input.blur();
      for (int r = row; r < blur.rows.size + blur.rows.after; r = next_repetition(blur.padding, blur.rows, row, r)) {
        add_row(input, r, column, sums);
        add_margins(input, r, column, sums);
      }
    } else {
      add_row(input, row, column, sums);
    }
  }

 private:
  // The window of the input, in places counted from where its kAligned whole vectors begin.
  static constexpr int kBefore = (kTaps - 1) / 2;
  static constexpr int kAligned = kTranspose ? kCells : kCells * kStride;
  static constexpr int kFirst = kTranspose ? -((kTaps - 1 - kBefore) / kStride) : -kBefore;
  static constexpr int kLast =
      kTranspose ? (kLanes - 1 + kBefore) / kStride : (kLanes - 1) * kStride + kTaps - 1 - kBefore;
  static constexpr int kWindow = kLast - kFirst + 1;
  static_assert(kLast >= kAligned - 1);

  static constexpr VITFAST_DEVICE bool is_aside(int w) { return w + kFirst < 0 || w + kFirst >= kAligned; }

  // The tap by which a lane multiplies value w of the window, if it is one.
  static constexpr VITFAST_DEVICE int tap_of(int lane, int w) {
    return kTranspose ? lane + kBefore - (kFirst + w) * kStride : kFirst + w + kBefore - lane * kStride;
  }

  static VITFAST_DEVICE void add_row(const Input& input, int row, int column, Compute (&sums)[kLanes]) {
    const Blur<Compute>& blur = input.blur();
    const int begin = kTranspose ? column / kStride : column * kStride;
    int aside[kWindow];  // where values beside the whole vectors come from
#pragma unroll
    for (int w = 0; w < kWindow; ++w) {
      if (is_aside(w)) {
        aside[w] = source_of(kTranspose ? BlurPadding::kZeros : blur.padding, begin + kFirst + w, input.width());
      }
    }
    constexpr int kAllSteps = kTranspose ? (kTaps + kStride - 1) / kStride : kTaps;
    constexpr int kSteps = kUnrolled<kPass, kAllSteps>;
    const Steps<kPass, kSteps> rows(blur.rows, blur.padding, row);
#pragma unroll(kSteps > 0 ? kSteps : 1)
    for (int i = 0; i < rows.count(); ++i) {
      const int down = rows.place(i);
      Compute values[kWindow];
      load_window(input, input.row(down), begin, aside, values);
      zero_unless(down >= 0, values);
      multiply(input, rows.tap(i), values, sums);
    }
  }

  static VITFAST_DEVICE void load_window(const Input& input, const Scalar* line, int begin, const int (&aside)[kWindow],
                                         Compute (&values)[kWindow]) {
    load<kAligned>(line + begin, values - kFirst);
#pragma unroll
    for (int w = 0; w < kWindow; ++w) {
      if (is_aside(w)) load<1>(input.pixel(line, aside[w]), values + w);
    }
    input.apply_prologue(values);
#pragma unroll
    for (int w = 0; w < kWindow; ++w) {
      if (is_aside(w) && aside[w] < 0) values[w] = Compute(0);
    }
  }

  static VITFAST_DEVICE void multiply(const Input& input, int tap, const Compute (&values)[kWindow],
                                      Compute (&sums)[kLanes]) {
    Compute weights[kTaps];
#pragma unroll
    for (int j = 0; j < kTaps; ++j) weights[j] = input.weight(tap, j);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
#pragma unroll
      for (int w = 0; w < kWindow; ++w) {
        const int j = tap_of(lane, w);
        if (0 <= j && j < kTaps) sums[lane] += weights[j] * values[w];
      }
    }
  }

  // What columns of the margins add to the lanes that they repeat.
  static VITFAST_DEVICE void add_margins(const Input& input, int row, int column, Compute (&sums)[kLanes]) {
    const BlurAxis& columns = input.blur().columns;
    if (columns.inner_begin <= column && column + kLanes <= columns.inner_end) return;
    const int end = columns.size + columns.after;
    int margin = columns.before > 0 ? -columns.before : columns.size;
    for (; margin < end; margin = margin == -1 ? columns.size : margin + 1) {
      const int lane = source_of(input.blur().padding, margin, columns.size) - column;
      if (lane < 0 || lane >= kLanes) continue;
      Compute sum[1] = {0};
      BlurOfPixel<Scalar, Compute, kPass, 1, 0>::add_unpadded(input, row, margin, sum);
#pragma unroll
      for (int v = 0; v < kLanes; ++v) {  // an index that is known keeps sums in registers
        if (v == lane) sums[v] += sum[0];
      }
    }
  }
};

// ---- a thread ------------------------------------------------------------------------------------------------------

// Body: BlurOfPixel or BlurOfColumns.
template <class Body>
class BlurThread {
 public:
  using Scalar = typename Body::Scalar;
  using Compute = typename Body::Compute;

  VITFAST_DEVICE BlurThread(const Blur<Compute>& blur, int group, int part, int thread)
      : blur_(blur), group_(group), part_(part), thread_(thread) {
    side_ = thread & (blur.layout.across() - 1);
    down_ = thread >> blur.layout.log_across;
    height_ = kTranspose ? blur.rows.size : blur.rows.outputs;
    width_ = kTranspose ? blur.columns.size : blur.columns.outputs;
    if (blur.channels_last) {
      map_ = group / blur.layout.channel_groups;
      channel_ = (group % blur.layout.channel_groups * blur.layout.across() + side_) * Body::kChannels;
      there_ = channel_ < blur.channels;
    } else {
      const int64_t plane = int64_t{group} * blur.layout.high() + down_;
      there_ = plane < blur.batch * blur.channels;
      map_ = static_cast<int>(plane);
      channel_ = Body::kPass == BlurPass::kBlur ? 0 : map_ % blur.channels;  // without a prologue, nothing asks for it
    }
  }

  // First step: the outputs; and where sums are wanted, those of the thread, its terms of those of the block.
  VITFAST_DEVICE void compute(Compute* terms) const {
    Compute scale_sums[Body::kChannels] = {}, shift_sums[Body::kChannels] = {};
    if (there_) compute_positions(scale_sums, shift_sums);
    if (!kTranspose || blur_.partial == nullptr) return;
    const int first = blur_.channels_last ? side_ * Body::kChannels : down_;
    Compute* to = terms + (blur_.channels_last ? down_ : side_) * series() + 2 * first;
#pragma unroll
    for (int v = 0; v < Body::kChannels; ++v) {
      to[2 * v] = scale_sums[v];
      to[2 * v + 1] = shift_sums[v];
    }
  }

  // Second step, where sums are wanted: several threads for each sum add up some of its terms.
  VITFAST_DEVICE void add_terms(const Compute* terms, double* shares) const {
    const int count = series(), share_count = count_shares();
    for (int i = thread_; i < count * share_count; i += kBlurThreads) {
      double sum = 0;
      for (int at = i; at < count * count_terms(); at += count * share_count) sum += static_cast<double>(terms[at]);
      shares[i] = sum;
    }
  }

  // Last step, where sums are wanted.
  VITFAST_DEVICE void add_shares(const double* shares) const {
    const int count = series();
    for (int i = thread_; i < count; i += kBlurThreads) {
      double sum = 0;
      for (int at = i; at < count * count_shares(); at += count) sum += shares[at];
      write_sum(i / 2, i % 2, sum);
    }
  }

  // How many values the block shares for the steps above.
  static constexpr int kTerms = 2 * kBlurThreads * Body::kChannels, kShares = 2 * kBlurThreads;

 private:
  static constexpr bool kTranspose = Body::kPass == BlurPass::kTranspose;

  // Sums of the block: two for each plane or channel.
  VITFAST_DEVICE int series() const {
    return 2 * (blur_.channels_last ? blur_.layout.across() * Body::kChannels : blur_.layout.high());
  }
  // Of each sum: one of every thread that takes positions of its own.
  VITFAST_DEVICE int count_terms() const { return blur_.channels_last ? blur_.layout.high() : blur_.layout.across(); }
  // Of the terms of a sum: a power of two, like their number. Not more than the last step can add up soon.
  VITFAST_DEVICE int count_shares() const {
    int count = 1;
    while (count < 16 && count < count_terms() && 2 * count * series() <= kShares) count *= 2;
    return count;
  }

  VITFAST_DEVICE void write_sum(int number, int which, double sum) const {
    int64_t index;  // of a part, batch * parts in all, and a channel
    if (blur_.channels_last) {
      const int channel = group_ % blur_.layout.channel_groups * blur_.layout.across() * Body::kChannels + number;
      if (channel >= blur_.channels) return;
      index = (int64_t{map_} * blur_.layout.parts + part_) * blur_.channels + channel;
    } else {
      const int64_t plane = int64_t{group_} * blur_.layout.high() + number, planes = blur_.batch * blur_.channels;
      if (plane >= planes) return;
      index = part_ * planes + plane;
    }
    blur_.partial[2 * index + which] = sum;
  }

  VITFAST_DEVICE void compute_positions(Compute (&scale_sums)[Body::kChannels],
                                        Compute (&shift_sums)[Body::kChannels]) const {
    const int read_height = kTranspose ? blur_.rows.outputs : blur_.rows.size;
    const int read_width = kTranspose ? blur_.columns.outputs : blur_.columns.size;
    const Scalar* in = static_cast<const Scalar*>(blur_.in) + offset_of_map(read_height, read_width);
    const typename Body::Input input(blur_, in, channel_);
    const int64_t map = offset_of_map(height_, width_);
    const int pixel_stride = blur_.channels_last ? blur_.channels : 1;
    const unsigned along = width_ / Body::kColumns, positions = along * height_;
    const unsigned abreast = count_terms(), step = abreast * blur_.layout.parts;
    for (unsigned i = abreast * part_ + (blur_.channels_last ? down_ : side_); i < positions; i += step) {
      const int row = static_cast<int>(i / along);
      const int column = static_cast<int>(i - row * along) * Body::kColumns;
      Compute values[Body::kLanes] = {};
      Body::add(input, row, column, values);
      const int64_t at = map + int64_t{row} * (width_ * pixel_stride) + column * pixel_stride;
      if (kTranspose && blur_.primal != nullptr) through_prologue(at, values, scale_sums, shift_sums);
      store<Body::kLanes>(values, static_cast<Scalar*>(blur_.out) + at);
    }
  }

  // From the gradient of u to that of x.
  VITFAST_DEVICE void through_prologue(int64_t at, Compute (&values)[Body::kLanes],
                                       Compute (&scale_sums)[Body::kChannels],
                                       Compute (&shift_sums)[Body::kChannels]) const {
    constexpr int kLanesOfChannel = Body::kLanes / Body::kChannels;
    Compute x[Body::kLanes];
    load<Body::kLanes>(static_cast<const Scalar*>(blur_.primal) + at, x);
#pragma unroll
    for (int channel = 0; channel < Body::kChannels; ++channel) {
      const Compute scale = blur_.scale_of(channel_ + channel), shift = blur_.shift_of(channel_ + channel);
      Compute scale_sum = 0, shift_sum = 0;
#pragma unroll
      for (int v = channel * kLanesOfChannel; v < (channel + 1) * kLanesOfChannel; ++v) {
        const Compute dz = activate_backward(values[v], scale * x[v] + shift, blur_.activation, blur_.temperature);
        scale_sum += dz * x[v];
        shift_sum += dz;
        values[v] = scale * dz;
      }
      scale_sums[channel] += scale_sum;
      shift_sums[channel] += shift_sum;
    }
  }

  // Where the plane, or the channels of the image, begin in a map of this size.
  VITFAST_DEVICE int64_t offset_of_map(int height, int width) const {
    const int64_t pixels = int64_t{map_} * (height * width);
    return blur_.channels_last ? pixels * blur_.channels + channel_ : pixels;
  }

  const Blur<Compute>& blur_;
  int group_, part_, thread_;
  int side_, down_;     // of the block
  int map_, channel_;   // the plane and its channel, or the image and the first channel
  bool there_;          // else the map ends before
  int height_, width_;  // of what is written
};

// ---- the choice of kernels and their layout ------------------------------------------------------------------------

inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// The logarithm of how many threads side by side share `count` pieces of work: as many as there is work for, and down
// to `least` fewer where fewer of them end up without any.
inline int log_threads(int64_t count, int least, int most) {
  int log = most;
  while (log > 0 && (int64_t{1} << (log - 1)) >= count) --log;
  const auto taken = [&](int log_size) { return divide_up(count, int64_t{1} << log_size) << log_size; };
  for (int fewer = log - 1; fewer >= least; --fewer) {
    if (taken(fewer) < taken(log)) log = fewer;
  }
  return log;
}

template <class Body>
BlurLayout layout_of(const Blur<typename Body::Compute>& blur, bool sums) {
  constexpr bool kTranspose = Body::kPass == BlurPass::kTranspose;
  constexpr int64_t kMostParts = 65535;  // of a grid
  // Sums of fewer blocks are added up sooner, but a thread adds up few terms in the type that is computed in.
  constexpr int64_t kSumBlocks = 512, kSumTerms = 16;
  const int64_t height = kTranspose ? blur.rows.size : blur.rows.outputs;
  const int64_t width = kTranspose ? blur.columns.size : blur.columns.outputs;
  const int64_t positions = height * (width / Body::kColumns);
  BlurLayout layout{};
  if (blur.channels_last) {
    const int64_t vectors = blur.channels / Body::kChannels;
    layout.log_across = log_threads(vectors, 2, 5);
    layout.channel_groups = static_cast<int>(divide_up(vectors, layout.across()));
    layout.groups = int64_t{blur.batch} * layout.channel_groups;
  } else {
    layout.log_across = log_threads(positions, 5, 8);
    layout.groups = divide_up(int64_t{blur.batch} * blur.channels, layout.high());
  }
  int64_t parts = divide_up(positions, blur.channels_last ? layout.high() : layout.across());
  if (sums) parts = std::min(parts, std::max(divide_up(parts, kSumTerms), divide_up(kSumBlocks, layout.groups)));
  layout.parts = static_cast<int>(std::min(parts, kMostParts));
  return layout;
}

// Calls run(Body{}) with the body for 1 pixel, of kChannels channels.
template <class Scalar, class Compute, BlurPass kPass, int kChannels, class Run>
void with_pixels(const Blur<Compute>& blur, Run run) {
  const BlurAxis &rows = blur.rows, &columns = blur.columns;
  int steps = rows.taps == columns.taps ? rows.taps : 0;
  if (kPass == BlurPass::kTranspose && steps > 0) {  // the last ones may lead to no output
    const bool usual = rows.stride == columns.stride && rows.stride <= 2;
    steps = usual ? std::max(2, (steps + rows.stride - 1) / rows.stride) : 0;
  }
  if (steps == 2) return run(BlurOfPixel<Scalar, Compute, kPass, kChannels, 2>{});
  if (steps == 3) return run(BlurOfPixel<Scalar, Compute, kPass, kChannels, 3>{});
  if (steps == 4) return run(BlurOfPixel<Scalar, Compute, kPass, kChannels, 4>{});
  run(BlurOfPixel<Scalar, Compute, kPass, kChannels, 0>{});
}

template <class Scalar, class Compute>
bool fits_columns(const Blur<Compute>& blur) {
  const BlurAxis &rows = blur.rows, &columns = blur.columns;
  return !blur.channels_last && blur.aligned && rows.taps == columns.taps && rows.stride == columns.stride &&
         2 <= columns.taps && columns.taps <= 4 && columns.stride <= 2 && columns.before == (columns.taps - 1) / 2 &&
         columns.outputs % kOutputsAtOnce<Scalar> == 0 && columns.size == columns.outputs * columns.stride;
}

template <class Scalar, class Compute, BlurPass kPass, int kStride, class Run>
void with_columns(int taps, Run run) {
  if (taps == 2) return run(BlurOfColumns<Scalar, Compute, kPass, 2, kStride>{});
  if (taps == 3) return run(BlurOfColumns<Scalar, Compute, kPass, 3, kStride>{});
  run(BlurOfColumns<Scalar, Compute, kPass, 4, kStride>{});
}

template <class Scalar, class Compute, BlurPass kPass, class Run>
void with_body_for_pass(const Blur<Compute>& blur, Run run) {
  constexpr int kVector = 16 / sizeof(Scalar);
  if (fits_columns<Scalar>(blur)) {
    if (blur.columns.stride == 1) return with_columns<Scalar, Compute, kPass, 1>(blur.columns.taps, run);
    return with_columns<Scalar, Compute, kPass, 2>(blur.columns.taps, run);
  }
  if (blur.channels_last && blur.aligned && blur.channels % kVector == 0) {
    return with_pixels<Scalar, Compute, kPass, kVector>(blur, run);
  }
  with_pixels<Scalar, Compute, kPass, 1>(blur, run);
}

// Calls run(Body{}) with the body that serves a call best.
template <class Scalar, class Compute, class Run>
void with_body(const Blur<Compute>& blur, bool transpose, Run run) {
  const bool prologue = blur.activation != BlurActivation::kNone || blur.scale != nullptr || blur.shift != nullptr;
  if (transpose) return with_body_for_pass<Scalar, Compute, BlurPass::kTranspose>(blur, run);
  if (prologue) return with_body_for_pass<Scalar, Compute, BlurPass::kBlurOfPrologue>(blur, run);
  with_body_for_pass<Scalar, Compute, BlurPass::kBlur>(blur, run);
}

}  // namespace vitfast::cuda
