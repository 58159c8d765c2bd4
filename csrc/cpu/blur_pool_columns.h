// The matrix for columns, applied to rows that follow each other in memory.
//
// Nearly all outputs of a row have the same taps, each time so many inputs further. They are computed in whole vectors,
// and where the rows of input and output keep step, without regard to where a row ends. Those whose taps differ, at the
// edges, are wrong after that, and are computed again one by one, from what the matrix says.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/blur_pool_common.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// The even (or odd) lanes of x, then those of y.
template <class T, bool kOdd, int... L>
inline Vec<T> every_other(Vec<T> x, Vec<T> y, std::integer_sequence<int, L...>) {
  return __builtin_shuffle(x, y, IntVec<T>{(2 * L + (kOdd ? 1 : 0))...});
}

// The lanes of x and y in turn: the lower (or upper) halves of both.
template <class T, bool kUpper, int... L>
inline Vec<T> in_turn(Vec<T> x, Vec<T> y, std::integer_sequence<int, L...>) {
  constexpr int n = kLanes<T>, first = kUpper ? n / 2 : 0;
  return __builtin_shuffle(x, y, IntVec<T>{(first + L / 2 + L % 2 * n)...});
}

template <class T>
class BlurColumns {
  static constexpr int64_t kVector = kLanes<T>;
  static constexpr int kMostTaps = 7;  // of an output that is not at an edge
  static constexpr auto kLaneNumbers = std::make_integer_sequence<int, kLanes<T>>{};

  struct Tap {
    int64_t from;
    T weight;
  };
  // The taps of outputs p, p + period, ...: of number m, the inputs are those at m * step + from.
  struct Phase {
    int64_t taps = 0;
    Tap tap[kMostTaps] = {};
  };
  struct Edge {
    int64_t output;
    std::vector<Tap> taps;
  };

 public:
  // One of the matrices for columns of a call.
  BlurColumns(const BlurCall& call, size_t line)
      : inputs_(call.in_width),
        outputs_(call.out_width),
        step_(call.column_step),
        period_(call.column_period),
        phases_(call.column_period) {
    const BlurMatrix& matrix = call.columns[line];
    const std::vector<BlurSeries>& all = call.blocks[0].series[line];
    std::vector<const BlurSeries*> longest(period_);
    for (const BlurSeries& series : all) {
      const BlurSeries*& chosen = longest[series.first % period_];
      const bool longer = chosen == nullptr || series.count > chosen->count;
      if (longer && series.step == step_ && may_be_phase(matrix, series.first)) chosen = &series;
    }
    for (const BlurSeries& series : all) {
      const int64_t phase = series.first % period_;
      if (longest[phase] == &series) {
        const int64_t origin = series.first / period_ * step_;
        for (const Tap& tap : taps_of(matrix, series.first)) {
          phases_[phase].tap[phases_[phase].taps++] = {tap.from - origin, tap.weight};
        }
        continue;
      }
      for (int64_t i = 0; i < series.count; ++i) {
        edges_.push_back({series.first + i * period_, taps_of(matrix, series.first + i * period_)});
      }
    }
    for (const Phase& phase : phases_) {
      most_ = std::max(most_, phase.taps);
      for (int64_t t = 0; t < phase.taps; ++t) {
        before_ = std::max(before_, -phase.tap[t].from);
        after_ = std::max(after_, phase.tap[t].from);
      }
    }
    after_ += (step_ + 1) * kVector + std::max<int64_t>(outputs_ / period_ * step_ - inputs_, 0);
  }

  // How many values in front of the first row and behind the last one may be read, and count for nothing.
  int64_t before() const { return (before_ + kVector - 1) / kVector * kVector; }
  int64_t after() const { return after_; }

  // The outputs of `rows` rows.
  template <class To>
  void apply(const T* from, int64_t rows, To* to) const {
    if (most_ > 0) {
      if (inputs_ * period_ == outputs_ * step_) {  // the rows of input and output keep step
        run(from, rows * outputs_, to);
      } else {
        for (int64_t r = 0; r < rows; ++r) run(from + r * inputs_, outputs_, to + r * outputs_);
      }
    }
    for (const Edge& edge : edges_) {
      with_taps(static_cast<int64_t>(edge.taps.size()), [&](auto count) { run_edge<count>(edge, from, rows, to); });
    }
  }

 private:
  static std::vector<Tap> taps_of(const BlurMatrix& matrix, int64_t output) {
    std::vector<Tap> taps;
    for (int64_t i = matrix.begin[output]; i < matrix.begin[output + 1]; ++i) {
      taps.push_back({matrix.taps[i].from, static_cast<T>(matrix.taps[i].weight)});
    }
    return taps;
  }

  // Whether a phase can have the taps of an output: few, unlike where margins are larger than the map, and where
  // outputs are more than one input apart, neighbours.
  bool may_be_phase(const BlurMatrix& matrix, int64_t output) const {
    const int64_t begin = matrix.begin[output], taps = matrix.begin[output + 1] - begin;
    bool neighbours = true;
    for (int64_t t = 0; t < taps; ++t)
      neighbours = neighbours && matrix.taps[begin + t].from == matrix.taps[begin].from + t;
    return taps <= kMostTaps && (neighbours || step_ == 1);
  }

  template <class To>
  void run(const T* from, int64_t length, To* to) const {
    if (step_ > 2 || period_ > 2 || phases_.size() < static_cast<size_t>(period_))
      return run_one_by_one(from, length, to);
    with_taps(most_, [&](auto count) { run_with<count == 0 ? kMostTaps : count>(from, length, to); });
  }

  template <int kMost, class To>
  void run_with(const T* from, int64_t length, To* to) const {
    if (step_ == 2) return run_vectors<2, 1, kMost>(from, length, to);
    if (period_ == 2) return run_vectors<1, 2, kMost>(from, length, to);
    run_vectors<1, 1, kMost>(from, length, to);
  }

  template <int kStep, int kPeriod, int kMost, class To>
  void run_vectors(const T* from, int64_t length, To* to) const {
    const T* at[kPeriod][kMost];
    Vec<T> weight[kPeriod][kMost];
    int64_t taps[kPeriod];
    for (int p = 0; p < kPeriod; ++p) {
      taps[p] = phases_[p].taps;
      for (int t = 0; t < kMost; ++t) {
        at[p][t] = from + phases_[p].tap[t].from;
        weight[p][t] = broadcast(phases_[p].tap[t].weight);
      }
    }
    // Outputs of phase p, from the m-th on.
    const auto sum = [&](int p, int64_t m) {
      Vec<T> total{};
#pragma GCC unroll 7
      for (int t = 0; t < kMost; t += kStep) {
        if (kPeriod == 1 && kMost < kMostTaps ? false : t >= taps[p]) break;
        if constexpr (kStep == 1) {
          total = total + weight[p][t] * load(at[p][t] + m);
        } else {
          const Vec<T> x = load(at[p][t] + 2 * m), y = load(at[p][t] + 2 * m + kVector);
          total = total + weight[p][t] * every_other<T, false>(x, y, kLaneNumbers);
          if (t + 1 < kMost && (kMost < kMostTaps || t + 1 < taps[p])) {
            total = total + weight[p][t + 1] * every_other<T, true>(x, y, kLaneNumbers);
          }
        }
      }
      return total;
    };
    const auto put = [&](int64_t o, int64_t lanes) {
      if constexpr (kPeriod == 1) {
        store_as_storage_up_to(to + o, sum(0, o), lanes);
      } else {
        const Vec<T> even = sum(0, o / 2), odd = sum(1, o / 2);
        store_as_storage_up_to(to + o, in_turn<T, false>(even, odd, kLaneNumbers), std::min(lanes, kVector));
        if (lanes > kVector) {
          store_as_storage_up_to(to + o + kVector, in_turn<T, true>(even, odd, kLaneNumbers), lanes - kVector);
        }
      }
    };
    constexpr int64_t kBlock = kPeriod * kVector;
    const int64_t whole = length / kBlock * kBlock;
    for (int64_t o = 0; o < whole; o += kBlock) put(o, kBlock);
    if (whole < length) put(whole, length - whole);
  }

  // The output of one edge in every row; kTaps is how many taps it has, or 0 for any number.
  template <int kTaps, class To>
  void run_edge(const Edge& edge, const T* from, int64_t rows, To* to) const {
    const int64_t taps = kTaps > 0 ? kTaps : static_cast<int64_t>(edge.taps.size());
    Tap held[kTaps > 0 ? kTaps : 1];
    if constexpr (kTaps > 0) std::copy_n(edge.taps.data(), kTaps, held);
    const Tap* tap = kTaps > 0 ? held : edge.taps.data();
    to += edge.output;
    for (int64_t r = 0; r < rows; ++r, from += inputs_, to += outputs_) {
      T sum = 0;
#pragma GCC unroll 4
      for (int64_t t = 0; t < taps; ++t) sum += tap[t].weight * from[tap[t].from];
      *to = static_cast<To>(sum);
    }
  }

  // For strides that are rare.
  template <class To>
  void run_one_by_one(const T* from, int64_t length, To* to) const {
    for (size_t p = 0; p < phases_.size(); ++p) {
      const Phase& phase = phases_[p];
      const T* at = from;
      for (int64_t o = static_cast<int64_t>(p); o < length; o += period_, at += step_) {
        T sum = 0;
        for (int64_t t = 0; t < phase.taps; ++t) sum += phase.tap[t].weight * at[phase.tap[t].from];
        to[o] = static_cast<To>(sum);
      }
    }
  }

  int64_t inputs_, outputs_, step_, period_;
  std::vector<Phase> phases_;
  std::vector<Edge> edges_;
  int64_t most_ = 0, before_ = 0, after_ = 0;
};

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
