// Blur pooling and its transpose of channels-first maps, whose rows lie along the vector.
//
// The planes of a map follow each other in memory, and so do their rows: columns are blurred without regard to where a
// row ends. A vector of outputs is a sum of shuffled inputs, whose indices and weights hold stride, padding and
// transposition, and the shuffles of a few rows serve all rows. So rows of any length fill whole vectors.
//
// Some planes at a time, or a strip of a larger one, go from their input over buffers in the first level to their
// output. A blur combines rows first, of which fewer are left then; its transpose, and kernels that are no outer
// product, blur columns first.
#pragma once

#include "cpu/blur_pool_common.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// ---- columns --------------------------------------------------------------------------------------------------------

// For a vector of outputs: weight * (inputs from `base` on, shuffled).
template <class T>
struct Gather {
  using Index = typename VecOf<T>::Int;
  Index index[kLanes<T>] = {};  // into two vectors
  // Without a lane that has no input: what it reads is none of its own, and 0 times NaN is not 0.
  LaneMask<T> present{};
  T weight[kLanes<T>] = {};
  int64_t base = 0;

  Vec<T> operator()(const T* from) const {
    const T* p = from + base;
    IntVec<T> lanes;
    std::memcpy(&lanes, index, sizeof(lanes));
    return load(weight) * shuffle_or_zero<T>(load(p), load(p + kLanes<T>), lanes, present);
  }
};

// A matrix for columns, applied to rows that follow each other. After `period` rows a vector begins where a row does,
// unless rows are so long that their last vector need not be filled.
template <class T>
class Gathers {
  static constexpr int64_t kVector = kLanes<T>;

 public:
  Gathers(const BlurMatrix& matrix, int64_t inputs)
      : inputs_(inputs), outputs_(static_cast<int64_t>(matrix.begin.size()) - 1) {
    constexpr int64_t kLong = 8 * kVector;
    period_ = outputs_ >= kLong ? 1 : kVector / std::gcd(outputs_, kVector);
    const int64_t count = period_ * outputs_;
    std::vector<std::vector<Gather<T>>> vectors;
    for (int64_t first = 0; first < count; first += kVector) {
      vectors.push_back(gathers_of(matrix, first, std::min(kVector, count - first)));
      each_ = std::max(each_, static_cast<int64_t>(vectors.back().size()));
    }
    for (std::vector<Gather<T>>& vector : vectors) {
      vector.resize(each_, Gather<T>{});
      gathers_.insert(gathers_.end(), vector.begin(), vector.end());
    }
  }

  // How many values beyond the last row of the input may be read, and count for nothing.
  int64_t overrun() const { return 2 * kVector + (kVector / outputs_ + 2) * inputs_; }

  // Calls put(offset of the outputs, sum, how many of its lanes count) for all outputs of the rows, in order.
  template <class Put>
  void apply(const T* from, int64_t rows, Put put) const {
    switch (each_) {
      case 1:
        return apply_each<1>(from, rows, put);
      case 2:
        return apply_each<2>(from, rows, put);
      case 3:
        return apply_each<3>(from, rows, put);
      case 4:
        return apply_each<4>(from, rows, put);
      default:
        return apply_each<0>(from, rows, put);
    }
  }

 private:
  // The gathers of the outputs from `first` on, counted over rows: lane by lane, every tap is the turn of one of them.
  std::vector<Gather<T>> gathers_of(const BlurMatrix& matrix, int64_t first, int64_t lanes) const {
    std::vector<Gather<T>> gathers;
    const auto row_of = [&](int64_t l) { return (first + l) / outputs_; };
    const auto output_of = [&](int64_t l) { return (first + l) % outputs_; };
    const auto from = [&](int64_t l, int64_t tap) { return row_of(l) * inputs_ + matrix.taps[tap].from; };
    int64_t next[kVector];  // tap of each lane
    for (int64_t l = 0; l < lanes; ++l) next[l] = matrix.begin[output_of(l)];
    const auto done = [&](int64_t l) { return next[l] == matrix.begin[output_of(l) + 1]; };
    while (true) {
      int64_t base = std::numeric_limits<int64_t>::max();
      for (int64_t l = 0; l < lanes; ++l) {
        if (!done(l)) base = std::min(base, from(l, next[l]));
      }
      if (base == std::numeric_limits<int64_t>::max()) return gathers;
      Gather<T> gather;
      gather.base = base;
      for (int64_t l = 0; l < lanes; ++l) {
        if (done(l) || from(l, next[l]) - base >= 2 * kVector) continue;
        gather.index[l] = static_cast<typename Gather<T>::Index>(from(l, next[l]) - base);
        gather.present.set(l);
        gather.weight[l] = static_cast<T>(matrix.taps[next[l]].weight);
        ++next[l];
      }
      gathers.push_back(gather);
    }
  }

  // kEach gathers for each vector, or as many as there are if it is 0.
  template <int kEach, class Put>
  void apply_each(const T* from, int64_t rows, Put put) const {
    const int64_t each = kEach > 0 ? kEach : each_, period = period_, in_step = period * inputs_;
    const int64_t out_step = period * outputs_, end = rows * outputs_;
    const Gather<T>* const gathers = gathers_.data();
    for (int64_t at = 0; at < end; at += out_step, from += in_step) {
      const Gather<T>* gather = gathers;
      const int64_t stop = std::min(out_step, end - at);
      for (int64_t j = 0; j < stop; j += kVector, gather += each) {
        Vec<T> sum{};
#pragma GCC unroll 4
        for (int64_t g = 0; g < each; ++g) sum = sum + gather[g](from);
        put(at + j, sum, std::min(stop - j, kVector));
      }
    }
  }

  int64_t inputs_, outputs_, period_;
  int64_t each_ = 0;  // gathers for each vector of a period
  std::vector<Gather<T>> gathers_;
};

// ---- some planes, or a strip of one ---------------------------------------------------------------------------------

template <class S>
class BlurPlanes {
  using T = Compute<S>;
  static constexpr int64_t kVector = kLanes<T>;

 public:
  BlurPlanes(const BlurCall& call, const std::vector<Gathers<T>>& gathers)
      : call_(call), gathers_(gathers), rows_first_(!call.transpose && gathers.size() == 1) {
    planes_ = planes_at_a_time(call);
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
    if (rows_first_) {
      combine_rows(in, call_.in_width, planes, combined_);
      S* out = output(plane);
      gathers_[0].apply(combined_, planes * strip_->outputs(),
                        [=](int64_t at, Vec<T> sum, int64_t lanes) { store_as_storage_up_to(out + at, sum, lanes); });
      return;
    }
    for (size_t line = 0; line < gathers_.size(); ++line) {
      T* to = blurred_ + static_cast<int64_t>(line) * line_size();
      gathers_[line].apply(in, planes * strip_->rows,
                           [=](int64_t at, Vec<T> sum, int64_t lanes) { store_up_to(to + at, sum, lanes); });
    }
    if (call_.primal == nullptr && call_.strips.period == 1) {
      combine_rows(blurred_, call_.out_width, planes, output(plane));
      return;
    }
    // Series leave gaps at first, and memory wants to be written in order.
    combine_rows(blurred_, call_.out_width, planes, combined_);
    if (call_.primal == nullptr) {
      S* out = output(plane);
      const int64_t length = planes * strip_->outputs() * call_.out_width;
      for (int64_t j = 0; j < length; j += kVector) {
        store_as_storage_up_to(out + j, load(combined_ + j), length - j);
      }
      return;
    }
    for (int64_t p = 0; p < planes; ++p) write_gradient(plane + p, combined_ + p * strip_->outputs() * call_.out_width);
  }

 private:
  int64_t line_size() const { return planes_ * call_.strips.most_rows * call_.out_width + kVector; }

  void place(Arena& arena) {
    const int64_t overrun = gathers_[0].overrun();
    input_ = arena.take<T>(planes_ * call_.strips.most_rows * call_.in_width + overrun);
    const int64_t width = rows_first_ ? call_.in_width : call_.out_width;
    combined_ = arena.take<T>(planes_ * call_.strips.most_outputs * width + overrun);
    blurred_ = arena.take<T>(rows_first_ ? 0 : static_cast<int64_t>(gathers_.size()) * line_size());
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
      const S* end = all + call_.batch * call_.channels * plane_size;
      const int64_t read = planes * strip_->rows * call_.in_width + (rows_first_ ? 0 : gathers_[0].overrun());
      if (!prologue && together && end - first >= read) return first;
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
    const T* rows[kMostHeld];
    T weights[kMostHeld];
    for (int64_t p = 0; p < planes; ++p, from += strip_->rows * width, to += strip_->outputs() * width) {
      for (int64_t s = strip_->first_series; s < strip_->last_series; ++s) {
        const BlurStrips::Series& series = strips.series[s];
        const BlurStrips::Tap* tap = strips.taps.data() + strips.begin[series.first];
        const int64_t taps = strips.begin[series.first + 1] - strips.begin[series.first];
        To* const out = to + (series.first - strip_->first) * width;
        const int64_t out_step = strips.period * width;
        const auto row_of = [&](int64_t t) { return from + tap[t].row * width + tap[t].line * line_size(); };
        const auto put = [=](int64_t r, int64_t j, Vec<T> sum, int64_t lanes) {
          store_as_storage_up_to(out + r * out_step + j, sum, lanes);
        };
        if (taps <= kMostHeld) {
          for (int64_t t = 0; t < taps; ++t) rows[t] = row_of(t), weights[t] = static_cast<T>(tap[t].weight);
          // Rows that follow each other in both are as good as one.
          const bool one = strips.period == 1 && series.step == 1;
          combine(rows, weights, taps, one ? series.count * width : width,
                  one ? Repeat{} : Repeat{series.count, series.step * width}, put);
          continue;
        }
        for (int64_t r = 0; r < series.count; ++r) {  // margins many times as large as the map
          for (int64_t j = 0; j < width; j += kVector) {
            Vec<T> sum{};
            for (int64_t t = 0; t < taps; ++t) {
              const T* row = row_of(t) + r * series.step * width;
              sum = sum + static_cast<T>(tap[t].weight) * load_up_to(row + j, width - j);
            }
            put(r, j, sum, std::min(width - j, kVector));
          }
        }
      }
    }
  }

  // The gradient of x from that of u, and what the strip of a plane adds to those of scale and shift.
  void write_gradient(int64_t plane, const T* grad) const {
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
          store_as_storage_up_to(to + j, dz * scale, lanes);
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

  static constexpr int64_t kMostHeld = 16;

  const BlurCall& call_;
  const std::vector<Gathers<T>>& gathers_;
  const bool rows_first_;
  int64_t planes_, bytes_;
  T *input_, *combined_, *blurred_;
  const BlurStrip* strip_;
  int64_t strip_number_, plane_;
};

template <class S>
void blur_planes(const BlurCall& call) {
  std::vector<Gathers<Compute<S>>> gathers;
  for (const BlurMatrix& matrix : call.columns) gathers.emplace_back(matrix, call.in_width);
  const int64_t planes = call.batch * call.channels, at_a_time = BlurPlanes<S>::planes_at_a_time(call);
  const int64_t strips = call.strip_count(), chunks = (planes + at_a_time - 1) / at_a_time;
  const int64_t work = at_a_time * (call.out_height / strips + 1) * std::max(call.in_width, call.out_width);
  parallel_for(chunks * strips, 1 + kBlurGrain / work, [&](int64_t begin, int64_t end) {
    BlurPlanes<S> worker(call, gathers);
    const Scratch scratch(worker.bytes());
    worker.bind(scratch.data());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / strips * at_a_time;
      worker.run(plane, std::min(at_a_time, planes - plane), task % strips);
    }
  });
}

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
