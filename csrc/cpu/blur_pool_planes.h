// Blur pooling and its transpose of channels-first maps, whose rows lie along the vector.
//
// Some planes at a time, or a strip of a larger one, go from their input over buffers in the first level to their
// output. Rows are combined first, by whole vectors, and what they give is blurred along its columns. Kernels that are
// no outer product blur columns first, once for each of their lines.
#pragma once

#include "cpu/blur_pool_columns.h"
#include "cpu/blur_pool_common.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

template <class S>
class BlurPlanes {
  using T = Compute<S>;
  static constexpr int64_t kVector = kLanes<T>;

 public:
  BlurPlanes(const BlurCall& call, const std::vector<BlurColumns<T>>& columns)
      : call_(call),
        columns_(columns),
        rows_first_(columns.size() == 1),
        streamed_(is_streamed<S>(call)),
        buffered_(streamed_ || call.primal != nullptr) {
    planes_ = planes_at_a_time(call);
    for (const BlurColumns<T>& line : columns) {
      before_ = std::max(before_, line.before());
      after_ = std::max(after_, line.after());
    }
    Arena count;
    place(count);
    bytes_ = count.used();
  }

  // As many as keep the buffers in the first level.
  static int64_t planes_at_a_time(const BlurCall& call) {
    if (call.strips.strips.size() > 1) return 1;
    const int64_t largest = std::max(call.in_height * call.in_width, call.out_height * call.out_width);
    return std::clamp<int64_t>(kStripValues / largest, 1, std::max<int64_t>(call.batch * call.channels, 1));
  }

  int64_t bytes() const { return bytes_; }

  void bind(std::byte* memory) {
    Arena arena(memory);
    place(arena);
  }

  void run(int64_t plane, int64_t planes, int64_t strip) {
    strip_number_ = strip;
    strip_ = &call_.strips.strips[strip];
    plane_ = plane;
    const T* in = input(planes);
    if (!buffered_) return blur(in, planes, output(plane));
    blur(in, planes, result_);
    const int64_t size = strip_->outputs() * call_.out_width;
    if (call_.primal != nullptr) {
      for (int64_t p = 0; p < planes; ++p) write_gradient(plane + p, result_ + p * size);
    }
    if constexpr (std::is_same_v<S, T>) {
      if (streamed_) stream_copy(result_, planes * size, output(plane));
    }
  }

 private:
  int64_t line_size() const { return planes_ * call_.strips.most_rows * call_.out_width; }

  void place(Arena& arena) {
    const int64_t rows = planes_ * call_.strips.most_rows, outputs = planes_ * call_.strips.most_outputs;
    input_ = arena.take<T>(before_ + rows * call_.in_width + after_);
    combined_ = arena.take<T>(rows_first_ ? before_ + outputs * call_.in_width + after_ : before_);
    blurred_ = arena.take<T>(rows_first_ ? 0 : static_cast<int64_t>(columns_.size()) * line_size());
    result_ = arena.take<T>(buffered_ ? outputs * call_.out_width : 0);
    sources_ = arena.take<const T*>(call_.strips.most_taps);
    weights_ = arena.take<T>(call_.strips.most_taps);
    if (arena.holds_memory()) {
      input_ += before_;
      combined_ += before_;
    }
  }

  // The strip of some planes, whose rows begin at `in`.
  template <class To>
  void blur(const T* in, int64_t planes, To* to) const {
    if (rows_first_) {
      combine_rows(in, call_.in_width, planes, combined_);
      return columns_[0].apply(combined_, planes * strip_->outputs(), to);
    }
    for (size_t line = 0; line < columns_.size(); ++line) {
      columns_[line].apply(in, planes * strip_->rows, blurred_ + static_cast<int64_t>(line) * line_size());
    }
    combine_rows(blurred_, call_.out_width, planes, to);
  }

  S* output(int64_t plane) const {
    return static_cast<S*>(call_.out) + (plane * call_.out_height + strip_->first) * call_.out_width;
  }

  // The rows that the strip needs, of all planes: where they lie, or with the prologue applied in a buffer.
  const T* input(int64_t planes) {
    const int64_t plane_size = call_.in_height * call_.in_width, runs = static_cast<int64_t>(strip_->runs.size());
    const S* all = static_cast<const S*>(call_.in);
    const bool prologue = call_.primal == nullptr && call_.prologue.any();
    if constexpr (std::is_same_v<S, T>) {
      // Several planes lie together where the strip is all of a plane.
      const bool together = runs == 1 && (planes == 1 || strip_->rows == call_.in_height);
      const S* first = all + plane_ * plane_size + (runs > 0 ? strip_->runs[0].from * call_.in_width : 0);
      if (!prologue && together && rows_first_) return first;  // else more than the rows is read
    }
    T* to = input_;
    const T temperature = static_cast<T>(call_.prologue.temperature);
    with_activation(prologue ? call_.prologue.activation : BlurActivation::kNone, [&](auto activation) {
      for (int64_t p = plane_; p < plane_ + planes; ++p) {
        const Vec<T> scale = per_plane(prologue ? call_.prologue.scale : nullptr, T{1}, p);
        const Vec<T> shift = per_plane(prologue ? call_.prologue.shift : nullptr, T{0}, p);
        for (const BlurStrip::Run& run : strip_->runs) {
          const S* from = all + p * plane_size + run.from * call_.in_width;
          const int64_t length = run.rows * call_.in_width, whole = length / kVector * kVector;
          for (int64_t j = 0; j < whole; j += kVector) {
            store(to + j, activate<T, activation()>(load_as_compute(from + j) * scale + shift, temperature));
          }
          if (whole < length) {
            const Vec<T> z = load_as_compute_up_to(from + whole, length - whole) * scale + shift;
            store(to + whole, activate<T, activation()>(z, temperature));
          }
          to += length;
        }
      }
    });
    return input_;
  }

  Vec<T> per_plane(const void* values, T otherwise, int64_t plane) const {
    return broadcast(values == nullptr ? otherwise : static_cast<const T*>(values)[plane % call_.channels]);
  }

  // Every output row of the strip, a weighted sum of rows of `from`, into rows of `to` that follow each other.
  template <class To>
  void combine_rows(const T* from, int64_t width, int64_t planes, To* to) const {
    const BlurStrips& strips = call_.strips;
    const Repeat plane{planes, strip_->rows * width, strip_->outputs() * width};
    for (int64_t s = strip_->first_series; s < strip_->last_series; ++s) {
      const BlurSeries& series = strips.series[s];
      const BlurTap* tap = strips.matrix.taps.data() + strips.matrix.begin[series.first];
      const int64_t taps = strips.matrix.begin[series.first + 1] - strips.matrix.begin[series.first];
      for (int64_t t = 0; t < taps; ++t) {
        sources_[t] = from + tap[t].from * width + tap[t].line * line_size();
        weights_[t] = static_cast<T>(tap[t].weight);
      }
      To* const out = to + (series.first - strip_->first) * width;
      // Rows that follow each other in both are as good as one.
      const bool one = strips.period == 1 && series.step == 1;
      const int64_t length = one ? series.count * width : width;
      const Repeat row = one ? Repeat{} : Repeat{series.count, series.step * width, strips.period * width};
      combine(sources_, weights_, taps, length, row, plane,
              [=](int64_t at, Vec<T> sum, int64_t lanes) { store_as_storage_up_to(out + at, sum, lanes); });
    }
  }

  // The gradient of x from that of u, over it if it is streamed, and what the strip of a plane adds to those of scale
  // and shift.
  void write_gradient(int64_t plane, T* grad) const {
    const int64_t length = strip_->outputs() * call_.out_width;
    const S* primal = static_cast<const S*>(call_.primal) + (output(plane) - static_cast<S*>(call_.out));
    S* to = output(plane);
    const Vec<T> scale = per_plane(call_.prologue.scale, T{1}, plane),
                 shift = per_plane(call_.prologue.shift, T{0}, plane);
    const T temperature = static_cast<T>(call_.prologue.temperature);
    double scale_sum = 0, shift_sum = 0;
    with_activation(call_.prologue.activation, [&](auto activation) {
      // Some at a time: the rounding errors of a sum grow with the number of its terms.
      constexpr int64_t kTerms = 32 * kVector;
      for (int64_t begin = 0; begin < length; begin += kTerms) {
        const int64_t end = std::min(begin + kTerms, length);
        Vec<T> scale_part{}, shift_part{};
        const auto step = [&](int64_t j, int64_t lanes) {
          const Vec<T> x = load_as_compute_up_to(primal + j, lanes), g = load_up_to(grad + j, lanes);
          const Vec<T> dz = activate_backward<T, activation()>(x * scale + shift, g, temperature);
          streamed_ ? store_up_to(grad + j, dz * scale, lanes) : store_as_storage_up_to(to + j, dz * scale, lanes);
          scale_part = scale_part + dz * x;  // beyond the end, g and x are zero
          shift_part = shift_part + dz;
        };
        int64_t j = begin;
        for (; j + kVector <= end; j += kVector) step(j, kVector);
        if (j < end) step(j, end - j);
        scale_sum += static_cast<double>(sum_of_lanes<T>(scale_part));
        shift_sum += static_cast<double>(sum_of_lanes<T>(shift_part));
      }
    });
    const int64_t image = plane / call_.channels, channel = plane % call_.channels;
    const int64_t at = (image * call_.strip_count() + strip_number_) * call_.channels + channel;
    call_.scale_partial[at] = scale_sum;
    call_.shift_partial[at] = shift_sum;
  }

  const BlurCall& call_;
  const std::vector<BlurColumns<T>>& columns_;
  const bool rows_first_, streamed_, buffered_;
  int64_t planes_, bytes_, before_ = 0, after_ = 0;
  T *input_, *combined_, *blurred_, *result_, *weights_;
  const T** sources_;
  const BlurStrip* strip_;
  int64_t strip_number_, plane_;
};

template <class S>
void blur_planes(const BlurCall& call) {
  std::vector<BlurColumns<Compute<S>>> columns;
  for (size_t line = 0; line < call.columns.size(); ++line) columns.emplace_back(call, line);
  const int64_t planes = call.batch * call.channels, at_a_time = BlurPlanes<S>::planes_at_a_time(call);
  const int64_t strips = call.strip_count(), chunks = (planes + at_a_time - 1) / at_a_time;
  const int64_t work = at_a_time * (call.out_height / strips + 1) * std::max(call.in_width, call.out_width);
  parallel_for(chunks * strips, 1 + kBlurGrain / work, [&](int64_t begin, int64_t end) {
    BlurPlanes<S> worker(call, columns);
    const Scratch scratch(worker.bytes());
    worker.bind(scratch.data());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / strips * at_a_time;
      worker.run(plane, std::min(at_a_time, planes - plane), task % strips);
    }
    finish_streaming();
  });
}

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
