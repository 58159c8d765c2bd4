// One window of one head, its channels as planes, [D][tokens]: for channels-first maps.
//
// The vectors of all products run along tokens, as the maps do, so that no map is transposed:
//
//   S = Q K^T        from the planes of Q and K          O^T = V^T P^T         dQ^T = scale K^T dS^T
//   dP = G V^T       from the planes of G and V          dK^T = scale Q^T dS   dV^T = G^T P
//
// Only P in the forward and dS in the backward are transposed, in scratch. A lone token (see Columns) is a lone column of
// every product here, of S for the keys and of O^T for the queries.
#pragma once

#include "cpu/window_attention_scores.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// What the planes of one window need besides the maps.
template <class T>
class PlaneProducts {
 public:
  PlaneProducts(const Walk<T>& walk, Arena& arena)
      : dim_(walk.problem.dim),
        last_token_(arena.take<T>(round_up(dim_, kLanes<T>))),
        other_last_token_(arena.take<T>(round_up(dim_, kLanes<T>))) {
    std::fill_n(one_, kTileRows, T{1});
    std::fill_n(scale_, kTileRows, static_cast<T>(walk.problem.scale));
    if (!arena.holds_memory()) return;
    std::fill_n(last_token_, round_up(dim_, kLanes<T>), T{0});
    std::fill_n(other_last_token_, round_up(dim_, kLanes<T>), T{0});
  }

  const T* one() const { return one_; }
  const T* scale() const { return scale_; }

  // The lone key's column of Q K^T, for all queries: out [queries].
  template <class S>
  void lone_column(const TokenPlanes<S>& query, const Columns<T>& queries, const TokenPlanes<S>& key, int64_t last_key,
                   T* out) const {
    static constexpr int64_t kZero = 0;
    Rows<const T> lone_key = key.transposed();
    lone_key.data += last_key;
    gemm_rows<T>(1, queries.vectors, {dim_, lone_key, 0, query.rows(), {out, &kZero, 1}, 0, one_});
    if (!queries.lone) return;
    const Rows<const T> lone_query = query.transposed();
    for (int64_t d = 0; d < dim_; ++d) {
      last_token_[d] = lone_key.data[d * lone_key.step];
      other_last_token_[d] = lone_query.data[queries.last() + d * lone_query.step];
    }
    Vec<T> sum{};
    for (int64_t d = 0; d < dim_; d += kLanes<T>) sum += load(last_token_ + d) * load(other_last_token_ + d);
    T corner{};
    for (int l = 0; l < kLanes<T>; ++l) corner += sum[l];
    out[queries.last()] = corner;
  }

  // planes = alpha a b, [D][columns] = [D][depth] [depth][columns]; `lone` holds the lone column of b, [depth] and zeros up
  // to a whole vector.
  void product(Rows<const T> a, int64_t depth, Rows<const T> b, const Columns<T>& columns, const T* lone, const T* alpha,
               Rows<T> planes) const {
    for_each_block(dim_, [&](int64_t first, int64_t height) {
      gemm_rows<T>(height, columns.vectors, {depth, a, first, b, planes, first, alpha});
      if (!columns.lone) return;
      const BlockValues<T> dots = row_dots<T>(a, first, height, depth, lone);
      for (int64_t r = 0; r < height; ++r) planes.row(first + r)[columns.last()] = alpha[0] * dots[r];
    });
  }

 private:
  int64_t dim_;
  T *last_token_, *other_last_token_;  // [D]
  T one_[kTileRows], scale_[kTileRows];
};

template <class S>
class ForwardPlanes {
 public:
  using T = Compute<S>;

  ForwardPlanes(const WindowAttentionForward& call, const Walk<T>& walk, Arena arena)
      : walk_(walk),
        lse_(static_cast<T*>(call.lse)),
        query_(call.query, walk.problem.dim, walk.most_queries, arena),
        key_(call.key, walk.problem.dim, walk.most_keys, arena),
        value_(call.value, walk.problem.dim, walk.most_keys, arena),
        out_(call.out, walk.problem.dim, walk.most_queries, arena),
        bias_(walk, arena),
        products_(walk, arena),
        probabilities_(walk.most_queries, walk.padded_keys, arena),
        transposed_(walk.most_keys, round_up(walk.most_queries, kLanes<T>), arena),
        lone_key_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        lone_query_(arena.take<T>(walk.padded_keys)),
        window_lse_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  void operator()(const Item& item, const Item&) {
    const Tokens query_tokens = walk_.queries(item.window), key_tokens = walk_.keys(item.window);
    const Columns<T> queries(query_tokens.count()), keys(key_tokens.count());
    const int64_t dim = walk_.problem.dim;
    query_.select(item, query_tokens);
    key_.select(item, key_tokens);
    value_.select(item, key_tokens);
    out_.select(item, query_tokens);
    bias_.select(item.head, query_tokens, key_tokens);
    probabilities_.set_columns(round_up(keys.count, kLanes<T>));
    transposed_.set_columns(queries.width());
    query_.gather();
    key_.gather();
    value_.gather();
    if (keys.lone) products_.lone_column(query_, queries, key_, keys.last(), lone_key_);

    for_each_block(queries.count, [&](int64_t first, int64_t height) {
      gemm_rows<T>(height, keys.vectors,
                   {dim, query_.transposed(), first, key_.rows(), probabilities_.rows(), first, products_.scale(),
                    bias_.rows(), first});
      BlockValues<T> lone;
      if (keys.lone) {
        for_each_vector<T>([&](int i) { store(lone.data + i, load(lone_key_ + first + i)); });
        add_bias(lone, products_.scale()[0], bias_.lone() + first);
      }
      const SoftmaxStatistics<T> statistics = exponentiate(probabilities_, first, height, keys, lone);
      normalize(first, height, keys, statistics, lone);
    });
    transpose_rows<T>([&](int64_t i) { return probabilities_.row(i); }, queries.in_vectors(), keys.in_vectors(),
                      transposed_.row(0), queries.width());
    if (queries.lone) {
      std::copy_n(probabilities_.row(queries.last()), keys.count, lone_query_);
      std::fill(lone_query_ + keys.count, lone_query_ + round_up(keys.count, kLanes<T>), T{0});
    }
    products_.product(value_.rows(), keys.count, transposed_.rows(), queries, lone_query_, products_.one(), out_.rows());
    out_.scatter();
    if (lse_ != nullptr) walk_.scatter_statistics(item, query_tokens, window_lse_, lse_);
  }

 private:
  // Divides a block of rows by their sums; the lone key's column goes where the transposed matrix has it.
  void normalize(int64_t first, int64_t height, const Columns<T>& keys, const SoftmaxStatistics<T>& statistics,
                 const BlockValues<T>& lone) {
    BlockValues<T> factor;
    for_each_vector<T>([&](int i) {
      const Vec<T> sum = load(statistics.sum.data + i), inverse = T{1} / sum;
      store(factor.data + i, inverse);
      if (keys.lone) store(transposed_.row(keys.last()) + first + i, load(lone.data + i) * inverse);
      if (lse_ != nullptr) store(window_lse_ + first + i, load(statistics.top.data + i) + log_positive<T>(sum));
    });
    for (int64_t r = 0; r < height; ++r) {
      T* row = probabilities_.row(first + r);
      const Vec<T> inverse = broadcast(factor[r]);
      for (int64_t v = 0; v < keys.width(); v += kLanes<T>) store(row + v, load(row + v) * inverse);
      if (keys.lone) row[keys.last()] *= factor[r];
    }
  }

  const Walk<T>& walk_;
  T* lse_;
  TokenPlanes<S> query_, key_, value_, out_;
  WindowBias<T> bias_;
  PlaneProducts<T> products_;
  Matrix<T> probabilities_;  // [queries][keys]
  Matrix<T> transposed_;     // [keys][queries but the lone one]
  T* lone_key_;              // [queries], of Q K^T
  T* lone_query_;            // [keys], of P
  T* window_lse_;            // [queries]
  int64_t bytes_;
};

template <class S>
class BackwardPlanes {
 public:
  using T = Compute<S>;

  BackwardPlanes(const WindowAttentionBackward& call, const Walk<T>& walk, Arena arena)
      : walk_(walk),
        lse_(static_cast<const T*>(call.lse)),
        grad_(call.grad, walk.problem.dim, walk.most_queries, arena),
        query_(call.query, walk.problem.dim, walk.most_queries, arena),
        key_(call.key, walk.problem.dim, walk.most_keys, arena),
        value_(call.value, walk.problem.dim, walk.most_keys, arena),
        grad_query_(call.grad_query, walk.problem.dim, walk.most_queries, arena),
        grad_key_(call.grad_key, walk.problem.dim, walk.most_keys, arena),
        grad_value_(call.grad_value, walk.problem.dim, walk.most_keys, arena),
        bias_(walk, arena),
        products_(walk, arena),
        probabilities_(walk.most_queries, walk.padded_keys, arena),
        scores_grad_(walk.most_queries, walk.padded_keys, arena),
        transposed_(walk.most_keys, round_up(walk.most_queries, kLanes<T>), arena),
        lone_key_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        lone_key_grad_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        lone_query_grad_(arena.take<T>(walk.padded_keys)),
        window_lse_(arena.take<T>(walk.most_queries + kBlockValues<T>)),
        bytes_(arena.used()) {
    if (arena.holds_memory()) std::fill_n(window_lse_, walk.most_queries + kBlockValues<T>, T{0});
  }

  int64_t bytes() const { return bytes_; }

  // bias_sum, if not null, is what the gradients of the scores are added to.
  void operator()(const Item& item, const Item&, T* bias_sum) {
    const Tokens query_tokens = walk_.queries(item.window), key_tokens = walk_.keys(item.window);
    const Columns<T> queries(query_tokens.count()), keys(key_tokens.count());
    const int64_t n = queries.count, m = keys.count, dim = walk_.problem.dim;
    for (TokenPlanes<S>* map : {&grad_, &query_, &grad_query_}) map->select(item, query_tokens);
    for (TokenPlanes<S>* map : {&key_, &value_, &grad_key_, &grad_value_}) map->select(item, key_tokens);
    for (Matrix<T>* matrix : {&probabilities_, &scores_grad_}) matrix->set_columns(round_up(m, kLanes<T>));
    transposed_.set_columns(queries.width());
    bias_.select(item.head, query_tokens, key_tokens);
    for (TokenPlanes<S>* map : {&grad_, &query_, &key_, &value_}) map->gather();
    walk_.gather_statistics(item, query_tokens, lse_, window_lse_);
    if (keys.lone) {
      products_.lone_column(query_, queries, key_, keys.last(), lone_key_);
      products_.lone_column(grad_, queries, value_, keys.last(), lone_key_grad_);
    }

    for_each_block(n, [&](int64_t first, int64_t height) {
      gemm_rows<T>(height, keys.vectors,
                   {dim, query_.transposed(), first, key_.rows(), probabilities_.rows(), first, products_.scale(),
                    bias_.rows(), first});
      gemm_rows<T>(height, keys.vectors,
                   {dim, grad_.transposed(), first, value_.rows(), scores_grad_.rows(), first, products_.one()});
      BlockValues<T> lone, lone_grad, lse;
      for_each_vector<T>([&](int i) {
        store(lse.data + i, load(window_lse_ + first + i));
        if (!keys.lone) return;
        store(lone.data + i, load(lone_key_ + first + i));
        store(lone_grad.data + i, load(lone_key_grad_ + first + i));
      });
      if (keys.lone) add_bias(lone, products_.scale()[0], bias_.lone() + first);
      softmax_backward(probabilities_, scores_grad_, first, height, keys, lse, lone, lone_grad);
      if (keys.lone) {
        for (int64_t r = 0; r < height; ++r) {
          lone_key_[first + r] = lone[r];
          lone_key_grad_[first + r] = lone_grad[r];
          transposed_.row(keys.last())[first + r] = lone_grad[r];
        }
      }
      if (bias_sum != nullptr) bias_.add_grad(bias_sum, scores_grad_, first, height);
    });
    if (keys.lone) {
      std::fill(lone_key_ + n, lone_key_ + round_up(n, kLanes<T>), T{0});
      std::fill(lone_key_grad_ + n, lone_key_grad_ + round_up(n, kLanes<T>), T{0});
    }
    if (queries.lone) {
      std::copy_n(scores_grad_.row(queries.last()), m, lone_query_grad_);
      std::fill(lone_query_grad_ + m, lone_query_grad_ + round_up(m, kLanes<T>), T{0});
    }
    transpose_rows<T>([&](int64_t i) { return scores_grad_.row(i); }, queries.in_vectors(), keys.in_vectors(),
                      transposed_.row(0), queries.width());
    products_.product(key_.rows(), m, transposed_.rows(), queries, lone_query_grad_, products_.scale(),
                      grad_query_.rows());
    products_.product(query_.rows(), n, scores_grad_.rows(), keys, lone_key_grad_, products_.scale(), grad_key_.rows());
    products_.product(grad_.rows(), n, probabilities_.rows(), keys, lone_key_, products_.one(), grad_value_.rows());
    for (TokenPlanes<S>* map : {&grad_query_, &grad_key_, &grad_value_}) map->scatter();
  }

 private:
  const Walk<T>& walk_;
  const T* lse_;
  TokenPlanes<S> grad_, query_, key_, value_, grad_query_, grad_key_, grad_value_;
  WindowBias<T> bias_;
  PlaneProducts<T> products_;
  Matrix<T> probabilities_, scores_grad_;  // [queries][keys]
  Matrix<T> transposed_;                   // dS^T, [keys][queries but the lone one]
  T *lone_key_, *lone_key_grad_;           // [queries], of P and dS
  T* lone_query_grad_;                     // [keys], of dS
  T* window_lse_;                          // [queries]
  int64_t bytes_;
};

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
