// Blur pooling and its transpose of channels-last maps, whose rows lie across the vector.
//
// Every row of the input is blurred along its columns once, into a slot: a pixel is a weighted sum of pixels. A row of
// the output is a weighted sum of slots. So nothing but the map itself goes through memory, for any padding: rows that
// reflect at an edge are in a slot anyway. A block of neighbouring pixels goes down all rows before the next one does,
// so that the slots stay in the first level, and still memory is read and written some KiB at a time.
#pragma once

#include "cpu/blur_pool_common.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

template <class S>
class BlurPixels {
  using T = Compute<S>;
  static constexpr int64_t kVector = kLanes<T>;

 public:
  explicit BlurPixels(const BlurCall& call) : call_(call), streamed_(is_streamed<S>(call)) {
    pixel_ = (call.channels + kVector - 1) / kVector * kVector;
    taps_ = call.rows.most_taps;
    for (const BlurMatrix& matrix : call.columns) {
      for (int64_t o = 0; o < call.out_width; ++o) taps_ = std::max(taps_, matrix.begin[o + 1] - matrix.begin[o]);
    }
    for (const BlurBlock& block : call.blocks) {
      slot_size_ = std::max(slot_size_, block.outputs() * pixel_);
      line_size_ = std::max(line_size_, std::max(block.inputs(), block.outputs()) * pixel_);
    }
    Arena count;
    place(count);
    bytes_ = count.used();
  }

  int64_t bytes() const { return bytes_; }

  void bind(std::byte* memory) {
    Arena arena(memory);
    place(arena);
  }

  void run(int64_t image, int64_t strip) {
    image_ = image;
    std::fill_n(scale_sum_, pixel_, T{});
    std::fill_n(shift_sum_, pixel_, T{});
    set_channel_values(call_.prologue.scale, T{1}, scale_);
    set_channel_values(call_.prologue.shift, T{0}, shift_);
    for (const BlurBlock& block : call_.blocks) {
      block_ = &block;
      run_block(strip);
    }
    if (call_.primal != nullptr) write_sums(strip);
  }

 private:
  void run_block(int64_t strip) {
    const BlurSteps& rows = call_.rows;
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
        call_.primal != nullptr ? write_gradient(o, taps) : write(o, taps);
      }
    }
  }

  T* slot(int64_t s) const { return slots_ + s * slot_size_; }

  void place(Arena& arena) {
    line_ = arena.take<T>(line_size_);
    slots_ = arena.take<T>(call_.rows.slots * slot_size_);
    sources_ = arena.take<const T*>(taps_);
    pixels_ = arena.take<const T*>(taps_);
    weights_ = arena.take<T>(taps_);
    pixel_weights_ = arena.take<T>(taps_);
    scale_ = arena.take<T>(pixel_);
    shift_ = arena.take<T>(pixel_);
    scale_sum_ = arena.take<T>(pixel_);
    shift_sum_ = arena.take<T>(pixel_);
  }

  // The pixels of a row that the block needs, and those that it makes.
  const S* input(int64_t row) const {
    const S* in = static_cast<const S*>(call_.in);
    return in + ((image_ * call_.in_height + row) * call_.in_width + block_->from) * call_.channels;
  }
  int64_t output_offset(int64_t row) const {
    return ((image_ * call_.out_height + row) * call_.out_width + block_->first) * call_.channels;
  }

  // Whether the input has a prologue; that of a gradient belongs to what was the input.
  bool has_prologue() const { return call_.primal == nullptr && call_.prologue.any(); }

  // Calls f((x, scale, shift) -> what the prologue makes of x), with the activation known to the compiler.
  template <class F>
  void with_prologue(F f) const {
    if (!has_prologue()) return f([](Vec<T> x, Vec<T>, Vec<T>) { return x; });
    const T temperature = static_cast<T>(call_.prologue.temperature);
    with_activation(call_.prologue.activation, [&](auto activation) {
      f([=](Vec<T> x, Vec<T> scale, Vec<T> shift) {
        return activate<T, activation()>(x * scale + shift, temperature);
      });
    });
  }

  // Calls f(channel, number of vectors, lanes of the last one) for all channels: some that lie together go through all
  // pixels at once, with what belongs to the channels in registers.
  template <class F>
  void for_each_channels(F f) const {
    constexpr int64_t kVectors = 4;
    int64_t c = 0;
    for (; c + kVectors * kVector <= call_.channels; c += kVectors * kVector) {
      f(c, std::integral_constant<int64_t, kVectors>{}, kVector);
    }
    for (; c < call_.channels; c += kVector) {
      f(c, std::integral_constant<int64_t, 1>{}, std::min(kVector, call_.channels - c));
    }
  }

  // The prologue's scale or shift, up to a whole vector.
  void set_channel_values(const void* values, T otherwise, T* to) const {
    std::fill_n(to, pixel_, otherwise);
    if (values != nullptr) std::copy_n(static_cast<const T*>(values), call_.channels, to);
  }

  // ---- rows into slots ----

  void load_pixels(const BlurSteps::Group& group) {
    for (int64_t i = group.begin; i < group.end; ++i) {
      const BlurSteps::Load& wanted = call_.rows.loads[i];
      const T* from = line_;
      int64_t step = pixel_;
      const bool as_it_is = std::is_same_v<S, T> && !has_prologue();
      if constexpr (std::is_same_v<S, T>) {
        if (as_it_is) from = input(wanted.from), step = call_.channels;
      }
      if (!as_it_is) fill_line(wanted.from);
      blur_pixels(from, step, wanted.line, slot(wanted.slot));
    }
  }

  // The row's pixels in `line_`, with the prologue applied if there is one.
  void fill_line(int64_t row) {
    const S* in = input(row);
    with_prologue([&](auto prologue) {
      for_each_channels([&](int64_t c, auto vectors, int64_t lanes) {
        Vec<T> scale[vectors()], shift[vectors()];
        for (int64_t v = 0; v < vectors(); ++v) {
          scale[v] = load(scale_ + c + v * kVector), shift[v] = load(shift_ + c + v * kVector);
        }
        const S* from = in + c;
        T* to = line_ + c;
        for (int64_t x = 0; x < block_->inputs(); ++x, from += call_.channels, to += pixel_) {
          for (int64_t v = 0; v < vectors(); ++v) {
            store(to + v * kVector, prologue(load_as_compute_up_to(from + v * kVector, lanes), scale[v], shift[v]));
          }
        }
      });
    });
  }

  // The block's pixels, weighted sums of those of a row, which begin at `from` and lie `step` apart.
  void blur_pixels(const T* from, int64_t step, int64_t line, T* to) {
    const BlurMatrix& matrix = call_.columns[line];
    for (const BlurSeries& series : block_->series[line]) {
      const int64_t begin = matrix.begin[series.first], taps = matrix.begin[series.first + 1] - begin;
      for (int64_t t = 0; t < taps; ++t) {
        const BlurTap& tap = matrix.taps[begin + t];
        pixels_[t] = from + (tap.from - block_->from) * step;
        pixel_weights_[t] = static_cast<T>(tap.weight);
      }
      // Pixels that follow each other in both are as good as one.
      const bool one = call_.column_period == 1 && series.step == 1 && step == pixel_;
      const int64_t length = one ? series.count * pixel_ : call_.channels;
      const Repeat repeat = one ? Repeat{} : Repeat{series.count, series.step * step, call_.column_period * pixel_};
      T* at = to + (series.first - block_->first) * pixel_;
      combine(pixels_, pixel_weights_, taps, length, repeat, {},
              [=](int64_t place, Vec<T> sum, int64_t) { store(at + place, sum); });
    }
  }

  // ---- rows of the output ----

  void write(int64_t row, int64_t taps) {
    S* to = static_cast<S*>(call_.out) + output_offset(row);
    const int64_t outputs = block_->outputs();
    if (call_.channels != pixel_) {  // pixels lie together in the slots only
      return combine(sources_, weights_, taps, call_.channels, Repeat{outputs, pixel_, call_.channels}, {},
                     [=](int64_t j, Vec<T> sum, int64_t lanes) { store_as_storage_up_to(to + j, sum, lanes); });
    }
    if constexpr (std::is_same_v<S, T>) {
      if (streamed_ && is_aligned(to)) {
        return combine(sources_, weights_, taps, outputs * pixel_,
                       [=](int64_t j, Vec<T> sum, int64_t) { stream(to + j, sum); });
      }
    }
    combine(sources_, weights_, taps, outputs * pixel_,
            [=](int64_t j, Vec<T> sum, int64_t) { store_as_storage(to + j, sum); });
  }

  // The gradient of x from that of u, and what the row adds to those of scale and shift.
  void write_gradient(int64_t row, int64_t taps) {
    const T temperature = static_cast<T>(call_.prologue.temperature);
    const int64_t outputs = block_->outputs(), channels = call_.channels;
    T* grads = line_;
    combine(sources_, weights_, taps, outputs * pixel_, [=](int64_t j, Vec<T> g, int64_t) { store(grads + j, g); });
    const bool streamed = streamed_ && channels == pixel_ && is_aligned(static_cast<const T*>(call_.out));
    const auto put = [streamed](S* p, Vec<T> x, int64_t lanes) {
      if constexpr (std::is_same_v<S, T>) {
        if (streamed) return stream(p, x);
      }
      store_as_storage_up_to(p, x, lanes);
    };
    with_activation(call_.prologue.activation, [&](auto activation) {
      for_each_channels([&](int64_t c, auto vectors, int64_t lanes) {
        // Row by row: the rounding errors of a sum grow with the number of its terms.
        Vec<T> scale[vectors()], shift[vectors()], scale_sum[vectors()], shift_sum[vectors()];
        for (int64_t v = 0; v < vectors(); ++v) {
          scale[v] = load(scale_ + c + v * kVector), shift[v] = load(shift_ + c + v * kVector);
          scale_sum[v] = shift_sum[v] = Vec<T>{};
        }
        const int64_t at = output_offset(row) + c;
        const S* primal = static_cast<const S*>(call_.primal) + at;
        S* to = static_cast<S*>(call_.out) + at;
        const T* grad = grads + c;
        for (int64_t o = 0; o < outputs; ++o, primal += channels, to += channels, grad += pixel_) {
          for (int64_t v = 0; v < vectors(); ++v) {
            const Vec<T> x = load_as_compute_up_to(primal + v * kVector, lanes), g = load(grad + v * kVector);
            const Vec<T> dz = activate_backward<T, activation()>(x * scale[v] + shift[v], g, temperature);
            put(to + v * kVector, dz * scale[v], lanes);
            scale_sum[v] = scale_sum[v] + dz * x;
            shift_sum[v] = shift_sum[v] + dz;
          }
        }
        for (int64_t v = 0; v < vectors(); ++v) {
          T *scales = scale_sum_ + c + v * kVector, *shifts = shift_sum_ + c + v * kVector;
          store(scales, load(scales) + scale_sum[v]);
          store(shifts, load(shifts) + shift_sum[v]);
        }
      });
    });
  }

  void write_sums(int64_t strip) {
    const int64_t at = (image_ * call_.rows.strip_count() + strip) * call_.channels;
    std::copy_n(scale_sum_, call_.channels, call_.scale_partial + at);
    std::copy_n(shift_sum_, call_.channels, call_.shift_partial + at);
  }

  const BlurCall& call_;
  const bool streamed_;
  int64_t pixel_, taps_, bytes_;  // a pixel in the slots: all channels, up to a whole vector
  int64_t line_size_ = 0, slot_size_ = 0;
  T *line_, *slots_, *weights_, *pixel_weights_, *scale_, *shift_, *scale_sum_, *shift_sum_;
  const T **sources_, **pixels_;
  int64_t image_;
  const BlurBlock* block_;
};

template <class S>
void blur_pixels(const BlurCall& call) {
  const int64_t strips = call.rows.strip_count();
  const int64_t work = call.channels * (call.out_height / strips + 1) * std::max(call.in_width, call.out_width);
  parallel_for(call.batch * strips, 1 + kBlurGrain / work, [&](int64_t begin, int64_t end) {
    BlurPixels<S> worker(call);
    const Scratch scratch(worker.bytes());
    worker.bind(scratch.data());
    for (int64_t task = begin; task < end; ++task) worker.run(task / strips, task % strips);
    finish_streaming();
  });
}

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
