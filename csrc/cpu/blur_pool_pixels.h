// Blur pooling and its transpose of channels-last maps, whose rows lie across the vector.
//
// Every row of the input is blurred along its columns once, into a slot: a pixel is a weighted sum of pixels. A row of
// the output is a weighted sum of slots. So nothing but the map itself goes through memory, for any padding: rows that
// reflect at an edge are in a slot anyway. Some channels at a time, so that the slots stay in the caches.
#pragma once

#include "cpu/blur_pool_common.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// Bytes of a row of pixels with all the channels that are worked on at a time: some rows fit into the second level. Few
// channels at a time would leave gaps between what is read, which costs more than misses of the first level.
constexpr int64_t kRowBytes = 64 << 10;

template <class S>
class BlurPixels {
  using T = Compute<S>;
  static constexpr int64_t kVector = kLanes<T>;

 public:
  explicit BlurPixels(const BlurCall& call) : call_(call) {
    block_ = channel_block(call);
    taps_ = call.rows.most_taps;
    for (const BlurMatrix& matrix : call.columns) {
      for (int64_t o = 0; o < call.out_width; ++o) taps_ = std::max(taps_, matrix.begin[o + 1] - matrix.begin[o]);
    }
    slot_size_ = call.out_width * round_up(block_);
    line_size_ = call.in_width * round_up(block_);
    Arena count;
    place(count);
    bytes_ = count.used();
  }

  static int64_t channel_block(const BlurCall& call) {
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
    set_channel_values(call_.prologue.scale, T{1}, scale_);
    set_channel_values(call_.prologue.shift, T{0}, shift_);
    for (int64_t g = rows.strips[strip]; g < rows.strips[strip + 1]; ++g) {
      const BlurSteps::Group& group = rows.groups[g];
      load_pixels(group);
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
  int64_t sums_size() const { return round_up(block_); }
  T* slot(int64_t s) const { return slots_ + s * slot_size_; }

  void place(Arena& arena) {
    line_ = arena.take<T>(line_size_);
    slots_ = arena.take<T>(call_.rows.slots * slot_size_);
    sources_ = arena.take<const T*>(taps_);
    pixels_ = arena.take<const T*>(taps_);
    weights_ = arena.take<T>(taps_);
    pixel_weights_ = arena.take<T>(taps_);
    scale_ = arena.take<T>(round_up(block_));
    shift_ = arena.take<T>(round_up(block_));
    scale_sum_ = arena.take<T>(4 * sums_size());
    if (arena.holds_memory()) {
      shift_sum_ = scale_sum_ + sums_size();
      row_scale_sum_ = shift_sum_ + sums_size();
      row_shift_sum_ = row_scale_sum_ + sums_size();
    }
  }

  const S* input(int64_t row) const {
    const S* in = static_cast<const S*>(call_.in);
    return in + (image_ * call_.in_height + row) * call_.in_width * call_.channels + channel_;
  }
  int64_t output_offset(int64_t row) const {
    return (image_ * call_.out_height + row) * call_.out_width * call_.channels + channel_;
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

  // The prologue's scale or shift of the channels at work, up to a whole vector.
  void set_channel_values(const void* values, T otherwise, T* to) const {
    std::fill_n(to, round_up(channels_), otherwise);
    if (values != nullptr) std::copy_n(static_cast<const T*>(values) + channel_, channels_, to);
  }

  // ---- rows into slots ----

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

  // The row's pixels in `line_`, with the prologue applied if there is one.
  void fill_line(int64_t row) {
    const S* in = input(row);
    const int64_t pixel = round_up(channels_), channels = channels_;
    T* line = line_;
    with_prologue([&](auto activation) {
      for (int64_t x = 0; x < call_.in_width; ++x, in += call_.channels, line += pixel) {
        for (int64_t c = 0; c < channels; c += kVector) {
          Vec<T> z = load_as_compute_up_to(in + c, channels - c);
          if (has_prologue()) z = z * load(scale_ + c) + load(shift_ + c);
          store(line + c, activation(z));
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
      combine(pixels_, pixel_weights_, taps, channels_, {},
              [=](int64_t, int64_t c, Vec<T> sum, int64_t) { store(at + c, sum); });
    }
  }

  // ---- rows of the output ----

  // Calls f(offset in the cached rows, offset in the output, length, channel) for the runs that lie together in both.
  template <class F>
  void for_each_run(int64_t row, bool by_pixel, F f) const {
    const int64_t out = output_offset(row), pixel = round_up(channels_);
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
      combine(sources_at(offset, taps), weights_, taps, length, {},
              [=](int64_t, int64_t j, Vec<T> sum, int64_t lanes) { store_as_storage_up_to(to + j, sum, lanes); });
    });
  }

  // The gradient of x from that of u, and what the row adds to those of scale and shift.
  void write_gradient(int64_t row, int64_t taps) {
    const T temperature = static_cast<T>(call_.prologue.temperature);
    with_activation(call_.prologue.activation, [&](auto activation) {
      for_each_run(row, true, [&](int64_t offset, int64_t at, int64_t length) {
        const S* primal = static_cast<const S*>(call_.primal) + at;
        S* to = static_cast<S*>(call_.out) + at;
        combine(sources_at(offset, taps), weights_, taps, length, {}, [&](int64_t, int64_t j, Vec<T> g, int64_t lanes) {
          const Vec<T> x = load_as_compute_up_to(primal + j, lanes);
          const Vec<T> scale = load(scale_ + j), z = x * scale + load(shift_ + j);
          const Vec<T> dz = activate_backward<T, activation()>(z, g, temperature);
          store_as_storage_up_to(to + j, dz * scale, lanes);
          store(row_scale_sum_ + j, load(row_scale_sum_ + j) + dz * x);
          store(row_shift_sum_ + j, load(row_shift_sum_ + j) + dz);
        });
      });
    });
    // Row by row: the rounding errors of a sum grow with the number of its terms.
    for (int64_t c = 0; c < 2 * sums_size(); c += kVector) {
      store(scale_sum_ + c, load(scale_sum_ + c) + load(row_scale_sum_ + c));
      store(row_scale_sum_ + c, Vec<T>{});
    }
  }

  void write_sums(int64_t strip) {
    const int64_t at = (image_ * call_.rows.strip_count() + strip) * call_.channels + channel_;
    double *scale = call_.scale_partial + at, *shift = call_.shift_partial + at;
    std::copy_n(scale_sum_, channels_, scale);
    std::copy_n(shift_sum_, channels_, shift);
  }

  const BlurCall& call_;
  int64_t taps_, block_, line_size_, slot_size_, bytes_;
  T *line_, *slots_, *weights_, *pixel_weights_, *scale_, *shift_, *scale_sum_, *shift_sum_, *row_scale_sum_,
      *row_shift_sum_;
  const T **sources_, **pixels_;
  int64_t image_, channel_, channels_;
};

template <class S>
void blur_pixels(const BlurCall& call) {
  using Worker = BlurPixels<S>;
  const int64_t block = Worker::channel_block(call), blocks = (call.channels + block - 1) / block;
  const int64_t strips = call.rows.strip_count();
  const int64_t work = block * (call.out_height / strips + 1) * std::max(call.in_width, call.out_width);
  parallel_for(call.batch * blocks * strips, 1 + kBlurGrain / work, [&](int64_t begin, int64_t end) {
    Worker worker(call);
    const Scratch scratch(worker.bytes());
    worker.bind(scratch.data());
    for (int64_t task = begin; task < end; ++task) {
      worker.run(task / strips / blocks, task / strips % blocks * block, task % strips);
    }
  });
}

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
