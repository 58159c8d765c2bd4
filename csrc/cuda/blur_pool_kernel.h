// Blur pooling on the GPU: what one block of threads does.
//
// A block writes a tile of the output: some rows and columns of some planes, or of some channels if maps are
// channels_last. First its threads load what the tile needs, margins included, into shared memory, as whole vectors
// where the map allows it, and apply the prologue to each value once. Then every thread takes output after output.
//
//     blur:            y[o, p] = sum over i, j of k[i, j] * u[o s + i - top, p s + j - left],  u = prologue(x)
//     its transpose:   gu[at] = sum of k[i, j] * g[o, p] over all o s + i - top = at, likewise for columns;
//                      places of the padded map that repeat one of the map add to it
//
// The transpose writes the gradient of x, through the prologue if there is one. The sums for the gradients of scale and
// shift are those of a block, in an order that does not depend on chance; blur_pool.cu adds up those of all blocks.
//
// The steps between two barriers are functions of a thread's number. A compiler for the host takes this file as it is,
// and runs them one thread after the other: that is how it is tested without a GPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "blur_pool_options.h"

#ifdef __CUDACC__
#define VITFAST_DEVICE __device__ __forceinline__
#else
#define VITFAST_DEVICE inline
#endif

namespace vitfast::cuda {

constexpr int kBlurThreads = 256;  // of a block
constexpr int kMostTaps = 7;
constexpr int kWeights = 64;  // places for them in shared memory: what follows is aligned
static_assert(kWeights >= kMostTaps * kMostTaps);

// One axis of the blur, from `size` places of the map to `outputs`. All numbers of places are below kMostPlaces, the
// margins included: coordinates are of 32 bits, for which a division is a few instructions and no call; what lies in
// memory is counted in 64.
constexpr int64_t kMostPlaces = int64_t{1} << 30;
struct BlurAxis {
  int size, outputs, stride, before, after, taps;
};

// How the output is cut into tiles: powers of two, and what a tile needs of the input.
struct BlurTiles {
  int log_rows, log_columns, log_depth;  // depth: planes, or channels if channels_last
  int loaded_rows, loaded_columns;       // columns with those that fill up a vector
  int along_rows, along_columns;
  int64_t along_depth;

  int64_t blocks() const { return int64_t{along_rows} * along_columns * along_depth; }
  int64_t loaded_values() const { return (int64_t{loaded_rows} * loaded_columns) << log_depth; }
  int64_t shared_values() const { return loaded_values() + kWeights; }
};

template <class Compute>
struct Blur {
  int batch, channels;  // whose product is below 2^31
  BlurAxis rows, columns;
  BlurTiles tiles;
  BlurPadding padding;
  BlurActivation activation;
  Compute temperature;
  const void* weights;      // of the kernel, row by row, where the maps are: reading them here would wait for the GPU
  bool weights_are_double;  // or float
  bool vectors;             // whether 16 bytes of the input may be loaded at once
  const void *in, *primal;  // primal: x for the transpose with a prologue, else null
  void* out;
  const Compute *scale, *shift;  // (channels,), or null
  double* partial;               // (parts, channels, 2), the sums for scale and shift, or null
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
  if (padding == BlurPadding::kCircular) return at - floor_divide(at, size) * size;
  const int period = size > 1 ? 2 * (size - 1) : 1;
  const int within = at - floor_divide(at, period) * period;
  return within < size ? within : period - within;
}

// Whether a place of the margins may repeat this one.
VITFAST_DEVICE bool is_repeated(BlurPadding padding, int at, const BlurAxis& axis) {
  const int last = axis.size - 1;
  if (padding == BlurPadding::kZeros || axis.before + axis.after == 0) return false;
  if (axis.before > last || axis.after > last) return true;  // margins that go back and forth
  if (padding == BlurPadding::kReplicate) return at == 0 || at == last;
  if (padding == BlurPadding::kCircular) return at < axis.after || at > last - axis.before;
  return (0 < at && at <= axis.before) || (last - axis.after <= at && at < last);
}

template <class Compute>
VITFAST_DEVICE Compute activate(Compute z, BlurActivation activation, Compute temperature) {
  if (activation == BlurActivation::kNone) return z;
  if (activation == BlurActivation::kTanhRelu) z = temperature * tanh(z / temperature);
  if (activation == BlurActivation::kRelu6 && z > Compute(6)) return Compute(6);
  return z <= Compute(0) ? Compute(0) : z;  // NaN stays
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

// Scalar: what maps consist of. Compute: what is computed in. kTaps: of a square kernel, or 0 for any.
template <class Scalar, class Compute, bool kChannelsLast, bool kTranspose, int kTaps>
class BlurBlock {
 public:
  static constexpr int kVector = 16 / sizeof(Scalar);

  VITFAST_DEVICE BlurBlock(const Blur<Compute>& blur, int block, Compute* shared, double* sums)
      : blur_(blur), tile_(shared + kWeights), weights_(shared), sums_(sums) {
    const BlurTiles& tiles = blur.tiles;
    const int tile_column = block % tiles.along_columns;
    const int tile_row = block / tiles.along_columns % tiles.along_rows;
    const int group = block / tiles.along_columns / tiles.along_rows;
    const int depth = 1 << tiles.log_depth;
    spot_ = tile_row * tiles.along_columns + tile_column;
    first_row_ = tile_row << tiles.log_rows;
    first_column_ = tile_column << tiles.log_columns;
    if constexpr (kChannelsLast) {
      const int chunks = ((blur.channels - 1) >> tiles.log_depth) + 1;
      image_ = group / chunks;
      first_ = group % chunks * depth;
      count_ = smaller(depth, blur.channels - first_);
    } else {
      first_ = group * depth;
      count_ = smaller(depth, blur.batch * blur.channels - first_);
    }
    origin_row_ = origin(first_row_, blur.rows);
    origin_column_ = origin(first_column_, blur.columns);
    if (!kChannelsLast && blur.vectors) {  // columns from where a vector begins
      origin_column_ = floor_divide(origin_column_, kVector) * kVector;
    }
  }

  // First step: the weights, and the input from (origin_row_, origin_column_) on, into shared memory.
  VITFAST_DEVICE void load(int thread) const {
    if (thread < blur_.rows.taps * blur_.columns.taps) {
      weights_[thread] = blur_.weights_are_double
                             ? static_cast<Compute>(static_cast<const double*>(blur_.weights)[thread])
                             : static_cast<Compute>(static_cast<const float*>(blur_.weights)[thread]);
    }
    if constexpr (kChannelsLast) {
      load_pixels(thread);
    } else {
      load_planes(thread);
    }
  }

  // Second step: outputs, and the sums of the thread.
  VITFAST_DEVICE void compute(int thread) const {
    const BlurTiles& tiles = blur_.tiles;
    const int sharers = kBlurThreads >> tiles.log_depth;  // threads for one plane or channel
    const int q = kChannelsLast ? thread & ((1 << tiles.log_depth) - 1) : thread / sharers;
    const int sharer = kChannelsLast ? thread >> tiles.log_depth : thread % sharers;
    const int height = output_height(), width = output_width();
    const int channel = channel_of(q);
    const Compute scale = q < count_ ? scale_of(channel) : Compute(1);
    const Compute shift = q < count_ ? shift_of(channel) : Compute(0);
    Compute scale_sum = 0, shift_sum = 0;
    Compute unrolled[kTaps > 0 ? kTaps * kTaps : 1];  // in registers
#pragma unroll
    for (int i = 0; i < kTaps * kTaps; ++i) unrolled[i] = weights_[i];
    const int pixels = q < count_ ? 1 << (tiles.log_rows + tiles.log_columns) : 0;
    for (int i = sharer; i < pixels; i += sharers) {
      const int down = i >> tiles.log_columns, right = i & ((1 << tiles.log_columns) - 1);
      const int row = first_row_ + down, column = first_column_ + right;
      if (row >= height || column >= width) continue;
      const int64_t at = offset(q, row, column, height, width);
      Compute value = kTranspose ? transposed(q, row, column) : blurred(q, down, right, unrolled);
      if (kTranspose && blur_.primal != nullptr) {
        const Compute x = static_cast<Compute>(static_cast<const Scalar*>(blur_.primal)[at]);
        const Compute dz = activate_backward(value, scale * x + shift, blur_.activation, blur_.temperature);
        scale_sum += dz * x;
        shift_sum += dz;
        value = scale * dz;
      }
      static_cast<Scalar*>(blur_.out)[at] = static_cast<Scalar>(value);
    }
    if (kTranspose && blur_.partial != nullptr) {
      sums_[2 * (q * sharers + sharer)] = scale_sum;
      sums_[2 * (q * sharers + sharer) + 1] = shift_sum;
    }
  }

  // Third step, where sums are wanted, for width = half, a quarter, ... of `sharers`: halves of the sums are added.
  VITFAST_DEVICE void add_sums(int thread, int width) const {
    const int sharers = kBlurThreads >> blur_.tiles.log_depth;
    if (thread % sharers >= width) return;
    sums_[2 * thread] += sums_[2 * (thread + width)];
    sums_[2 * thread + 1] += sums_[2 * (thread + width) + 1];
  }

  // Last step, where sums are wanted.
  VITFAST_DEVICE void write_sums(int thread) const {
    if (thread >= count_) return;
    const int64_t spots = int64_t{blur_.tiles.along_rows} * blur_.tiles.along_columns;
    // A part is a spot of an image; for planes, the channels of all images follow each other.
    const int64_t index = kChannelsLast ? (image_ * spots + spot_) * blur_.channels + first_ + thread
                                        : spot_ * blur_.batch * blur_.channels + first_ + thread;
    const int sharers = kBlurThreads >> blur_.tiles.log_depth;
    blur_.partial[2 * index] = sums_[2 * thread * sharers];
    blur_.partial[2 * index + 1] = sums_[2 * thread * sharers + 1];
  }

 private:
  static VITFAST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

  // The first place of the input that the outputs of a tile need.
  VITFAST_DEVICE int origin(int first, const BlurAxis& axis) const {
    if constexpr (!kTranspose) return first * axis.stride - axis.before;
    return floor_divide(first + axis.before - axis.taps + axis.stride, axis.stride);
  }

  VITFAST_DEVICE int output_height() const { return kTranspose ? blur_.rows.size : blur_.rows.outputs; }
  VITFAST_DEVICE int output_width() const { return kTranspose ? blur_.columns.size : blur_.columns.outputs; }
  VITFAST_DEVICE int input_height() const { return kTranspose ? blur_.rows.outputs : blur_.rows.size; }
  VITFAST_DEVICE int input_width() const { return kTranspose ? blur_.columns.outputs : blur_.columns.size; }

  // Where a value lies in a map; q counts the planes or channels of this block.
  VITFAST_DEVICE int64_t offset(int q, int row, int column, int height, int width) const {
    if constexpr (kChannelsLast) {
      return ((int64_t{image_} * height + row) * width + column) * blur_.channels + first_ + q;
    }
    return (int64_t{first_ + q} * height + row) * width + column;
  }

  VITFAST_DEVICE int tile_offset(int q, int row, int column) const {
    if constexpr (kChannelsLast) return ((row * blur_.tiles.loaded_columns + column) << blur_.tiles.log_depth) + q;
    return (q * blur_.tiles.loaded_rows + row) * blur_.tiles.loaded_columns + column;
  }

  VITFAST_DEVICE int channel_of(int q) const { return kChannelsLast ? first_ + q : (first_ + q) % blur_.channels; }
  VITFAST_DEVICE Compute scale_of(int channel) const {
    return blur_.scale == nullptr ? Compute(1) : blur_.scale[channel];
  }
  VITFAST_DEVICE Compute shift_of(int channel) const {
    return blur_.shift == nullptr ? Compute(0) : blur_.shift[channel];
  }

  // ---- loading -----------------------------------------------------------------------------------------------------

  struct alignas(16) Vector {
    Scalar values[kVector];
  };

  // What the blur is applied to; the transpose, to the gradient as it is.
  VITFAST_DEVICE Compute prepared(Scalar value, Compute scale, Compute shift) const {
    const Compute x = static_cast<Compute>(value);
    if constexpr (kTranspose) return x;
    return activate(scale * x + shift, blur_.activation, blur_.temperature);
  }

  // Margins of the gradient are zeros.
  VITFAST_DEVICE int source(int at, int size) const {
    return source_of(kTranspose ? BlurPadding::kZeros : blur_.padding, at, size);
  }

  VITFAST_DEVICE void load_planes(int thread) const {
    const BlurTiles& tiles = blur_.tiles;
    const Scalar* in = static_cast<const Scalar*>(blur_.in);
    const int height = input_height(), width = input_width();
    const int step = blur_.vectors ? kVector : 1;
    const int chunks = tiles.loaded_columns / step;
    int lanes = 1;  // that share a line
    while (lanes < chunks && lanes < kBlurThreads) lanes *= 2;
    const int abreast = kBlurThreads / lanes;  // lines
    int q = 0, row = thread / lanes;
    for (;; row += abreast) {
      while (row >= tiles.loaded_rows) {
        row -= tiles.loaded_rows;
        ++q;
      }
      if (q >= count_) return;
      const int channel = channel_of(q);
      const Compute scale = scale_of(channel), shift = shift_of(channel);
      const int from_row = source(origin_row_ + row, height);
      const Scalar* line = in + offset(q, from_row < 0 ? 0 : from_row, 0, height, width);
      Compute* to = tile_ + tile_offset(q, row, 0);
      for (int chunk = thread % lanes; chunk < chunks; chunk += lanes) {
        const int column = origin_column_ + chunk * step;
        if (blur_.vectors && from_row >= 0 && column >= 0 && column + kVector <= width) {
          const Vector loaded = *reinterpret_cast<const Vector*>(line + column);
#pragma unroll
          for (int v = 0; v < kVector; ++v) to[chunk * step + v] = prepared(loaded.values[v], scale, shift);
        } else {
          for (int v = 0; v < step; ++v) {
            const int from = from_row < 0 ? -1 : source(column + v, width);
            to[chunk * step + v] = from < 0 ? Compute(0) : prepared(line[from], scale, shift);
          }
        }
      }
    }
  }

  VITFAST_DEVICE void load_pixels(int thread) const {
    const BlurTiles& tiles = blur_.tiles;
    const Scalar* in = static_cast<const Scalar*>(blur_.in);
    const int height = input_height(), width = input_width();
    const bool vectors = blur_.vectors && (1 << tiles.log_depth) >= kVector;
    const int step = vectors ? kVector : 1;
    const int lanes = (1 << tiles.log_depth) / step;  // that share a pixel
    const int q = thread % lanes * step, abreast = kBlurThreads / lanes;
    Compute scale[kVector], shift[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const bool there = v < step && q + v < count_;
      scale[v] = there ? scale_of(first_ + q + v) : Compute(1);
      shift[v] = there ? shift_of(first_ + q + v) : Compute(0);
    }
    if (q >= count_) return;  // no output needs it
    int row = 0, column = thread / lanes;
    for (;; column += abreast) {
      while (column >= tiles.loaded_columns) {
        column -= tiles.loaded_columns;
        ++row;
      }
      if (row >= tiles.loaded_rows) return;
      const int from_row = source(origin_row_ + row, height), from_column = source(origin_column_ + column, width);
      Compute* to = tile_ + tile_offset(q, row, column);
      if (from_row < 0 || from_column < 0) {
        for (int v = 0; v < step; ++v) to[v] = Compute(0);
        continue;
      }
      const Scalar* pixel = in + offset(q, from_row, from_column, height, width);
      if (vectors) {  // channels are a multiple of a vector then
        const Vector loaded = *reinterpret_cast<const Vector*>(pixel);
#pragma unroll
        for (int v = 0; v < kVector; ++v) to[v] = prepared(loaded.values[v], scale[v], shift[v]);
      } else {
        *to = prepared(*pixel, scale[0], shift[0]);
      }
    }
  }

  // ---- computing ---------------------------------------------------------------------------------------------------

  // The output that lies `down` and `right` of the tile's first one.
  VITFAST_DEVICE Compute blurred(int q, int down, int right, const Compute* unrolled) const {
    const int skipped = first_column_ * blur_.columns.stride - blur_.columns.before - origin_column_;
    const Compute* from = tile_ + tile_offset(q, down * blur_.rows.stride, right * blur_.columns.stride + skipped);
    const int along = tile_offset(0, 1, 0), across = tile_offset(0, 0, 1);
    Compute sum = 0;
    if constexpr (kTaps > 0) {
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
#pragma unroll
        for (int j = 0; j < kTaps; ++j) sum += unrolled[i * kTaps + j] * from[i * along + j * across];
      }
    } else {
      for (int i = 0; i < blur_.rows.taps; ++i) {
        for (int j = 0; j < blur_.columns.taps; ++j) {
          sum += weights_[i * blur_.columns.taps + j] * from[i * along + j * across];
        }
      }
    }
    return sum;
  }

  // The taps of an axis that lead to one of its places: tap, tap + stride, ... and output, output - 1, ...
  struct Reach {
    int tap, output;
  };
  static VITFAST_DEVICE Reach reach(int at, const BlurAxis& axis) {
    const int from = at + axis.before, output = floor_divide(from, axis.stride);
    return {from - output * axis.stride, output};
  }

  VITFAST_DEVICE Compute transposed(int q, int row, int column) const {
    if (is_repeated(blur_.padding, row, blur_.rows) || is_repeated(blur_.padding, column, blur_.columns)) {
      return with_repetitions(q, row, column);
    }
    const Reach down = reach(row, blur_.rows), right = reach(column, blur_.columns);
    if (down.tap >= blur_.rows.taps || right.tap >= blur_.columns.taps) return Compute(0);  // the stride went past it
    const Compute* from = tile_ + tile_offset(q, down.output - origin_row_, right.output - origin_column_);
    const int along = tile_offset(0, 1, 0), across = tile_offset(0, 0, 1);
    Compute sum = 0;
    for (int i = down.tap, k = 0; i < blur_.rows.taps; i += blur_.rows.stride, ++k) {
      for (int j = right.tap, l = 0; j < blur_.columns.taps; j += blur_.columns.stride, ++l) {
        sum += weights_[i * blur_.columns.taps + j] * from[-k * along - l * across];
      }
    }
    return sum;
  }

  // At the edges: all places of the padded map that repeat this one, which may lie anywhere.
  VITFAST_DEVICE Compute with_repetitions(int q, int row, int column) const {
    Compute sum = 0;
    for_repetitions(row, blur_.rows,
                    [&](int r) { for_repetitions(column, blur_.columns, [&](int c) { sum += unpadded(q, r, c); }); });
    return sum;
  }

  template <class Visit>
  VITFAST_DEVICE void for_repetitions(int at, const BlurAxis& axis, Visit visit) const {
    visit(at);
    for (int margin = -axis.before; margin < 0; ++margin) {
      if (source_of(blur_.padding, margin, axis.size) == at) visit(margin);
    }
    for (int margin = axis.size; margin < axis.size + axis.after; ++margin) {
      if (source_of(blur_.padding, margin, axis.size) == at) visit(margin);
    }
  }

  // The gradient of one place of the padded map, from the gradient of the output as it lies in memory.
  VITFAST_DEVICE Compute unpadded(int q, int row, int column) const {
    const Scalar* grad = static_cast<const Scalar*>(blur_.in);
    const int height = blur_.rows.outputs, width = blur_.columns.outputs;
    const Reach down = reach(row, blur_.rows), right = reach(column, blur_.columns);
    Compute sum = 0;
    int o = down.output;
    for (int i = down.tap; i < blur_.rows.taps; i += blur_.rows.stride, --o) {
      if (o < 0 || o >= height) continue;
      int p = right.output;
      for (int j = right.tap; j < blur_.columns.taps; j += blur_.columns.stride, --p) {
        if (p < 0 || p >= width) continue;
        sum += weights_[i * blur_.columns.taps + j] * static_cast<Compute>(grad[offset(q, o, p, height, width)]);
      }
    }
    return sum;
  }

  const Blur<Compute>& blur_;
  Compute* tile_;  // loaded values: (depth, rows, columns), or (rows, columns, depth) if channels_last
  Compute* weights_;
  double* sums_;                    // two for each thread
  int image_ = 0, first_, count_;   // of channels_last maps; the first plane or channel, and how many
  int spot_;                        // of an image, in which the tile lies
  int first_row_, first_column_;    // of the output
  int origin_row_, origin_column_;  // of the input
};

// ---- the cut into tiles ------------------------------------------------------------------------------------------

inline int log2_at_least(int64_t value) {
  int log = 0;
  while ((int64_t{1} << log) < value) ++log;
  return log;
}

// Tiles that use threads and shared memory well, and may need less memory than a block has without asking for more.
template <class Compute>
BlurTiles cut_into_tiles(const Blur<Compute>& blur, bool channels_last, bool transpose, int vector) {
  constexpr int kLogOutputs = 11;             // a few for every thread
  constexpr int64_t kSharedBytes = 40 << 10;  // the sums need 4 KiB of 48
  const int64_t height = transpose ? blur.rows.size : blur.rows.outputs;
  const int64_t width = transpose ? blur.columns.size : blur.columns.outputs;
  const int64_t planes = int64_t{blur.batch} * blur.channels;
  const auto least = [](int a, int b) { return a < b ? a : b; };
  BlurTiles tiles{};
  if (channels_last) {
    // As many channels as fill the sectors of a cache line, of a patch that is almost square.
    tiles.log_depth = least(log2_at_least(blur.channels), vector >= 8 ? 6 : vector == 4 ? 5 : 4);
    tiles.log_columns = least(log2_at_least(width), (kLogOutputs - tiles.log_depth + 1) / 2);
    tiles.log_rows = least(log2_at_least(height), kLogOutputs - tiles.log_depth - tiles.log_columns);
  } else {
    tiles.log_columns = least(log2_at_least(width), 6);
    tiles.log_rows = least(log2_at_least(height), kLogOutputs - tiles.log_columns);
    // At least a warp for each plane.
    tiles.log_depth = least(least(log2_at_least(planes), 3), kLogOutputs - tiles.log_columns - tiles.log_rows);
  }
  const auto loaded = [&](int log_outputs, const BlurAxis& axis) {
    const int64_t steps = (int64_t{1} << log_outputs) - 1;  // times a stride: of 64 bits
    return transpose ? (steps + axis.taps - 1) / axis.stride + 1 : steps * axis.stride + axis.taps;
  };
  const auto fits = [&] {
    const int64_t rows = loaded(tiles.log_rows, blur.rows);
    int64_t columns = loaded(tiles.log_columns, blur.columns);
    if (!channels_last && blur.vectors) columns = (columns + 2 * vector - 2) / vector * vector;
    if (rows * columns > kSharedBytes) return false;  // so that the numbers below are small
    tiles.loaded_rows = static_cast<int>(rows);
    tiles.loaded_columns = static_cast<int>(columns);
    return tiles.loaded_values() * static_cast<int64_t>(sizeof(Compute)) <= kSharedBytes;
  };
  while (!fits()) {
    int& larger = tiles.log_rows >= tiles.log_columns ? tiles.log_rows : tiles.log_columns;
    --(larger > 0 ? larger : tiles.log_depth);
  }
  const int64_t depth = channels_last ? blur.channels : planes;
  const auto cut = [](int64_t size, int log) { return (size + (int64_t{1} << log) - 1) >> log; };
  tiles.along_rows = static_cast<int>(cut(height, tiles.log_rows));
  tiles.along_columns = static_cast<int>(cut(width, tiles.log_columns));
  tiles.along_depth = cut(depth, tiles.log_depth) * (channels_last ? blur.batch : 1);
  return tiles;
}

}  // namespace vitfast::cuda
