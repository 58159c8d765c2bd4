// Blur pooling and its transpose, in one pass over the input and one over the output.
//
// Every row of the input is blurred along its columns once, into a slot; a row of the output is a weighted sum of
// slots. So nothing but the map itself goes through memory, for any padding: rows that reflect at an edge are in a slot
// anyway.
//
// Channels-first rows lie along the vector: a vector of outputs is a sum of shuffled inputs, whose indices and weights
// hold stride, padding and transposition. Channels-last rows lie across it: a pixel is a weighted sum of pixels, some
// channels at a time so that the slots stay in the caches.
#pragma once

#include "cpu/blur_pool.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// ---- the prologue and its derivative --------------------------------------------------------------------------------

template <class T>
inline Vec<T> relu(Vec<T> z) {
  return max<T>(Vec<T>{}, z);  // NaN stays
}

// tanh(a) for a >= 0.
inline Vec<float> tanh_nonnegative(Vec<float> a) {
  // Its series near 0, where the other formula cancels; the first term left out is 1e-8 of the sum at 0.35.
  const Vec<float> s = a * a;
  const Vec<float> series =
      a + a * s * (-0.33333333f + s * (0.13333333f + s * (-0.05396825f + s * (0.021869488f - s * 0.0088632355f))));
  const Vec<float> e = exp2_nonpositive<float>(a * (-2 * kLog2E<float>));  // exp(-2 a)
  return a < 0.35f ? series : (1.0f - e) / (1.0f + e);
}

inline Vec<double> tanh_nonnegative(Vec<double> a) {
  for (int l = 0; l < kLanes<double>; ++l) a[l] = std::tanh(a[l]);
  return a;
}

template <class T, BlurActivation kActivation>
inline Vec<T> activate(Vec<T> z, T temperature) {
  if constexpr (kActivation == BlurActivation::kNone) return z;
  if constexpr (kActivation == BlurActivation::kRelu) return relu<T>(z);
  if constexpr (kActivation == BlurActivation::kRelu6) {
    const Vec<T> positive = relu<T>(z);
    return positive > T{6} ? broadcast(T{6}) : positive;
  }
  if constexpr (kActivation == BlurActivation::kTanhRelu) {
    return temperature * tanh_nonnegative(relu<T>(z) / temperature);
  }
}

// The derivative at z times g, as PyTorch has it where there is none.
template <class T, BlurActivation kActivation>
inline Vec<T> activate_backward(Vec<T> z, Vec<T> g, T temperature) {
  constexpr Vec<T> zero{};
  if constexpr (kActivation == BlurActivation::kNone) return g;
  if constexpr (kActivation == BlurActivation::kRelu) return z <= zero ? zero : g;
  if constexpr (kActivation == BlurActivation::kRelu6) {
    const Vec<T> below = z <= zero ? zero : g;
    return z >= T{6} ? zero : below;
  }
  if constexpr (kActivation == BlurActivation::kTanhRelu) {
    const Vec<T> t = tanh_nonnegative(relu<T>(z) / temperature);
    return z <= zero ? zero : g * (1 - t * t);
  }
}

template <BlurActivation kActivation>
using ActivationTag = std::integral_constant<BlurActivation, kActivation>;

template <class F>
inline void with_activation(BlurActivation activation, F f) {
  switch (activation) {
    case BlurActivation::kNone:
      return f(ActivationTag<BlurActivation::kNone>{});
    case BlurActivation::kRelu:
      return f(ActivationTag<BlurActivation::kRelu>{});
    case BlurActivation::kRelu6:
      return f(ActivationTag<BlurActivation::kRelu6>{});
    case BlurActivation::kTanhRelu:
      return f(ActivationTag<BlurActivation::kTanhRelu>{});
  }
}

// ---- along the vector -----------------------------------------------------------------------------------------------

template <class T>
struct TwoVectors {
  Vec<T> x, y;
};

// For a vector of outputs: weight * (inputs from `base` on, shuffled); lanes without an input have the weight 0.
template <class T>
struct Gather {
  using Index = typename VecOf<T>::Int;
  Index index[kLanes<T>];  // into two vectors
  T weight[kLanes<T>];
  int64_t base;

  Vec<T> of(const TwoVectors<T>& inputs) const {
    IntVec<T> lanes;
    std::memcpy(&lanes, index, sizeof(lanes));
    return load(weight) * __builtin_shuffle(inputs.x, inputs.y, lanes);
  }
};

// A matrix for columns, in gathers: vector v of outputs is the sum of those in [begin[v], begin[v + 1]).
template <class T>
struct Gathers {
  std::vector<int64_t> begin;
  std::vector<Gather<T>> gathers;

  Gathers(const BlurMatrix& matrix, int64_t inputs) {
    constexpr int64_t n = kLanes<T>;
    const int64_t outputs = static_cast<int64_t>(matrix.begin.size()) - 1;
    for (int64_t first = 0; first < outputs; first += n) {
      begin.push_back(static_cast<int64_t>(gathers.size()));
      const int64_t lanes = std::min(n, outputs - first);
      int64_t next[n];  // of the taps of a lane
      std::copy_n(matrix.begin.begin() + first, lanes, next);
      while (true) {
        int64_t base = inputs;
        for (int64_t l = 0; l < lanes; ++l) {
          if (next[l] < matrix.begin[first + l + 1]) base = std::min(base, matrix.taps[next[l]].from);
        }
        if (base == inputs) break;
        base = std::min(base, std::max<int64_t>(inputs - 2 * n, 0));  // both vectors lie inside of the row
        Gather<T> gather{{}, {}, base};
        for (int64_t l = 0; l < lanes; ++l) {
          if (next[l] == matrix.begin[first + l + 1]) continue;
          const BlurTap& tap = matrix.taps[next[l]];
          if (tap.from - base >= 2 * n) continue;  // the turn of a later gather
          gather.index[l] = static_cast<typename Gather<T>::Index>(tap.from - base);
          gather.weight[l] = static_cast<T>(tap.weight);
          ++next[l];
        }
        gathers.push_back(gather);
      }
    }
    begin.push_back(static_cast<int64_t>(gathers.size()));
  }

  // Applies the matrix to rows: from[i] -> to[i], in whole vectors. `inputs` is what reads them.
  template <class Inputs>
  void apply(const T* const* from, T* const* to, int64_t rows, Inputs inputs) const {
    for (size_t v = 0; v + 1 < begin.size(); ++v) {
      const Gather<T>* at = gathers.data() + begin[v];
      const int64_t offset = static_cast<int64_t>(v) * kLanes<T>;
      switch (begin[v + 1] - begin[v]) {
        case 1:
          sum<1>(at, from, to, offset, rows, inputs);
          break;
        case 2:
          sum<2>(at, from, to, offset, rows, inputs);
          break;
        case 3:
          sum<3>(at, from, to, offset, rows, inputs);
          break;
        case 4:
          sum<4>(at, from, to, offset, rows, inputs);
          break;
        default:
          for (int64_t i = 0; i < rows; ++i) {
            Vec<T> total{};
            for (int64_t g = 0; g < begin[v + 1] - begin[v]; ++g) total = total + at[g].of(inputs(from[i], at[g].base));
            store(to[i] + offset, total);
          }
      }
    }
  }

 private:
  // The number of gathers is known to the compiler, which keeps them in registers.
  template <int kCount, class Inputs>
  static void sum(const Gather<T>* gathers, const T* const* from, T* const* to, int64_t offset, int64_t rows,
                  Inputs inputs) {
    Gather<T> held[kCount];
    std::copy_n(gathers, kCount, held);
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = from[i];
      Vec<T> total = held[0].of(inputs(row, held[0].base));
#pragma GCC unroll 4
      for (int g = 1; g < kCount; ++g) total = total + held[g].of(inputs(row, held[g].base));
      store(to[i] + offset, total);
    }
  }
};

// ---- across the vector ----------------------------------------------------------------------------------------------

// Calls put(j, weighted sum of rows at j, lanes that count) for every vector of [0, length).
template <class T, int kTaps, class Put>
inline void combine_taps(const T* const* rows, const T* weights, int64_t length, Put put) {
  const T* row[kTaps];
  Vec<T> weight[kTaps];
#pragma GCC unroll 4
  for (int t = 0; t < kTaps; ++t) row[t] = rows[t], weight[t] = broadcast(weights[t]);
  const auto sum_at = [&](auto load_at) {
    Vec<T> sum = weight[0] * load_at(row[0]);
#pragma GCC unroll 4
    for (int t = 1; t < kTaps; ++t) sum = sum + weight[t] * load_at(row[t]);
    return sum;
  };
  const int64_t whole = length / kLanes<T> * kLanes<T>;
  for (int64_t j = 0; j < whole; j += kLanes<T>) {
    put(j, sum_at([&](const T* p) { return load(p + j); }), int64_t{kLanes<T>});
  }
  if (whole < length) {
    put(whole, sum_at([&](const T* p) { return load_partial(p + whole, length - whole); }), length - whole);
  }
}

template <class T, class Put>
inline void combine(const T* const* rows, const T* weights, int64_t taps, int64_t length, Put put) {
  switch (taps) {
    case 1:
      return combine_taps<T, 1>(rows, weights, length, put);
    case 2:
      return combine_taps<T, 2>(rows, weights, length, put);
    case 3:
      return combine_taps<T, 3>(rows, weights, length, put);
    case 4:
      return combine_taps<T, 4>(rows, weights, length, put);
    default:  // none, where there is nothing but zeros of the margin, or many
      for (int64_t j = 0; j < length; j += kLanes<T>) {
        Vec<T> sum{};
        for (int64_t t = 0; t < taps; ++t) sum = sum + weights[t] * load_up_to(rows[t] + j, length - j);
        put(j, sum, std::min<int64_t>(length - j, kLanes<T>));
      }
  }
}

// Bytes of a row of pixels with all the channels that are worked on at a time.
constexpr int64_t kRowBytes = 16 << 10;

// ---- a strip of output rows of one channel, or of some channels of a channels-last map ------------------------------

template <class S>
class BlurWorker {
  using T = Compute<S>;
  static constexpr int64_t kVector = kLanes<T>;

 public:
  BlurWorker(const BlurCall& call, const std::vector<Gathers<T>>& gathers) : call_(call), gathers_(gathers) {
    block_ = channel_block(call);
    taps_ = call.rows.most_taps;
    for (const BlurMatrix& matrix : call.columns) {
      for (int64_t o = 0; o < call.out_width; ++o) taps_ = std::max(taps_, matrix.begin[o + 1] - matrix.begin[o]);
    }
    const int64_t pixel = call.channels_last ? round_up(block_) : 1;
    slot_size_ = round_up(call.out_width * pixel);
    line_size_ = round_up(call.in_width * pixel);
    lines_ = call.channels_last ? 1 : call.rows.most_loads;
    Arena count;
    place(count);
    bytes_ = count.used();
  }

  static int64_t channel_block(const BlurCall& call) {
    if (!call.channels_last) return 1;
    const int64_t fitting = kRowBytes / static_cast<int64_t>(sizeof(T)) / std::max(call.in_width, call.out_width);
    return std::min(call.channels, std::max(kVector, fitting / kVector * kVector));
  }

  int64_t bytes() const { return bytes_; }

  void bind(std::byte* memory) {
    Arena arena(memory);
    place(arena);
  }

  // The outputs of a strip, of the channels from `channel` on.
  void run(int64_t image, int64_t channel, int64_t strip) {
    image_ = image;
    channel_ = channel;
    channels_ = std::min(block_, call_.channels - channel);
    const BlurSteps& rows = call_.rows;
    const bool gradient = call_.primal != nullptr;
    if (gradient) std::fill_n(scale_sum_, 4 * sums_size(), T{});
    for (int64_t g = rows.strips[strip]; g < rows.strips[strip + 1]; ++g) {
      const BlurSteps::Group& group = rows.groups[g];
      call_.channels_last ? load_pixels(group) : load_rows(group);
      for (int64_t o = group.first; o < group.last; ++o) {
        const int64_t begin = rows.begin[o], taps = rows.begin[o + 1] - begin;
        for (int64_t t = 0; t < taps; ++t) {
          const BlurSteps::Tap& tap = rows.taps[begin + t];
          sources_[t] = slot(tap.slot);
          weights_[t] = static_cast<T>(tap.weight);
        }
        gradient ? write_gradient(o, taps) : write(o, taps);
      }
    }
    if (gradient) write_sums(strip);
  }

 private:
  static int64_t round_up(int64_t n) { return (n + kVector - 1) / kVector * kVector; }
  int64_t sums_size() const { return round_up(std::max(block_, kVector)); }
  T* slot(int64_t s) const { return slots_ + s * slot_size_; }

  void place(Arena& arena) {
    line_ = arena.take<T>(lines_ * line_size_);
    slots_ = arena.take<T>(call_.rows.slots * slot_size_);
    from_ = arena.take<const T*>(call_.rows.most_loads);
    to_ = arena.take<T*>(call_.rows.most_loads);
    sources_ = arena.take<const T*>(taps_);
    pixels_ = arena.take<const T*>(taps_);
    weights_ = arena.take<T>(taps_);
    pixel_weights_ = arena.take<T>(taps_);
    scale_sum_ = arena.take<T>(4 * sums_size());
    if (arena.holds_memory()) {
      shift_sum_ = scale_sum_ + sums_size();
      row_scale_sum_ = shift_sum_ + sums_size();
      row_shift_sum_ = row_scale_sum_ + sums_size();
    }
  }

  const S* input(int64_t row) const {
    const S* in = static_cast<const S*>(call_.in);
    if (call_.channels_last) return in + (image_ * call_.in_height + row) * call_.in_width * call_.channels + channel_;
    return in + ((image_ * call_.channels + channel_) * call_.in_height + row) * call_.in_width;
  }
  int64_t output_offset(int64_t row) const {
    if (call_.channels_last) return (image_ * call_.out_height + row) * call_.out_width * call_.channels + channel_;
    return ((image_ * call_.channels + channel_) * call_.out_height + row) * call_.out_width;
  }

  // Whether the input has a prologue; that of a gradient belongs to what was the input.
  bool has_prologue() const { return call_.primal == nullptr && call_.prologue.any(); }

  // Calls f(z -> activation(z)), with the activation known to the compiler.
  template <class F>
  void with_prologue(F f) const {
    const T temperature = static_cast<T>(call_.prologue.temperature);
    with_activation(has_prologue() ? call_.prologue.activation : BlurActivation::kNone,
                    [&](auto activation) { f([=](Vec<T> z) { return activate<T, activation()>(z, temperature); }); });
  }

  // scale or shift of the channels from `channel_` + c on: one for all lanes of a channels-first row.
  Vec<T> channel_values(const void* values, T otherwise, int64_t c) const {
    if (values == nullptr) return broadcast(otherwise);
    const T* p = static_cast<const T*>(values) + channel_;
    return call_.channels_last ? load_up_to(p + c, channels_ - c) : broadcast(*p);
  }
  Vec<T> scale_of_input(int64_t c) const {
    return channel_values(has_prologue() ? call_.prologue.scale : nullptr, 1, c);
  }
  Vec<T> shift_of_input(int64_t c) const {
    return channel_values(has_prologue() ? call_.prologue.shift : nullptr, 0, c);
  }

  // ---- channels-first rows into slots ----

  void load_rows(const BlurSteps::Group& group) {
    const BlurSteps::Load* loads = call_.rows.loads.data() + group.begin;
    const int64_t rows = group.end - group.begin, width = call_.in_width;
    const bool as_it_is = std::is_same_v<S, T> && !has_prologue();
    if constexpr (std::is_same_v<S, T>) {
      for (int64_t i = 0; as_it_is && i < rows; ++i) from_[i] = input(loads[i].from);
    }
    if (!as_it_is) fill_lines(loads, rows);
    for (int64_t i = 0; i < rows; ++i) to_[i] = slot(loads[i].slot);
    // Loads of the same line of the kernel together.
    for (int64_t first = 0, last; first < rows; first = last) {
      for (last = first + 1; last < rows && loads[last].line == loads[first].line;) ++last;
      const Gathers<T>& gathers = gathers_[loads[first].line];
      const auto apply = [&](auto inputs) { gathers.apply(from_ + first, to_ + first, last - first, inputs); };
      if (width <= kVector) {
        apply([=](const T* row, int64_t) { return TwoVectors<T>{load_up_to(row, width), Vec<T>{}}; });
      } else if (width < 2 * kVector) {
        apply([=](const T* row, int64_t) {
          return TwoVectors<T>{load(row), load_partial(row + kVector, width - kVector)};
        });
      } else {
        apply([=](const T* row, int64_t base) { return TwoVectors<T>{load(row + base), load(row + base + kVector)}; });
      }
    }
  }

  // Rows with the prologue applied, in lines. All of them before any is read: a vector that straddles what was just
  // stored would wait for it.
  void fill_lines(const BlurSteps::Load* loads, int64_t rows) {
    const Vec<T> scale = scale_of_input(0), shift = shift_of_input(0);
    const int64_t width = call_.in_width;
    with_prologue([&](auto activation) {
      for (int64_t i = 0; i < rows; ++i) {
        const S* in = input(loads[i].from);
        T* line = line_ + i * line_size_;
        from_[i] = line;
        for (int64_t x = 0; x < width; x += kVector) {
          store(line + x, activation(load_as_compute_up_to(in + x, width - x) * scale + shift));
        }
      }
    });
  }

  // ---- channels-last rows into slots ----

  void load_pixels(const BlurSteps::Group& group) {
    for (int64_t i = group.begin; i < group.end; ++i) {
      const BlurSteps::Load& wanted = call_.rows.loads[i];
      const T* from = line_;
      int64_t step = round_up(channels_);
      const bool as_it_is = std::is_same_v<S, T> && !has_prologue();
      if constexpr (std::is_same_v<S, T>) {
        if (as_it_is) from = input(wanted.from), step = call_.channels;
      }
      if (!as_it_is) fill_line(wanted.from);
      blur_pixels(from, step, call_.columns[wanted.line], slot(wanted.slot));
    }
  }

  // The row's pixels with the prologue applied, in `line_`.
  void fill_line(int64_t row) {
    const S* in = input(row);
    const int64_t pixel = round_up(channels_);
    with_prologue([&](auto activation) {
      for (int64_t c = 0; c < channels_; c += kVector) {
        const Vec<T> scale = scale_of_input(c), shift = shift_of_input(c);
        for (int64_t x = 0; x < call_.in_width; ++x) {
          const Vec<T> z = load_as_compute_up_to(in + x * call_.channels + c, channels_ - c) * scale + shift;
          store(line_ + x * pixel + c, activation(z));
        }
      }
    });
  }

  // Pixels that are weighted sums of a row's pixels, which lie `step` apart.
  void blur_pixels(const T* from, int64_t step, const BlurMatrix& matrix, T* to) {
    const int64_t pixel = round_up(channels_), outputs = call_.out_width;
    const int64_t* begin = matrix.begin.data();
    for (int64_t o = 0; o < outputs; ++o) {
      const BlurTap* tap = matrix.taps.data() + begin[o];
      const int64_t taps = begin[o + 1] - begin[o];
      for (int64_t t = 0; t < taps; ++t) {
        pixels_[t] = from + tap[t].from * step;
        pixel_weights_[t] = static_cast<T>(tap[t].weight);
      }
      T* at = to + o * pixel;
      combine(pixels_, pixel_weights_, taps, channels_, [=](int64_t c, Vec<T> sum, int64_t) { store(at + c, sum); });
    }
  }

  // ---- rows of the output ----

  // Calls f(offset in the cached rows, offset in the output, length, channel) for the runs that lie together in both.
  template <class F>
  void for_each_run(int64_t row, bool by_pixel, F f) const {
    const int64_t out = output_offset(row), pixel = round_up(channels_);
    if (!call_.channels_last) return f(0, out, call_.out_width);
    if (!by_pixel && channels_ == call_.channels && channels_ == pixel) return f(0, out, call_.out_width * pixel);
    for (int64_t x = 0; x < call_.out_width; ++x) f(x * pixel, out + x * call_.channels, channels_);
  }

  const T* const* sources_at(int64_t offset, int64_t taps) {
    for (int64_t t = 0; t < taps; ++t) pixels_[t] = sources_[t] + offset;
    return pixels_;
  }

  void write(int64_t row, int64_t taps) {
    for_each_run(row, false, [&](int64_t offset, int64_t at, int64_t length) {
      S* to = static_cast<S*>(call_.out) + at;
      combine(sources_at(offset, taps), weights_, taps, length,
              [=](int64_t j, Vec<T> sum, int64_t lanes) { store_as_storage_up_to(to + j, sum, lanes); });
    });
  }

  // The gradient of x from that of u, and what the row adds to those of scale and shift.
  void write_gradient(int64_t row, int64_t taps) {
    const T temperature = static_cast<T>(call_.prologue.temperature);
    Vec<T> scale_sum{}, shift_sum{};  // of a channels-first row
    with_activation(call_.prologue.activation, [&](auto activation) {
      for_each_run(row, true, [&](int64_t offset, int64_t at, int64_t length) {
        const S* primal = static_cast<const S*>(call_.primal) + at;
        S* to = static_cast<S*>(call_.out) + at;
        combine(sources_at(offset, taps), weights_, taps, length, [&](int64_t j, Vec<T> g, int64_t lanes) {
          const Vec<T> x = load_as_compute_up_to(primal + j, lanes);
          const Vec<T> scale = channel_values(call_.prologue.scale, T{1}, j);
          const Vec<T> z = x * scale + channel_values(call_.prologue.shift, T{0}, j);
          const Vec<T> dz = activate_backward<T, activation()>(z, g, temperature);
          store_as_storage_up_to(to + j, dz * scale, lanes);
          if (call_.channels_last) {
            store(row_scale_sum_ + j, load(row_scale_sum_ + j) + dz * x);
            store(row_shift_sum_ + j, load(row_shift_sum_ + j) + dz);
          } else {  // beyond the row, g and x are zero
            scale_sum = scale_sum + dz * x;
            shift_sum = shift_sum + dz;
          }
        });
      });
    });
    if (!call_.channels_last) {
      store(row_scale_sum_, scale_sum);
      store(row_shift_sum_, shift_sum);
    }
    // Row by row: the rounding errors of a sum grow with the number of its terms.
    for (int64_t c = 0; c < 2 * sums_size(); c += kVector) {
      store(scale_sum_ + c, load(scale_sum_ + c) + load(row_scale_sum_ + c));
      store(row_scale_sum_ + c, Vec<T>{});
    }
  }

  void write_sums(int64_t strip) {
    const int64_t at = (image_ * call_.rows.strip_count() + strip) * call_.channels + channel_;
    double *scale = call_.scale_partial + at, *shift = call_.shift_partial + at;
    if (call_.channels_last) {
      std::copy_n(scale_sum_, channels_, scale);
      std::copy_n(shift_sum_, channels_, shift);
    } else {
      *scale = std::accumulate(scale_sum_, scale_sum_ + kVector, 0.0);
      *shift = std::accumulate(shift_sum_, shift_sum_ + kVector, 0.0);
    }
  }

  const BlurCall& call_;
  const std::vector<Gathers<T>>& gathers_;
  int64_t taps_, block_, lines_, line_size_, slot_size_, bytes_;
  T *line_, *slots_, *weights_, *pixel_weights_, *scale_sum_, *shift_sum_, *row_scale_sum_, *row_shift_sum_;
  const T **from_, **sources_, **pixels_;
  T** to_;
  int64_t image_, channel_, channels_;
};

// Enough values for a thread to be worth its start.
constexpr int64_t kBlurGrain = 16384;

void blur(const BlurCall& call) {
  with_storage(call.storage, [&](auto value) {
    using S = decltype(value);
    using Worker = BlurWorker<S>;
    std::vector<Gathers<Compute<S>>> gathers;
    if (!call.channels_last) {
      for (const BlurMatrix& matrix : call.columns) gathers.emplace_back(matrix, call.in_width);
    }
    const int64_t block = Worker::channel_block(call), blocks = (call.channels + block - 1) / block;
    const int64_t strips = call.rows.strip_count();
    const int64_t work = block * (call.out_height / strips + 1) * std::max(call.in_width, call.out_width);
    parallel_for(call.batch * blocks * strips, 1 + kBlurGrain / work, [&](int64_t begin, int64_t end) {
      Worker worker(call, gathers);
      const Scratch scratch(worker.bytes());
      worker.bind(scratch.data());
      for (int64_t task = begin; task < end; ++task) {
        worker.run(task / strips / blocks, task / strips % blocks * block, task % strips);
      }
    });
  });
}

}  // namespace

const BlurKernels blur_kernels = {blur};

}  // namespace vitfast::cpu::VITFAST_ISA
