// Tangents of attention and of its gradients, for the queries and keys of one head, or of one window of it. A dot
// stands for a tangent; P, dP and dS are those of attention_kernel.h, and the rows of P. add up to 0:
//
//   S. = scale (Q. K^T + Q K.^T) + bias.      P. = P (S. - rowsum(P S.))        O. = P. V + P V.
//   dP. = G. V^T + G V.^T                     X = dP - rowsum(P dP)             Y = P. X + P dP.
//   dS. = Y - P rowsum(Y)                     dQ. = scale (dS. K + dS K.)       dK. = scale (dS.^T Q + dS^T Q.)
//   dV. = P.^T G + P^T G.                     dbias. = dS.
//
// A block of queries takes all keys, its scores transposed as in attention_kernel.h. P, X and dS depend on no tangent:
// they are computed once, and serve all.
#pragma once

#include "cpu/attention_operand.h"
#include "cpu/tangents.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

template <class T>
Rows<T> rows_from(const Rows<T>& rows, int64_t first) {
  return {rows.data, rows.offset + first, rows.step};
}

// Operand: SequenceRows or TokenRows.
template <class Operand>
class HeadTangents {
 public:
  using S = typename Operand::Storage;
  using T = Compute<S>;

  template <class Call>
  HeadTangents(const Call& call, int64_t most_queries, int64_t most_keys, Arena& arena)
      : dim_(call.problem.dim),
        count_(call.count),
        scale_(static_cast<T>(call.problem.scale)),
        query_(one(call.query, most_queries, arena)),
        key_(one(call.key, most_keys, arena)),
        value_(one(call.value, most_keys, arena)),
        grad_(one(call.grad, most_queries, arena)),
        query_t_(many(call.query_t, most_queries, arena)),
        key_t_(many(call.key_t, most_keys, arena)),
        value_t_(many(call.value_t, most_keys, arena)),
        grad_t_(many(call.grad_t, most_queries, arena)),
        out_t_(many(call.out_t, most_queries, arena)),
        query_grad_t_(many(call.query_grad_t, most_queries, arena)),
        key_grad_t_(many(call.key_grad_t, most_keys, arena)),
        value_grad_t_(many(call.value_grad_t, most_keys, arena)),
        has_bias_t_(call.bias_t),
        wants_bias_grad_t_(call.bias_grad_t != nullptr),
        changes_scores_(call.changes_scores()),
        changes_scores_grad_(call.changes_scores_grad()),
        query_transposed_(dim_, kWidth, arena),
        query_t_transposed_(query_t_.empty() ? 0 : dim_, kWidth, arena),
        grad_transposed_(grad_.empty() ? 0 : dim_, kWidth, arena),
        grad_t_transposed_(grad_t_.empty() ? 0 : dim_, kWidth, arena),
        probabilities_(most_keys, kWidth, arena),
        probabilities_t_(changes_scores_ ? most_keys : 0, kWidth, arena),
        centred_grad_(grad_.empty() ? 0 : most_keys, kWidth, arena),
        scores_grad_(grad_.empty() ? 0 : most_keys, kWidth, arena),
        scores_grad_t_(grad_.empty() ? 0 : most_keys, kWidth, arena) {}

  int64_t pauses(int64_t queries) const {
    return blocks_of(queries) * (1 + (grad_.empty() ? 1 : kPausesOfTangent) * count_);
  }

  // Calls f(operand, of_queries) for all that are read or written.
  template <class F>
  void for_each_operand(F f) {
    for_each({&query_, &grad_, &query_t_, &grad_t_, &out_t_, &query_grad_t_}, [&](Operand& x) { f(x, true); });
    for_each({&key_, &value_, &key_t_, &value_t_, &key_grad_t_, &value_grad_t_}, [&](Operand& x) { f(x, false); });
  }

  // `select(operand, of_queries)` turns an operand to the queries or the keys. `bias` has
  //   rows(block, first key, keys)        a block of the bias, transposed, or nothing;
  //   tangent(k, block, first key, keys)  the same of its tangent k;
  //   add_grad_t(k, block, dS.^T, keys)   takes the tangent of the gradient of a block of scores.
  // `meanwhile` is called again and again, as often as `pauses` says.
  template <class Select, class Bias, class F>
  void operator()(int64_t queries, int64_t keys, Select select, Bias& bias, F meanwhile) {
    keys_ = keys;
    for_each_operand(select);
    for_each({&query_, &grad_, &query_t_, &grad_t_, &key_, &value_, &key_t_, &value_t_},
             [](Operand& x) { x.gather(); });
    const int64_t vectors = parts(queries, kLanes<T>), blocks = blocks_of(queries);
    for (int64_t index = 0; index < blocks; ++index) {
      const int64_t begin = vectors * index / blocks, end = vectors * (index + 1) / blocks;
      const int64_t first = begin * kLanes<T>, last = std::min(end * kLanes<T>, queries);
      block_ = {first, end - begin, last - first, false};
      compute_primal(bias);
      meanwhile();
      for (int64_t k = 0; k < count_; ++k) compute_tangents(k, bias, meanwhile);
    }
    for_each({&out_t_, &query_grad_t_, &key_grad_t_, &value_grad_t_}, [&](Operand& x) { x.scatter(); });
  }

 private:
  static constexpr int64_t kWidth = kTileVectors * kLanes<T>;
  static constexpr int64_t kMostKeys = kKeysOfBias;
  static constexpr int64_t kPausesOfTangent = 4;  // if there is a gradient

  static int64_t blocks_of(int64_t queries) { return parts(parts(queries, kLanes<T>), kTileVectors); }

  using Operands = std::vector<Operand>;

  template <class View>
  Operands one(const View& view, int64_t most_rows, Arena& arena) const {
    Operands result;
    if (view.data != nullptr) result.emplace_back(view, dim_, most_rows, arena);
    return result;
  }
  template <class View>
  Operands many(const Batch<View>& batch, int64_t most_rows, Arena& arena) const {
    Operands result;
    if (!batch) return result;
    result.reserve(count_);
    for (int64_t k = 0; k < count_; ++k) {
      View view = batch.view;
      view.data = static_cast<S*>(view.data) + k * batch.step;
      result.emplace_back(view, dim_, most_rows, arena);
    }
    return result;
  }
  template <class F>
  static void for_each(std::initializer_list<Operands*> lists, F f) {
    for (Operands* list : lists) {
      for (Operand& operand : *list) f(operand);
    }
  }

  // P^T, and if there is a gradient X^T and dS^T.
  template <class Bias>
  void compute_primal(Bias& bias) {
    transpose(query_[0], query_transposed_);
    if (!grad_.empty()) transpose(grad_[0], grad_transposed_);
    for_each_key_block(keys_, kMostKeys, [&](int64_t first, int64_t keys) {
      gemm<T>(keys, block_.vectors,
              {dim_, key_[0].rows(), first, query_transposed_.rows(), probabilities_.rows(), first, scale_, nullptr,
               bias.rows(block_, first, keys), 0});
      if (grad_.empty()) return;
      gemm<T>(keys, block_.vectors,
              {dim_, value_[0].rows(), first, grad_transposed_.rows(), centred_grad_.rows(), first, T{1}});
    });
    for (int64_t column = 0; column < block_.vectors * kLanes<T>; column += kLanes<T>) {
      softmax(column);
      if (!grad_.empty()) differentiate(column);
    }
  }

  // Of a vector of queries, S^T -> P^T.
  void softmax(int64_t column) {
    Vec<T> top = broadcast(-std::numeric_limits<T>::infinity()), total{};
    for (int64_t j = 0; j < keys_; ++j) top = max<T>(top, load(probabilities_.row(j) + column));
    sum_over_keys(total, [&](int64_t j) {
      T* at = probabilities_.row(j) + column;
      const Vec<T> p = exp2_nonpositive<T>((load(at) - top) * kLog2E<T>);
      store(at, p);
      return p;
    });
    const Vec<T> factor = T{1} / total;
    for (int64_t j = 0; j < keys_; ++j) {
      T* at = probabilities_.row(j) + column;
      store(at, load(at) * factor);
    }
  }

  // Of a vector of queries, dP^T -> X^T, and dS^T.
  void differentiate(int64_t column) {
    Vec<T> delta{};
    sum_over_keys(
        delta, [&](int64_t j) { return load(probabilities_.row(j) + column) * load(centred_grad_.row(j) + column); });
    for (int64_t j = 0; j < keys_; ++j) {
      T* at = centred_grad_.row(j) + column;
      const Vec<T> centred = load(at) - delta;
      store(at, centred);
      store(scores_grad_.row(j) + column, load(probabilities_.row(j) + column) * centred);
    }
  }

  template <class Bias, class F>
  void compute_tangents(int64_t k, Bias& bias, F& meanwhile) {
    if (changes_scores_) compute_probabilities_t(k, bias);
    if (!out_t_.empty()) {
      Sum out(out_t_[k].rows(), block_.first);
      if (changes_scores_) add_over_keys(out, probabilities_t_, value_[0], T{1});
      if (!value_t_.empty()) add_over_keys(out, probabilities_, value_t_[k], T{1});
    }
    meanwhile();
    if (grad_.empty()) return;
    if (changes_scores_grad_) {
      compute_scores_grad_t(k);
      if (wants_bias_grad_t_) bias.add_grad_t(k, block_, scores_grad_t_, keys_);
    }
    meanwhile();
    if (!query_grad_t_.empty()) {
      Sum out(query_grad_t_[k].rows(), block_.first);
      if (changes_scores_grad_) add_over_keys(out, scores_grad_t_, key_[0], scale_);
      if (!key_t_.empty()) add_over_keys(out, scores_grad_, key_t_[k], scale_);
    }
    if (!key_grad_t_.empty()) {
      Sum out(key_grad_t_[k].rows(), 0, block_.first > 0);
      if (changes_scores_grad_) add_over_queries(out, scores_grad_t_, query_[0], scale_);
      if (!query_t_.empty()) add_over_queries(out, scores_grad_, query_t_[k], scale_);
    }
    meanwhile();
    if (!value_grad_t_.empty()) {
      Sum out(value_grad_t_[k].rows(), 0, block_.first > 0);
      if (changes_scores_) add_over_queries(out, probabilities_t_, grad_[0], T{1});
      if (!grad_t_.empty()) add_over_queries(out, probabilities_, grad_t_[k], T{1});
    }
    meanwhile();
  }

  template <class Bias>
  void compute_probabilities_t(int64_t k, Bias& bias) {
    if (!query_t_.empty()) transpose(query_t_[k], query_t_transposed_);
    for_each_key_block(keys_, kMostKeys, [&](int64_t first, int64_t keys) {
      Sum scores_t(probabilities_t_.rows(), first);
      if (has_bias_t_) {
        scores_t.begin_with(bias.tangent(k, block_, first, keys));
        if (query_t_.empty() && key_t_.empty()) return scores_t.copy(keys, block_.vectors);
      }
      if (!query_t_.empty()) {
        scores_t.add(keys, block_.vectors, dim_, key_[0].rows(), first, query_t_transposed_.rows(), scale_);
      }
      if (!key_t_.empty()) {
        scores_t.add(keys, block_.vectors, dim_, key_t_[k].rows(), first, query_transposed_.rows(), scale_);
      }
    });
    for (int64_t column = 0; column < block_.vectors * kLanes<T>; column += kLanes<T>) {
      Vec<T> mean{};
      sum_over_keys(mean, [&](int64_t j) {
        return load(probabilities_.row(j) + column) * load(probabilities_t_.row(j) + column);
      });
      for (int64_t j = 0; j < keys_; ++j) {
        T* at = probabilities_t_.row(j) + column;
        store(at, load(probabilities_.row(j) + column) * (load(at) - mean));
      }
    }
  }

  void compute_scores_grad_t(int64_t k) {
    const bool changes_grad = !grad_t_.empty() || !value_t_.empty();
    if (!grad_t_.empty()) transpose(grad_t_[k], grad_t_transposed_);
    for_each_key_block(keys_, kMostKeys, [&](int64_t first, int64_t keys) {
      Sum grad_t(scores_grad_t_.rows(), first);
      if (!grad_t_.empty()) {
        grad_t.add(keys, block_.vectors, dim_, value_[0].rows(), first, grad_t_transposed_.rows(), T{1});
      }
      if (!value_t_.empty()) {
        grad_t.add(keys, block_.vectors, dim_, value_t_[k].rows(), first, grad_transposed_.rows(), T{1});
      }
    });
    for (int64_t column = 0; column < block_.vectors * kLanes<T>; column += kLanes<T>) {
      Vec<T> total{};
      sum_over_keys(total, [&](int64_t j) {
        T* at = scores_grad_t_.row(j) + column;
        Vec<T> y{};
        if (changes_grad) y = load(probabilities_.row(j) + column) * load(at);
        if (changes_scores_) y += load(probabilities_t_.row(j) + column) * load(centred_grad_.row(j) + column);
        store(at, y);
        return y;
      });
      for (int64_t j = 0; j < keys_; ++j) {
        T* at = scores_grad_t_.row(j) + column;
        store(at, load(at) - load(probabilities_.row(j) + column) * total);
      }
    }
  }

  // A sum of products in the rows of a result from `first` on, which may hold a part of it already.
  class Sum {
   public:
    Sum(Rows<T> rows, int64_t first, bool begun = false) : rows_(rows), first_(first) {
      if (begun) begin_with(rows, first);
    }

    void begin_with(Rows<const T> plus, int64_t plus_row = 0) { plus_ = plus, plus_row_ = plus_row; }
    void copy(int64_t rows, int64_t vectors) const {
      for (int64_t r = 0; r < rows; ++r) {
        std::copy_n(plus_.row(plus_row_ + r), vectors * kLanes<T>, rows_.row(first_ + r));
      }
    }
    // alpha a b, a from `a_row` on.
    void add(int64_t rows, int64_t vectors, int64_t depth, Rows<const T> a, int64_t a_row, Rows<const T> b, T alpha) {
      gemm<T>(rows, vectors, {depth, a, a_row, b, rows_, first_, alpha, nullptr, plus_, plus_row_});
      begin_with(rows_, first_);
    }

   private:
    Rows<T> rows_;
    int64_t first_;
    Rows<const T> plus_{};
    int64_t plus_row_ = 0;
  };

  // alpha a^T b, [queries of the block][D] = [keys][queries]^T [keys][D].
  void add_over_keys(Sum& sum, const Matrix<T>& a, const Operand& b, T alpha) const {
    sum.add(block_.count, parts(dim_, kLanes<T>), keys_, {a.row(0), nullptr, a.columns()}, 0, b.rows(), alpha);
  }
  // alpha a b, [keys][D] = [keys][queries of the block] [queries][D].
  void add_over_queries(Sum& sum, const Matrix<T>& a, const Operand& b, T alpha) const {
    sum.add(keys_, parts(dim_, kLanes<T>), block_.count, a.rows(), 0, rows_from(b.rows(), block_.first), alpha);
  }

  // [D][queries] of the block.
  void transpose(const Operand& operand, const Matrix<T>& result) const {
    const Rows<T> rows = operand.rows();
    transpose_rows<T>([&](int64_t i) { return rows.row(block_.first + i); }, block_.count, dim_, result.row(0),
                      result.columns());
  }

  // total += f(key) over all keys.
  template <class F>
  void sum_over_keys(Vec<T>& total, F f) const {
    for_each_run(0, keys_, [&](int64_t begin, int64_t end) {
      Vec<T> run{};
      for (int64_t j = begin; j < end; ++j) run += f(j);
      total += run;
    });
  }

  int64_t dim_, count_;
  T scale_;
  Operands query_, key_, value_, grad_;  // one of each, or none
  Operands query_t_, key_t_, value_t_, grad_t_, out_t_, query_grad_t_, key_grad_t_, value_grad_t_;  // `count_`, or none
  bool has_bias_t_, wants_bias_grad_t_, changes_scores_, changes_scores_grad_;
  Matrix<T> query_transposed_, query_t_transposed_, grad_transposed_, grad_t_transposed_;  // [D][queries]
  Matrix<T> probabilities_, probabilities_t_;                                              // P^T and P.^T
  Matrix<T> centred_grad_, scores_grad_, scores_grad_t_;                                   // X^T, dS^T and dS.^T
  int64_t keys_ = 0;
  QueryBlock block_{};
};

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
