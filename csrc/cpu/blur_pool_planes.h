// Blur pooling and its transpose of channels-first maps, whose rows lie along the vector.
//
// Some outputs of a row, up to two vectors of them, depend on columns that fit into two vectors: a window. The rows
// that an output needs are added up there, and then each output picks its columns from the two vectors, by shuffles
// whose lanes and weights hold padding, stride and transposition. Where two rows of outputs fit into a vector, its
// halves are the rows of outputs, and the two vectors of the window theirs. Buffers there are for a prologue that is
// dear, whose rows go into slots, and for results that are written past the caches.
#pragma once

#include "cpu/blur_pool_common.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// ---- weighted lanes ------------------------------------------------------------------------------------------------

#if VITFAST_VECTOR_BYTES == 64
template <class T>
using LaneMask = std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8>;
#else
template <class T>
using LaneMask = IntVec<T>;
#endif

// The lanes in which x is not negative.
template <class T>
inline LaneMask<T> not_negative(IntVec<T> x) {
#if VITFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmpge_epi32_mask((__m512i)x, __m512i{});
  } else {
    return _mm512_cmpge_epi64_mask((__m512i)x, __m512i{});
  }
#else
  return x >= 0;
#endif
}

// sum + weight * x in the lanes of the mask, sum in the others.
template <class T>
inline Vec<T> add_where(LaneMask<T> mask, Vec<T> sum, Vec<T> weight, Vec<T> x) {
#if VITFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_mask3_fmadd_ps((__m512)weight, (__m512)x, (__m512)sum, mask);
  } else {
    return (Vec<T>)_mm512_mask3_fmadd_pd((__m512d)weight, (__m512d)x, (__m512d)sum, mask);
  }
#else
  return mask ? sum + weight * x : sum;
#endif
}

// The first lanes of a vector, as many as `count`; with AVX-512 the mask is made once.
template <class T>
class FirstLanes {
 public:
  explicit FirstLanes(int64_t count) : count_(std::clamp<int64_t>(count, 0, kLanes<T>)) {
#if VITFAST_VECTOR_BYTES == 64
    mask_ = static_cast<LaneMask<T>>((1u << count_) - 1);
#endif
  }

  template <class S>
  VITFAST_INLINE Vec<T> load(const S* p) const {
#if VITFAST_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<S, float>) return (Vec<T>)_mm512_maskz_loadu_ps(mask_, p);
    if constexpr (std::is_same_v<S, double>) return (Vec<T>)_mm512_maskz_loadu_pd(mask_, p);
    if constexpr (sizeof(S) == 2) return widen<S>((HalfBits)_mm256_maskz_loadu_epi16(mask_, p));
#else
    return load_as_compute_up_to(p, count_);
#endif
  }

  template <class S>
  VITFAST_INLINE void store(S* p, Vec<T> x) const {
#if VITFAST_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<S, float>) return _mm512_mask_storeu_ps(p, mask_, (__m512)x);
    if constexpr (std::is_same_v<S, double>) return _mm512_mask_storeu_pd(p, mask_, (__m512d)x);
    if constexpr (sizeof(S) == 2) return _mm256_mask_storeu_epi16(p, mask_, (__m256i)narrow<S>(x));
#else
    store_as_storage_up_to(p, x, count_);
#endif
  }

 private:
  int64_t count_;
#if VITFAST_VECTOR_BYTES == 64
  LaneMask<T> mask_;
#endif
};

// ---- windows -------------------------------------------------------------------------------------------------------

// The most vectors of outputs that a window has.
constexpr int kMostGroups = 2;

// What each output of a window takes of its columns, and how much of it; a negative column is none.
template <class T>
struct BlurPick {
  static constexpr int kOutputs = kMostGroups * kLanes<T>;
  typename VecOf<T>::Int column[kOutputs];
  T weight[kOutputs] = {};

  BlurPick() { std::fill_n(column, kOutputs, -1); }
  IntVec<T> columns(int64_t group) const {
    IntVec<T> columns;
    std::memcpy(&columns, column + group * kLanes<T>, sizeof(columns));
    return columns;
  }
  Vec<T> weights(int64_t group) const { return load(weight + group * kLanes<T>); }
};

enum class BlurWindowKind {
  kOne,   // the columns fit into a vector
  kTwo,   // they fit into two
  kPair,  // two rows of outputs, the columns of each in a vector
  kAny,   // columns of a single output that lie further apart
};

template <class T>
struct BlurWindow {
  BlurWindowKind kind;
  int64_t first, outputs;  // of a row
  int64_t from, columns;
  int64_t most_taps;                            // of an output, along a line
  std::vector<std::vector<BlurPick<T>>> picks;  // of each line, one for each tap; but for kAny

  int64_t groups() const { return (outputs + kLanes<T> - 1) / kLanes<T>; }
};

// Windows of at most `columns` columns and `outputs` outputs, without their picks.
template <class T>
inline std::vector<BlurWindow<T>> windows_up_to(const BlurPlan& plan, int64_t columns, int64_t outputs) {
  using Kind = BlurWindowKind;
  std::vector<BlurWindow<T>> windows;
  for (int64_t first = 0; first < plan.out_width;) {
    BlurWindow<T> window{Kind::kOne, first, 0, 0, 0, 0, {}};
    for (int64_t o = first; o < std::min(first + outputs, plan.out_width); ++o, ++window.outputs) {
      int64_t from = window.from, until = from + window.columns;
      for (const BlurMatrix& line : plan.columns) {
        for (int64_t i = line.begin[o]; i < line.begin[o + 1]; ++i) {
          const int64_t column = line.taps[i].from;
          from = from < until ? std::min(from, column) : column;
          until = std::max(until, column + 1);
        }
      }
      if (until - from > columns && o > first) break;
      window.from = from, window.columns = until - from;
    }
    if (window.columns > kLanes<T>) window.kind = Kind::kTwo;
    if (window.columns > 2 * kLanes<T>) window.kind = Kind::kAny;
    const bool whole = window.outputs == plan.out_width && plan.row_period == 1;
    if (whole && window.kind == Kind::kOne && 2 * window.outputs <= kLanes<T>) window.kind = Kind::kPair;
    first += window.outputs;
    windows.push_back(std::move(window));
  }
  return windows;
}

// About how many cycles a row of outputs takes. Windows go down all rows one after the other, so that each touches
// memory anew: that costs as much as several instructions.
template <class T>
inline int64_t cost_of(const std::vector<BlurWindow<T>>& windows, int64_t row_taps, int64_t column_taps) {
  int64_t cost = 0;
  for (const BlurWindow<T>& window : windows) {
    const int64_t vectors = (window.columns + kLanes<T> - 1) / kLanes<T>;
    cost += 6 + 2 * row_taps * vectors + 2 * column_taps * window.groups();
  }
  return cost;
}

template <class T>
inline std::vector<BlurWindow<T>> windows_of(const BlurPlan& plan) {
  constexpr int64_t kVector = kLanes<T>;
  const auto average_taps = [](const BlurMatrix& matrix) {
    return (static_cast<int64_t>(matrix.taps.size()) + matrix.outputs() - 1) / matrix.outputs();
  };
  const int64_t row_taps = average_taps(plan.rows.matrix), column_taps = average_taps(plan.columns[0]);
  std::vector<BlurWindow<T>> windows;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const int64_t columns : {kVector, 2 * kVector}) {
    for (const int64_t outputs : {kVector, kMostGroups * kVector}) {
      std::vector<BlurWindow<T>> other = windows_up_to<T>(plan, columns, outputs);
      const int64_t cost = cost_of(other, row_taps, column_taps);
      if (cost < least) least = cost, windows = std::move(other);
    }
  }
  for (BlurWindow<T>& window : windows) {
    if (window.kind == BlurWindowKind::kAny) continue;
    for (const BlurMatrix& line : plan.columns) {
      std::vector<BlurPick<T>>& picks = window.picks.emplace_back();
      for (int64_t j = 0; j < window.outputs; ++j) {
        const int64_t begin = line.begin[window.first + j], taps = line.taps_of(window.first + j);
        if (static_cast<int64_t>(picks.size()) < taps) picks.resize(taps);
        for (int64_t t = 0; t < taps; ++t) {
          const BlurTap& tap = line.taps[begin + t];
          const auto set = [&](int64_t output, int64_t column) {
            picks[t].column[output] = static_cast<typename VecOf<T>::Int>(column);
            picks[t].weight[output] = static_cast<T>(tap.weight);
          };
          set(j, tap.from - window.from);
          if (window.kind == BlurWindowKind::kPair) set(j + window.outputs, tap.from - window.from + kVector);
        }
      }
      window.most_taps = std::max(window.most_taps, static_cast<int64_t>(picks.size()));
    }
  }
  return windows;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// A series of rows of outputs of a strip.
template <class T>
struct BlurRun {
  BlurSeries series;
  int64_t step;                    // from the rows of an output to those of the next
  std::vector<BlurTapOf<T>> taps;  // `at` is in a plane or among the slots
};

template <class T>
inline std::vector<BlurRun<T>> runs_of(const BlurPlan& plan, const BlurRows::Group& group) {
  std::vector<BlurRun<T>> runs;
  const BlurMatrix& matrix = plan.rows.matrix;
  for (const BlurSeries& series : series_of(&matrix, &matrix + 1, group.first, group.last, plan.row_period)) {
    BlurRun<T>& run = runs.emplace_back();
    run.series = series;
    run.step = series.step * plan.in_width;
    for (int64_t t = 0; t < matrix.taps_of(series.first); ++t) {
      const BlurTap& tap = matrix.first_tap(series.first)[t];
      run.taps.push_back({tap.from * plan.in_width, tap.line, static_cast<T>(tap.weight)});
    }
  }
  return runs;
}

template <class T>
struct BlurPlaneTables {
  std::vector<std::vector<BlurRun<T>>> runs;  // of each strip
  std::vector<BlurWindow<T>> windows;

  explicit BlurPlaneTables(const BlurPlan& plan) : windows(windows_of<T>(plan)) {
    for (const BlurRows::Group& group : plan.rows.groups) runs.push_back(runs_of<T>(plan, group));
  }
};

template <class S>
class BlurPlanes {
  using T = Compute<S>;
  using Run = BlurRun<T>;
  using Kind = BlurWindowKind;
  static constexpr int64_t kVector = kLanes<T>;

 public:
  explicit BlurPlanes(const BlurCall& call)
      : call_(call),
        plan_(call.plan),
        tables_(*static_cast<const BlurPlaneTables<T>*>(call.plan.tables.get())),
        streamed_(is_streamed<S>(call)),
        from_memory_(comes_from_memory<S>(call)),
        planes_(planes_at_a_time(call.plan)),
        activate_(call.prologue),
        scale_(call.prologue.scale, T{1}),
        shift_(call.prologue.shift, T{0}) {
    for (const BlurRows::Group& group : call.plan.rows.groups) {
      most_outputs_ = std::max(most_outputs_, (group.last - group.first) * call.plan.out_width);
    }
    Arena count;
    place(count);
    bytes_ = count.used();
  }

  // As many as stay in the first level while the windows go over them; one, where a strip is not all of a plane.
  static int64_t planes_at_a_time(const BlurPlan& plan) {
    if (plan.rows.strip_count() > 1) return 1;
    const int64_t largest = std::max(plan.in_height * plan.in_width, plan.out_height * plan.out_width);
    return std::clamp<int64_t>(kStripValues / largest, 1, std::max<int64_t>(plan.batch * plan.channels, 1));
  }

  int64_t bytes() const { return bytes_; }

  void bind(std::byte* memory) {
    Arena arena(memory);
    place(arena);
  }

  // The strip, which has one group of rows, of the planes from `begin` to `end`.
  void run(int64_t begin, int64_t end, int64_t strip) {
    strip_ = strip;
    group_ = &plan_.rows.groups[strip];
    runs_ = &tables_.runs[strip];
    begin_ = begin, end_ = end;
    for (int64_t plane = begin; plane < end; ++plane) {
      for (int64_t i = group_->begin; i < group_->end; ++i) prepare(plane, plan_.rows.loads[i]);
      if (call_.scale_partial != nullptr) call_.scale_partial[partial(plane)] = call_.shift_partial[partial(plane)] = 0;
    }
    for (const BlurWindow<T>& window : tables_.windows) {
      with_mode(call_, [&](auto mode) { run_window<mode()>(window); });
    }
    if constexpr (std::is_same_v<S, T>) {
      if (!streamed_) return;
      const int64_t outputs = (end - begin) * (group_->last - group_->first) * plan_.out_width;
      stream_copy(buffer_, outputs, static_cast<S*>(call_.out) + output_offset(begin));
    }
  }

 private:
  void place(Arena& arena) {
    slots_ = arena.take<T>(planes_ * plan_.rows.slots * plan_.in_width);
    buffer_ = arena.take<S>(streamed_ ? planes_ * most_outputs_ : 0);
  }

  const S* input(int64_t plane) const {
    return static_cast<const S*>(call_.in) + plane * plan_.in_height * plan_.in_width;
  }
  T* slots(int64_t plane) const { return slots_ + (plane - begin_) * plan_.rows.slots * plan_.in_width; }
  template <BlurMode kMode>
  auto source(int64_t plane) const {
    if constexpr (kMode == BlurMode::kPrepared) {
      return static_cast<const T*>(slots(plane));
    } else {
      return input(plane);
    }
  }

  // Where the strip of a plane begins in the output, and where what it adds to the gradients of scale and shift lies.
  int64_t output_offset(int64_t plane) const { return (plane * plan_.out_height + group_->first) * plan_.out_width; }
  int64_t partial(int64_t plane) const {
    return (plane / plan_.channels * plan_.rows.strip_count() + strip_) * plan_.channels + plane % plan_.channels;
  }

  // A row of the input in its slot, with the prologue applied.
  void prepare(int64_t plane, const BlurRows::Load& wanted) {
    const S* from = input(plane) + wanted.from * plan_.in_width;
    T* to = slots(plane) + wanted.slot * plan_.in_width;
    const Vec<T> scale = scale_.of(plane % plan_.channels), shift = shift_.of(plane % plan_.channels);
    for (int64_t j = 0; j < plan_.in_width; j += kVector) {
      const Vec<T> x = load_as_compute_up_to(from + j, plan_.in_width - j);
      store_up_to(to + j, activate_.tanh_relu(x * scale + shift), plan_.in_width - j);
    }
  }

  // What the outputs of a strip of a plane have in common; held in registers, where everything of it is inlined.
  template <BlurMode kMode>
  class Plane {
   public:
    VITFAST_INLINE Plane(const BlurPlanes& blur, int64_t plane) : activate_(blur.activate_) {
      if constexpr (has_scale(kMode)) {
        const int64_t channel = plane % blur.plan_.channels;
        scale_ = blur.scale_.of(channel), shift_ = blur.shift_.of(channel);
      }
      const int64_t offset = blur.output_offset(plane);
      if (blur.from_memory_) ahead_ = blur.plan_.out_height * blur.plan_.out_width;
      to_ = blur.streamed_ ? blur.buffer_ + (offset - blur.output_offset(blur.begin_))
                           : static_cast<S*>(blur.call_.out) + offset;
      if constexpr (is_gradient(kMode)) primal_ = static_cast<const S*>(blur.call_.primal) + offset;
    }

    // From the input itself, or from a slot.
    template <class From>
    VITFAST_INLINE Vec<T> load_input(const From* p, FirstLanes<T> lanes) const {
      const Vec<T> x = lanes.load(p);
      if constexpr (kMode == BlurMode::kClamp) return activate_.clamp(x * scale_ + shift_);
      return x;
    }

    // Outputs from place `at` in the strip on.
    VITFAST_INLINE void emit(int64_t at, Vec<T> sum, FirstLanes<T> lanes) {
      if constexpr (is_gradient(kMode)) {
        if (ahead_ > 0) __builtin_prefetch(primal_ + at + ahead_, 0, 2);
        const Vec<T> x = lanes.load(primal_ + at);
        sum = activate_.template backward<kMode == BlurMode::kTanhGradient>(x * scale_ + shift_, sum);
        if constexpr (has_sums(kMode)) {
          // Lanes beyond the last took nothing: their gradient is 0, as long as scale and shift are finite.
          scale_sum_ = scale_sum_ + sum * x;
          shift_sum_ = shift_sum_ + sum;
        }
        sum = sum * scale_;
      }
      lanes.store(to_ + at, sum);
    }

    // Adds what some outputs gave to the gradients of scale and shift. They are few: the rounding errors of a sum grow
    // with the number of its terms.
    VITFAST_INLINE void finish(double* scale_sum, double* shift_sum) {
      *scale_sum += static_cast<double>(sum_of_lanes<T>(scale_sum_));
      *shift_sum += static_cast<double>(sum_of_lanes<T>(shift_sum_));
    }

   private:
    const BlurActivate<T> activate_;
    Vec<T> scale_, shift_;
    S* to_;
    const S* primal_ = nullptr;
    int64_t ahead_ = 0;
    Vec<T> scale_sum_{}, shift_sum_{};
  };

  template <BlurMode kMode>
  void run_window(const BlurWindow<T>& window) const {
    const bool one_group = window.groups() == 1;
    switch (window.kind) {
      case Kind::kOne:
        return one_group ? run_kind<kMode, Kind::kOne, 1>(window) : run_kind<kMode, Kind::kOne, 2>(window);
      case Kind::kTwo:
        return one_group ? run_kind<kMode, Kind::kTwo, 1>(window) : run_kind<kMode, Kind::kTwo, 2>(window);
      case Kind::kPair:
        return run_kind<kMode, Kind::kPair, 1>(window);
      case Kind::kAny:
        return run_any<kMode>(window);
    }
  }

  // There are versions for rows that have as many taps as columns have, or fewer; and where every second row of a
  // transpose has a single one, for that.
  template <BlurMode kMode, Kind kKind, int kGroups>
  void run_kind(const BlurWindow<T>& window) const {
    for (const Run& run : *runs_) {
      const int64_t row_taps = static_cast<int64_t>(run.taps.size());
      if constexpr (has_versions(kMode)) {
        switch (window.picks.size() > 1 || row_taps == 0 ? 0 : window.most_taps) {
          case 2:
            if (row_taps == 1) {
              run_rows<kMode, kKind, kGroups, 1, 2>(window, run);
              continue;
            }
            if (row_taps > 2) break;
            run_rows<kMode, kKind, kGroups, 2, 2>(window, run);
            continue;
          case 3:
            if (row_taps > 3) break;
            run_rows<kMode, kKind, kGroups, 3, 3>(window, run);
            continue;
          case 4:
            if (row_taps > 4) break;
            run_rows<kMode, kKind, kGroups, 4, 4>(window, run);
            continue;
          case 5:
            if (row_taps > 5) break;
            run_rows<kMode, kKind, kGroups, 5, 5>(window, run);
            continue;
        }
      }
      run_rows<kMode, kKind, kGroups, 0, 0>(window, run);
    }
  }

  // Calls f(plane, what its outputs have in common).
  template <BlurMode kMode, class F>
  VITFAST_INLINE void for_each_plane(F f) const {
    for (int64_t plane = begin_; plane < end_; ++plane) {
      Plane<kMode> io(*this, plane);
      f(plane, io);
      if constexpr (has_sums(kMode)) {
        io.finish(call_.scale_partial + partial(plane), call_.shift_partial + partial(plane));
      }
    }
  }

  // The window's outputs of a run of rows; kRowTaps and kColumnTaps are how many taps each has (a row may have fewer),
  // or 0 for any number and any lines.
  template <BlurMode kMode, Kind kKind, int kGroups, int kRowTaps, int kColumnTaps>
  void run_rows(const BlurWindow<T>& window, const Run& run) const {
    constexpr bool kAny = kColumnTaps == 0;
    constexpr int kHeld = kAny ? 1 : kColumnTaps, kRows = kAny ? 1 : kRowTaps;
    IntVec<T> columns[kGroups][kHeld];
    Vec<T> weights[kGroups][kHeld], row_weight[kRows];
    LaneMask<T> mask[kGroups][kHeld];
    int64_t row_at[kRows];
    if constexpr (!kAny) {
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 5
        for (int t = 0; t < kColumnTaps; ++t) {
          columns[g][t] = window.picks[0][t].columns(g);
          weights[g][t] = window.picks[0][t].weights(g);
          mask[g][t] = not_negative<T>(columns[g][t]);
        }
      }
      // A row with fewer taps takes the last one in halves, which add up exactly: a weight of 0 would make NaN of Inf.
      T halves = 1;
#pragma GCC unroll 5
      for (int t = 0; t < kRowTaps; ++t) {
        const int64_t after = static_cast<int64_t>(run.taps.size()) - 1 - t;
        const auto& tap = after >= 0 ? run.taps[t] : run.taps.back();
        if (after <= 0 && t + 1 < kRowTaps) halves /= 2;
        row_weight[t] = broadcast(after > 0 ? tap.weight : tap.weight * halves);
        row_at[t] = tap.at;
      }
    }
    const auto shuffled = [](Vec<T> x, Vec<T> y, IntVec<T> lane) VITFAST_INLINE {
      return kKind == Kind::kOne ? __builtin_shuffle(x, lane) : __builtin_shuffle(x, y, lane);
    };
    const FirstLanes<T> low(window.columns), high(window.columns - kVector);
    const FirstLanes<T> first_outputs(window.outputs);
    const FirstLanes<T> last_outputs(kKind == Kind::kPair ? 2 * window.outputs : window.outputs - kVector);
    const int64_t row_step = plan_.row_period * plan_.out_width, end = run.series.count;
    for_each_plane<kMode>([&](int64_t plane, auto& io) VITFAST_INLINE {
      const auto* from = source<kMode>(plane) + window.from;
      int64_t at = (run.series.first - group_->first) * plan_.out_width + window.first;
      // Adds up the rows that an output needs.
      const auto add_rows = [&](const auto* row, int64_t line, FirstLanes<T> lanes) VITFAST_INLINE {
        Vec<T> sum{};
        if constexpr (kAny) {
          for (const auto& tap : run.taps) {
            if (tap.line == line) sum = sum + tap.weight * io.load_input(row + tap.at, lanes);
          }
        } else {
          sum = row_weight[0] * io.load_input(row + row_at[0], lanes);
#pragma GCC unroll 5
          for (int t = 1; t < kRowTaps; ++t) sum = sum + row_weight[t] * io.load_input(row + row_at[t], lanes);
        }
        return sum;
      };
      for (int64_t row = 0; row < end; ++row, from += run.step, at += row_step) {
        const bool pair = kKind == Kind::kPair && row + 1 < end;
        Vec<T> sum[kGroups]{}, x, y{};
        const auto add_window = [&](int64_t line) VITFAST_INLINE {
          x = add_rows(from, line, low);
          if constexpr (kKind == Kind::kTwo) y = add_rows(from + kVector, line, high);
          if constexpr (kKind == Kind::kPair) {
            if (pair) y = add_rows(from + run.step, line, low);
          }
        };
        if constexpr (kAny) {
          for (int64_t line = 0; line < static_cast<int64_t>(window.picks.size()); ++line) {
            add_window(line);
            for (const BlurPick<T>& pick : window.picks[line]) {
              for (int g = 0; g < kGroups; ++g) {
                const IntVec<T> taken = pick.columns(g);
                sum[g] = add_where<T>(not_negative<T>(taken), sum[g], pick.weights(g), shuffled(x, y, taken));
              }
            }
          }
        } else {
          add_window(0);
#pragma GCC unroll 2
          for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 5
            for (int t = 0; t < kColumnTaps; ++t) {
              sum[g] = add_where<T>(mask[g][t], sum[g], weights[g][t], shuffled(x, y, columns[g][t]));
            }
          }
        }
        if constexpr (kKind == Kind::kPair) {
          io.emit(at, sum[0], pair ? last_outputs : first_outputs);
          if (pair) ++row, from += run.step, at += row_step;
        } else {
          io.emit(at, sum[0], first_outputs);
          if constexpr (kGroups == 2) io.emit(at + kVector, sum[1], last_outputs);
        }
      }
    });
  }

  template <BlurMode kMode>
  void run_any(const BlurWindow<T>& window) const {
    const FirstLanes<T> one(1);
    for_each_plane<kMode>([&](int64_t plane, auto& io) {
      for (const Run& run : *runs_) {
        for (int64_t row = 0; row < run.series.count; ++row) {
          const auto* const from = source<kMode>(plane) + row * run.step;
          Vec<T> sum{};
          for (const auto& tap : run.taps) {
            const BlurMatrix& line = plan_.columns[tap.line];
            for (int64_t t = 0; t < line.taps_of(window.first); ++t) {
              const BlurTap& column = line.first_tap(window.first)[t];
              const T weight = tap.weight * static_cast<T>(column.weight);
              sum = sum + weight * io.load_input(from + column.from + tap.at, one);
            }
          }
          const int64_t output = run.series.first - group_->first + row * plan_.row_period;
          io.emit(output * plan_.out_width + window.first, sum, one);
        }
      }
    });
  }

  const BlurCall& call_;
  const BlurPlan& plan_;
  const BlurPlaneTables<T>& tables_;
  const bool streamed_, from_memory_;
  const int64_t planes_;
  const BlurActivate<T> activate_;
  const BlurChannels<T> scale_, shift_;
  int64_t bytes_, most_outputs_ = 0, strip_, begin_, end_;
  const BlurRows::Group* group_;
  const std::vector<Run>* runs_;
  T* slots_;
  S* buffer_;
};

template <class S>
void blur_planes(const BlurCall& call) {
  const BlurPlan& plan = call.plan;
  const int64_t planes = plan.batch * plan.channels, at_a_time = BlurPlanes<S>::planes_at_a_time(plan);
  const int64_t strips = plan.rows.strip_count(), chunks = (planes + at_a_time - 1) / at_a_time;
  const int64_t work = at_a_time * (plan.out_height / strips + 1) * std::max(plan.in_width, plan.out_width);
  parallel_for(chunks * strips, 1 + kBlurGrain / work, [&](int64_t begin, int64_t end) {
    BlurPlanes<S> worker(call);
    const Scratch scratch(worker.bytes());
    worker.bind(scratch.data());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / strips * at_a_time;
      worker.run(plane, std::min(plane + at_a_time, planes), task % strips);
    }
    finish_streaming();
  });
}

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
