// Blur pooling and its transpose of channels-last maps, whose rows lie across the vector.
//
// An output is a weighted sum of columns, and a column one of pixels that lie below each other, in the rows that the
// matrix for rows names. Some channels go along a row of outputs at once: of columns that neighbouring outputs share
// each is computed once. For few taps they are held in registers, and nothing is written but the output; for many, in a
// buffer. A prologue that is dear is applied once, to whole rows, which go into slots.
#pragma once

#include "cpu/blur_pool_common.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// The matrix for rows, in the type that is computed in.
template <class T>
struct BlurRowTaps {
  using Tap = BlurTapOf<T>;  // `at` is in an image or among the slots
  std::vector<int64_t> begin;
  std::vector<Tap> taps;

  // `row_size` values lie between the beginnings of two rows.
  BlurRowTaps(const BlurMatrix& matrix, int64_t row_size) : begin(matrix.begin) {
    for (const BlurTap& tap : matrix.taps) {
      taps.push_back({tap.from * row_size, tap.line, static_cast<T>(tap.weight)});
    }
  }
  const Tap* first(int64_t output) const { return taps.data() + begin[output]; }
  const Tap* last(int64_t output) const { return taps.data() + begin[output + 1]; }
};

// A series of outputs of a row.
template <class T>
struct BlurSlide {
  BlurSeries series;
  bool neighbours;  // whether the taps are neighbours, all of one line
  std::vector<BlurTapOf<T>> taps;
};

template <class T>
inline std::vector<BlurSlide<T>> slides_of(const BlurPlan& plan) {
  std::vector<BlurSlide<T>> slides;
  const BlurMatrix *columns = plan.columns.data(), *end = columns + plan.columns.size();
  for (const BlurSeries& series : series_of(columns, end, 0, plan.out_width, plan.column_period)) {
    BlurSlide<T>& slide = slides.emplace_back();
    slide.series = series;
    slide.neighbours = plan.columns.size() == 1;
    for (const BlurMatrix* line = columns; line < end; ++line) {
      for (int64_t t = 0; t < line->taps_of(series.first); ++t) {
        const BlurTap& tap = line->first_tap(series.first)[t];
        slide.neighbours = slide.neighbours && (t == 0 || tap.from == slide.taps.back().at + 1);
        slide.taps.push_back({tap.from, line - columns, static_cast<T>(tap.weight)});
      }
    }
  }
  return slides;
}

template <class T>
struct BlurPixelTables {
  BlurRowTaps<T> rows;
  std::vector<BlurSlide<T>> slides;

  explicit BlurPixelTables(const BlurPlan& plan)
      : rows(plan.rows.matrix, plan.in_width * plan.channels), slides(slides_of<T>(plan)) {}
};

template <class S>
class BlurPixels {
  using T = Compute<S>;
  static constexpr int64_t kVector = kLanes<T>;
  static constexpr int kVectors = VITFAST_VECTOR_BYTES == 64 ? 4 : 2;  // that go along a row at once

 public:
  explicit BlurPixels(const BlurCall& call)
      : call_(call),
        plan_(call.plan),
        rows_(tables(call).rows),
        slides_(tables(call).slides),
        channels_(call.plan.channels),
        streamed_(is_streamed<S>(call) && channels_ % kVector == 0 && is_aligned(static_cast<const T*>(call.out))),
        from_memory_(comes_from_memory<S>(call)),
        ahead_((call.plan.in_height + call.plan.out_height - 1) / call.plan.out_height * call.plan.in_width *
               channels_),
        activate_(call.prologue),
        scale_(call.prologue.scale, T{1}),
        shift_(call.prologue.shift, T{0}) {
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
    if (call_.scale_partial != nullptr) std::fill_n(sums_, 2 * padded_channels(), T{});
    for (int64_t g = plan_.rows.strips[strip]; g < plan_.rows.strips[strip + 1]; ++g) {
      const BlurRows::Group& group = plan_.rows.groups[g];
      for (int64_t i = group.begin; i < group.end; ++i) prepare(plan_.rows.loads[i]);
      for (int64_t o = group.first; o < group.last; ++o) run_row(o);
    }
    if (call_.scale_partial != nullptr) write_sums(strip);
  }

 private:
  static const BlurPixelTables<T>& tables(const BlurCall& call) {
    return *static_cast<const BlurPixelTables<T>*>(call.plan.tables.get());
  }

  int64_t row_size() const { return plan_.in_width * channels_; }
  int64_t padded_channels() const { return (channels_ + kVector - 1) / kVector * kVector; }

  void place(Arena& arena) {
    slots_ = arena.take<T>(plan_.rows.slots * row_size());
    line_ = arena.take<T>(plan_.in_width * kVectors * kVector);
    sums_ = arena.take<T>(call_.scale_partial == nullptr ? 0 : 2 * padded_channels());
  }

  const S* image() const { return static_cast<const S*>(call_.in) + image_ * plan_.in_height * row_size(); }

  // Calls f(first channel, number of vectors, lanes of the last one) for all channels.
  template <class F>
  void for_each_channels(F f) const {
    int64_t c = 0;
    for (; c + kVectors * kVector <= channels_; c += kVectors * kVector) {
      f(c, std::integral_constant<int, kVectors>{}, kVector);
    }
    for (; c < channels_; c += kVector) f(c, std::integral_constant<int, 1>{}, std::min(kVector, channels_ - c));
  }

  // A row of the input in its slot, with the prologue applied.
  void prepare(const BlurRows::Load& wanted) {
    const S* from = image() + wanted.from * row_size();
    T* to = slots_ + wanted.slot * row_size();
    for (int64_t c = 0; c < channels_; c += kVector) {
      const int64_t lanes = std::min(kVector, channels_ - c);
      const Vec<T> scale = scale_.from(c, lanes), shift = shift_.from(c, lanes);
      for (int64_t at = c; at < row_size(); at += channels_) {
        const Vec<T> x = load_as_compute_up_to(from + at, lanes);
        store_up_to(to + at, activate_.tanh_relu(x * scale + shift), lanes);
      }
    }
  }

  // What some channels of a row of outputs have in common; held in registers, where everything of it is inlined.
  template <BlurMode kMode, int kCount>
  class Channels {
   public:
    VITFAST_INLINE Channels(const BlurPixels& blur, int64_t row, int64_t c, int64_t lanes)
        : activate_(blur.activate_),
          channels_(blur.channels_),
          row_(blur.plan_.out_width * channels_),
          lanes_(lanes),
          streamed_(blur.streamed_),
          from_memory_(blur.from_memory_),
          to_(static_cast<S*>(blur.call_.out) + blur.output_offset(row) + c),
          primal_(is_gradient(kMode) ? static_cast<const S*>(blur.call_.primal) + blur.output_offset(row) + c
                                     : nullptr) {
      if constexpr (!has_scale(kMode)) return;
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        scale_[v] = blur.scale_.from(c + v * kVector, lanes);
        shift_[v] = blur.shift_.from(c + v * kVector, lanes);
        scale_sum_[v] = shift_sum_[v] = Vec<T>{};
      }
    }

    // From the input itself, or from a slot.
    template <class From>
    VITFAST_INLINE Vec<T> load_input(const From* pixel, int v) const {
      const Vec<T> x = load_as_compute_up_to(pixel + v * kVector, lanes());
      if constexpr (kMode == BlurMode::kClamp) return activate_.clamp(x * scale_[v] + shift_[v]);
      return x;
    }

    VITFAST_INLINE void emit(int64_t output, const Vec<T>* sum) {
      const int64_t pixel = output * channels_;
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        S* const to = to_ + pixel + v * kVector;
        if constexpr (is_gradient(kMode)) {
          const S* const primal = primal_ + pixel + v * kVector;
          if (from_memory_) __builtin_prefetch(primal + row_, 0, 2);
          const Vec<T> x = load_as_compute_up_to(primal, lanes());
          const Vec<T> z = x * scale_[v] + shift_[v];
          const Vec<T> dz = activate_.template backward<kMode == BlurMode::kTanhGradient>(z, sum[v]);
          put(to, dz * scale_[v]);
          if constexpr (has_sums(kMode)) {
            scale_sum_[v] = scale_sum_[v] + dz * x;
            shift_sum_[v] = shift_sum_[v] + dz;
          }
        } else {
          put(to, sum[v]);
        }
      }
    }

    VITFAST_INLINE bool from_memory() const { return from_memory_ && kMode != BlurMode::kPrepared; }

    // Adds what the outputs gave to the gradients of scale and shift.
    VITFAST_INLINE void finish(T* scale_sums, T* shift_sums) const {
      if constexpr (has_sums(kMode)) {
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) {
          T *scale = scale_sums + v * kVector, *shift = shift_sums + v * kVector;
          store(scale, load(scale) + scale_sum_[v]);
          store(shift, load(shift) + shift_sum_[v]);
        }
      }
    }

   private:
    VITFAST_INLINE int64_t lanes() const { return kCount == 1 ? lanes_ : kVector; }

    VITFAST_INLINE void put(S* to, Vec<T> x) const {
      if constexpr (std::is_same_v<S, T>) {
        if (streamed_) return stream(to, x);
      }
      store_as_storage_up_to(to, x, lanes());
    }

    const BlurActivate<T> activate_;
    const int64_t channels_, row_, lanes_;
    const bool streamed_, from_memory_;
    S* const to_;
    const S* const primal_;
    Vec<T> scale_[kCount], shift_[kCount], scale_sum_[kCount], shift_sum_[kCount];
  };

  int64_t output_offset(int64_t row) const { return (image_ * plan_.out_height + row) * plan_.out_width * channels_; }

  void run_row(int64_t row) {
    with_mode(call_, [&](auto mode) {
      for_each_channels([&](int64_t c, auto vectors, int64_t lanes) { slide_all<mode(), vectors()>(row, c, lanes); });
    });
  }

  template <BlurMode kMode, int kCount>
  void slide_all(int64_t row, int64_t c, int64_t lanes) const {
    for (const BlurSlide<T>& slide : slides_) {
      if constexpr (has_versions(kMode)) {
        const int64_t taps = static_cast<int64_t>(slide.taps.size());
        const bool few = slide.neighbours && slide.series.count > 1 && taps <= 4;
        switch (few ? 10 * slide.series.step + taps : 0) {
          case 11:
            slide_by<kMode, kCount, 1, 1>(slide, row, c, lanes);
            continue;
          case 12:
            slide_by<kMode, kCount, 2, 1>(slide, row, c, lanes);
            continue;
          case 13:
            slide_by<kMode, kCount, 3, 1>(slide, row, c, lanes);
            continue;
          case 14:
            slide_by<kMode, kCount, 4, 1>(slide, row, c, lanes);
            continue;
          case 23:
            slide_by<kMode, kCount, 3, 2>(slide, row, c, lanes);
            continue;
          case 24:
            slide_by<kMode, kCount, 4, 2>(slide, row, c, lanes);
            continue;
        }
      }
      slide_any<kMode, kCount>(slide, row, c, lanes);
    }
  }

  // Columns that the next output needs as well stay.
  template <BlurMode kMode, int kCount, int kTaps, int kStep>
  void slide_by(const BlurSlide<T>& slide, int64_t row, int64_t c, int64_t lanes) const {
    static_assert(kTaps >= kStep);
    constexpr int kKept = kTaps - kStep;
    Channels<kMode, kCount> channels(*this, row, c, lanes);
    const auto *first = rows_.first(row), *last = rows_.last(row);
    const BlurSeries& series = slide.series;
    const int64_t size = channels_, period = plan_.column_period, end = series.first + series.count * period;
    const auto* from = source<kMode>() + slide.taps[0].at * size + c;
    Vec<T> weight[kTaps], column[kTaps][kCount];
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) weight[t] = broadcast(slide.taps[t].weight);
#pragma GCC unroll 4
    for (int t = 0; t < kKept; ++t) add_pixels<kCount>(from + t * size, first, last, channels, column[t]);
    for (int64_t o = series.first; o < end; o += period, from += kStep * size) {
#pragma GCC unroll 4
      for (int t = kKept; t < kTaps; ++t) add_pixels<kCount>(from + t * size, first, last, channels, column[t]);
      Vec<T> sum[kCount];
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        sum[v] = weight[0] * column[0][v];
#pragma GCC unroll 4
        for (int t = 1; t < kTaps; ++t) sum[v] = sum[v] + weight[t] * column[t][v];
#pragma GCC unroll 4
        for (int t = 0; t < kKept; ++t) column[t][v] = column[t + kStep][v];
      }
      channels.emit(o, sum);
    }
    channels.finish(sums_ + c, sums_ + padded_channels() + c);
  }

  // For any taps. Columns that several outputs share are computed once, into `line_`.
  template <BlurMode kMode, int kCount>
  void slide_any(const BlurSlide<T>& slide, int64_t row, int64_t c, int64_t lanes) const {
    constexpr int64_t kSize = kCount * kVector;  // of a column
    Channels<kMode, kCount> channels(*this, row, c, lanes);
    const auto *first = rows_.first(row), *last = rows_.last(row);
    const BlurSeries& series = slide.series;
    const bool shared = slide.neighbours && series.count > 1 && !slide.taps.empty();
    Vec<T> column[kCount];
    if (shared) {
      const int64_t columns = (series.count - 1) * series.step + static_cast<int64_t>(slide.taps.size());
      for (int64_t x = 0; x < columns; ++x) {
        const auto* from = source<kMode>() + (slide.taps[0].at + x) * channels_ + c;
        add_pixels<kCount>(from, first, last, channels, column);
        for (int v = 0; v < kCount; ++v) store(line_ + x * kSize + v * kVector, column[v]);
      }
    }
    for (int64_t i = 0; i < series.count; ++i) {
      Vec<T> sum[kCount]{};
      for (const auto& tap : slide.taps) {
        if (shared) {
          const T* held = line_ + (tap.at - slide.taps[0].at + i * series.step) * kSize;
          for (int v = 0; v < kCount; ++v) sum[v] = sum[v] + tap.weight * load(held + v * kVector);
          continue;
        }
        const auto* from = source<kMode>() + (tap.at + i * series.step) * channels_ + c;
        const bool one_line = plan_.columns.size() == 1;
        for (const auto* of = first; of < last; of = one_line ? last : of + 1) {
          if (!one_line && of->line != tap.line) continue;
          add_pixels<kCount>(from, of, one_line ? last : of + 1, channels, column);
          for (int v = 0; v < kCount; ++v) sum[v] = sum[v] + tap.weight * column[v];
        }
      }
      channels.emit(series.first + i * plan_.column_period, sum);
    }
    channels.finish(sums_ + c, sums_ + padded_channels() + c);
  }

  template <BlurMode kMode>
  auto source() const {
    if constexpr (kMode == BlurMode::kPrepared) {
      return static_cast<const T*>(slots_);
    } else {
      return image();
    }
  }

  // The weighted sum of pixels that lie below each other, of which that of row 0 lies at `from`.
  template <int kCount, class From, class Tap, class Channels>
  VITFAST_INLINE void add_pixels(const From* from, const Tap* tap, const Tap* last, const Channels& channels,
                                 Vec<T>* column) const {
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) column[v] = Vec<T>{};
    for (; tap < last; ++tap) {
      const From* const pixel = from + tap->at;
      const Vec<T> weight = broadcast(tap->weight);
      if (channels.from_memory() && tap + 2 >= last) {
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) __builtin_prefetch(pixel + ahead_ + v * kVector, 0, 2);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) column[v] = column[v] + weight * channels.load_input(pixel, v);
    }
  }

  void write_sums(int64_t strip) {
    const int64_t at = (image_ * plan_.rows.strip_count() + strip) * channels_;
    std::copy_n(sums_, channels_, call_.scale_partial + at);
    std::copy_n(sums_ + padded_channels(), channels_, call_.shift_partial + at);
  }

  const BlurCall& call_;
  const BlurPlan& plan_;
  const BlurRowTaps<T>& rows_;
  const std::vector<BlurSlide<T>>& slides_;
  const int64_t channels_;
  const bool streamed_, from_memory_;
  const int64_t ahead_;  // from a row of the input to one that is needed soon
  const BlurActivate<T> activate_;
  const BlurChannels<T> scale_, shift_;
  int64_t bytes_, image_;
  T *slots_, *line_, *sums_;
};

template <class S>
void blur_pixels(const BlurCall& call) {
  const BlurPlan& plan = call.plan;
  const int64_t strips = plan.rows.strip_count();
  const int64_t work = plan.channels * (plan.out_height / strips + 1) * std::max(plan.in_width, plan.out_width);
  parallel_for(plan.batch * strips, 1 + kBlurGrain / work, [&](int64_t begin, int64_t end) {
    BlurPixels<S> worker(call);
    const Scratch scratch(worker.bytes());
    worker.bind(scratch.data());
    for (int64_t task = begin; task < end; ++task) worker.run(task / strips, task % strips);
    finish_streaming();
  });
}

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
