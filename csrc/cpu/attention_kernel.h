// Attention, forward and backward, without the matrix of scores in memory. For one head of one image, with N queries
// and M keys:
//
//   forward    S = scale Q K^T + bias,  P = softmax(S),  O = P V,  lse = log sum exp S
//   backward   P = exp(S - lse),  dP = G V^T,  dS = P (dP - rowsum(P dP))
//              dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T G,  dbias = dS
//
// Scores stand transposed, a block of keys times a block of queries at a time: the vectors run along the queries, so
// that the softmax needs no sum across lanes, and keys and values are used where they lie, element by element. Only Q,
// O, G and dQ are transposed, a block of queries each. The forward takes the keys in blocks that fit the caches, by the
// online softmax of Milakov and Gimelshein (arXiv 1805.02867), as in FlashAttention (arXiv 2205.14135). The backward
// holds P^T and dP^T of a block of queries for all keys: rowsum(P dP) then needs no output, whose rounding it would not
// survive in 16 bits.
//
// What is saved for the backward is lse alone.
#pragma once

#include "cpu/attention.h"
#include "cpu/softmax.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// One tensor's tokens of one head, as rows [count][D].
//
// They are used where they lie if their elements are adjacent, of the computing dtype and whole vectors. Otherwise
// `gather` copies them and `scatter` puts them back.
template <class S>
class SequenceRows {
 public:
  using T = Compute<S>;

  SequenceRows(const SequenceView& view, int64_t dim, int64_t most_rows, Arena& arena)
      : view_(view),
        dim_(dim),
        in_place_(std::is_same_v<S, T> && view.stride[3] == 1 && dim % kLanes<T> == 0),
        stride_(in_place_ ? view.stride[2] : round_up(dim, kLanes<T>)),
        offset_(arena.take<int64_t>(most_rows)),
        copy_(arena.take<T>(in_place_ ? 0 : most_rows * stride_)) {
    if (!arena.holds_memory()) return;
    for (int64_t i = 0; i < most_rows; ++i) offset_[i] = i * stride_;
  }

  // Turns to `count` tokens from `first` on.
  void select(int64_t batch, int64_t head, int64_t first, int64_t count) {
    data_ = static_cast<S*>(view_.data) + batch * view_.stride[0] + head * view_.stride[1] + first * view_.stride[2];
    count_ = count;
  }

  void gather() {
    if (in_place_) return;
    for (int64_t i = 0; i < count_; ++i) {
      const S* token = data_ + i * view_.stride[2];
      T* row = copy_ + i * stride_;
      if (view_.stride[3] == 1) {
        for (int64_t d = 0; d < dim_; d += kLanes<T>) store(row + d, load_as_compute_up_to(token + d, dim_ - d));
      } else {
        for (int64_t d = 0; d < dim_; ++d) row[d] = static_cast<T>(token[d * view_.stride[3]]);
        std::fill(row + dim_, row + stride_, T{0});
      }
    }
  }

  void scatter() const {
    if (in_place_) return;
    for (int64_t i = 0; i < count_; ++i) {
      S* token = data_ + i * view_.stride[2];
      const T* row = copy_ + i * stride_;
      if (view_.stride[3] == 1) {
        for (int64_t d = 0; d < dim_; d += kLanes<T>) store_as_storage_up_to(token + d, load(row + d), dim_ - d);
      } else {
        for (int64_t d = 0; d < dim_; ++d) token[d * view_.stride[3]] = static_cast<S>(row[d]);
      }
    }
  }

  // After `gather` or before `scatter`.
  T* row(int64_t i) const { return data() + i * stride_; }
  int64_t stride() const { return stride_; }
  // The rows from `first` on.
  Rows<T> rows(int64_t first = 0) const { return {row(first), offset_, 1}; }
  // Transposed, [D][count], as a left factor.
  Rows<T> transposed(int64_t first) const { return {row(first), nullptr, stride_}; }

 private:
  T* data() const {
    if constexpr (std::is_same_v<S, T>) {
      if (in_place_) return data_;
    }
    return copy_;
  }

  SequenceView view_;
  int64_t dim_;
  bool in_place_;
  int64_t stride_;
  int64_t* offset_;
  T* copy_;
  S* data_ = nullptr;
  int64_t count_ = 0;
};

// Queries in blocks of a few vectors. A lone query (see Columns) belongs to the last block, beside its vectors.
struct QueryBlock {
  int64_t first, vectors;
  int64_t count;  // in the vectors
  bool lone;

  int64_t queries() const { return count + (lone ? 1 : 0); }
};

template <class T>
class QueryBlocks {
 public:
  static constexpr int64_t kMostVectors = kTileVectors;
  static constexpr int64_t kMostQueries = kMostVectors * kLanes<T> + 1;

  explicit QueryBlocks(int64_t queries) : columns_(queries), count_(parts(columns_.vectors, kMostVectors)) {}

  int64_t count() const { return count_; }
  QueryBlock operator[](int64_t i) const {
    const int64_t begin = columns_.vectors * i / count_, end = columns_.vectors * (i + 1) / count_;
    const int64_t first = begin * kLanes<T>, last = std::min(end * kLanes<T>, columns_.in_vectors());
    return {first, end - begin, last - first, columns_.lone && i == count_ - 1};
  }

 private:
  Columns<T> columns_;
  int64_t count_;
};

// Calls f(first, keys) on blocks of keys, cut evenly.
template <class F>
void for_each_key_block(int64_t keys, int64_t most, F f) {
  for_each_part(static_cast<uint32_t>(keys), static_cast<uint32_t>(most),
                [&](int64_t first, int64_t count) { f(first, count); });
}

// Calls f(begin, end) on short runs of keys. Sums over thousands of keys are taken run by run: their rounding errors
// grow with the length of a run and the number of runs instead of with their product.
template <class F>
void for_each_run(int64_t begin, int64_t end, F f) {
  constexpr int64_t kRun = 32;
  for (; begin < end; begin += kRun) f(begin, std::min(begin + kRun, end));
}

// The bias of a block of scores, transposed like them.
template <class T>
class ScoreBias {
 public:
  ScoreBias(const BiasView& view, int64_t most_keys, Arena& arena)
      : view_(view), copy_(view.data == nullptr ? 0 : most_keys, QueryBlocks<T>::kMostVectors * kLanes<T>, arena) {}

  void select(int64_t batch, int64_t head) {
    if (view_.data == nullptr) return;
    data_ = static_cast<const T*>(view_.data) + batch * view_.stride[0] + head * view_.stride[1];
  }

  // Of `keys` keys from `first_key` on, [keys][queries]; nothing if there is no bias. Columns without a query are 0.
  Rows<const T> rows(const QueryBlock& block, int64_t first_key, int64_t keys) {
    if (view_.data == nullptr) return {};
    const T* data = at(block.first, first_key);
    if (view_.stride[2] == 0) {
      for (int64_t j = 0; j < keys; ++j) {
        for (int64_t v = 0; v < block.vectors; ++v) {
          store(copy_.row(j) + v * kLanes<T>, broadcast(data[j * view_.stride[3]]));
        }
      }
    } else if (view_.stride[3] == 1) {
      transpose_rows<T>([&](int64_t i) { return data + i * view_.stride[2]; }, block.count, keys, copy_.row(0),
                        copy_.columns());
    } else {
      for (int64_t j = 0; j < keys; ++j) {
        T* row = copy_.row(j);
        for (int64_t i = 0; i < block.count; ++i) row[i] = data[i * view_.stride[2] + j * view_.stride[3]];
        std::fill(row + block.count, row + block.vectors * kLanes<T>, T{0});
      }
    }
    return copy_.rows();
  }

  // scores <- scale scores + bias, of one query with `keys` keys from `first_key` on.
  void finish_query(int64_t query, int64_t first_key, int64_t keys, T scale, T* scores) const {
    const T* bias = view_.data == nullptr ? nullptr : at(query, first_key);
    for (int64_t j = 0; j < keys; ++j) {
      scores[j] = scores[j] * scale + (bias == nullptr ? T{0} : bias[j * view_.stride[3]]);
    }
  }

 private:
  const T* at(int64_t query, int64_t key) const { return data_ + query * view_.stride[2] + key * view_.stride[3]; }

  BiasView view_;
  Matrix<T> copy_;
  const T* data_ = nullptr;
};

// Rows of `matrix`, [D][queries], times a factor for each query.
template <class T>
void scale_columns(const Matrix<T>& matrix, int64_t rows, int64_t vectors, const T* factor) {
  for (int64_t v = 0; v < vectors; ++v) {
    const Vec<T> column_factor = load(factor + v * kLanes<T>);
    for (int64_t r = 0; r < rows; ++r) {
      T* at = matrix.row(r) + v * kLanes<T>;
      store(at, load(at) * column_factor);
    }
  }
}

inline constexpr int64_t kZeroOffset = 0;

// A row vector as a matrix of one row.
template <class T>
Rows<T> single_row(T* data, int64_t step = 1) {
  return {data, &kZeroOffset, step};
}

template <class S>
class AttentionForwardBlock {
 public:
  using T = Compute<S>;
  static constexpr int64_t kMostKeys = 256;

  AttentionForwardBlock(const AttentionForward& call, Arena arena)
      : problem_(call.problem),
        blocks_(problem_.queries),
        lse_(static_cast<T*>(call.lse)),
        query_(call.query, problem_.dim, QueryBlocks<T>::kMostQueries, arena),
        key_(call.key, problem_.dim, problem_.keys, arena),
        value_(call.value, problem_.dim, problem_.keys, arena),
        out_(call.out, problem_.dim, QueryBlocks<T>::kMostQueries, arena),
        bias_(problem_.bias, most_keys(), arena),
        query_transposed_(problem_.dim, kWidth, arena),
        scores_(most_keys(), kWidth, arena),
        out_transposed_(problem_.dim, kWidth, arena),

        lone_scores_(arena.take<T>(round_up(problem_.keys, kBlockValues<T>) + kBlockValues<T>)),
        scale_(static_cast<T>(problem_.scale)),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  // Block `index` of the queries of one head.
  void operator()(int64_t batch, int64_t head, int64_t index) {
    if (batch != batch_ || head != head_) {
      batch_ = batch, head_ = head;
      for (SequenceRows<S>* rows : {&key_, &value_}) {
        rows->select(batch, head, 0, problem_.keys);
        rows->gather();
      }
      bias_.select(batch, head);
    }
    const QueryBlock block = blocks_[index];
    query_.select(batch, head, block.first, block.queries());
    query_.gather();
    out_.select(batch, head, block.first, block.queries());
    T* lse = lse_ == nullptr ? nullptr : lse_ + (batch * problem_.heads + head) * problem_.queries + block.first;
    attend(block, lse);
    if (block.lone) attend_lone(block, lse);
    out_.scatter();
  }

 private:
  static constexpr int64_t kWidth = QueryBlocks<T>::kMostVectors * kLanes<T>;

  int64_t most_keys() const { return std::min(problem_.keys, kMostKeys); }

  // All queries of the block but a lone one.
  void attend(const QueryBlock& block, T* lse) {
    constexpr int L = kLanes<T>;
    const int64_t dim = problem_.dim;
    transpose_rows<T>([&](int64_t i) { return query_.row(i); }, block.count, dim, query_transposed_.row(0),
                      query_transposed_.columns());
    alignas(64) T top[kWidth], sum[kWidth];
    std::fill_n(top, kWidth, -std::numeric_limits<T>::infinity());
    std::fill_n(sum, kWidth, T{0});
    for_each_key_block(problem_.keys, kMostKeys, [&](int64_t first, int64_t keys) {
      gemm<T>(keys, block.vectors,
              {dim, key_.rows(), first, query_transposed_.rows(), scores_.rows(), 0, scale_, nullptr,
               bias_.rows(block, first, keys), 0});
      for (int64_t v = 0; v < block.vectors; ++v) add_block(keys, v * L, first > 0, top + v * L, sum + v * L);
      gemm<T>(dim, block.vectors,
              {keys, value_.transposed(first), 0, scores_.rows(), out_transposed_.rows(), 0, T{1}, nullptr,
               first > 0 ? Rows<const T>(out_transposed_.rows()) : Rows<const T>{}, 0});
    });
    for (int64_t v = 0; v < block.vectors; ++v) {
      const Vec<T> column_sum = load(sum + v * L);
      if (lse != nullptr) {
        store_up_to(lse + v * L, load(top + v * L) + log_positive<T>(column_sum), block.count - v * L);
      }
      store(sum + v * L, T{1} / column_sum);
    }
    scale_columns(out_transposed_, dim, block.vectors, sum);
    transpose_rows<T>([&](int64_t d) { return out_transposed_.row(d); }, dim, block.count, out_.row(0), out_.stride());
  }

  // A vector of queries takes in a block of keys: S^T <- exp(S^T - top), with the new top; what was summed up by the
  // former top is brought to the new one.
  void add_block(int64_t keys, int64_t column, bool rescale, T* top, T* sum) {
    const Vec<T> before = load(top);
    Vec<T> largest = before;
    for (int64_t j = 0; j < keys; ++j) largest = max<T>(largest, load(scores_.row(j) + column));
    store(top, largest);
    // While all scores are -inf, their probabilities are 0, not NaN.
    const Vec<T> shift = largest == -std::numeric_limits<T>::infinity() ? Vec<T>{} : largest;
    Vec<T> total{};
    if (rescale) {
      const Vec<T> factor = exp2_nonpositive<T>((before - shift) * kLog2E<T>);
      total = load(sum) * factor;
      for (int64_t d = 0; d < problem_.dim; ++d) {
        T* at = out_transposed_.row(d) + column;
        store(at, load(at) * factor);
      }
    }
    for_each_run(0, keys, [&](int64_t begin, int64_t end) {
      Vec<T> run{};
      for (int64_t j = begin; j < end; ++j) {
        T* at = scores_.row(j) + column;
        const Vec<T> p = exp2_nonpositive<T>((load(at) - shift) * kLog2E<T>);
        store(at, p);
        run += p;
      }
      total += run;
    });
    store(sum, total);
  }

  void attend_lone(const QueryBlock& block, T* lse) {
    constexpr int L = kLanes<T>;
    const int64_t dim = problem_.dim, keys = problem_.keys;
    const T* query = query_.row(block.count);
    for_each_block(keys, [&](int64_t first, int64_t height) {
      const BlockValues<T> dots = row_dots<T>(key_.rows(), first, height, dim, query);
      for_each_vector<T>([&](int i) { store(lone_scores_ + first + i, load(dots.data + i)); });
    });
    bias_.finish_query(block.first + block.count, 0, keys, scale_, lone_scores_);
    std::fill(lone_scores_ + keys, lone_scores_ + round_up(keys, L), -std::numeric_limits<T>::infinity());
    Vec<T> tops = load(lone_scores_);
    for (int64_t j = L; j < keys; j += L) tops = max<T>(tops, load(lone_scores_ + j));
    T top = tops[0];
    for (int l = 1; l < L; ++l) top = std::max(top, tops[l]);
    Vec<T> sums{};
    for (int64_t j = 0; j < keys; j += L) {
      const Vec<T> p = exp2_nonpositive<T>((load(lone_scores_ + j) - top) * kLog2E<T>);
      store(lone_scores_ + j, p);
      sums += p;
    }
    const T sum = sum_of_lanes<T>(sums);
    if (lse != nullptr) lse[block.count] = top + log_positive<T>(broadcast(sum))[0];
    gemm<T>(1, parts(dim, L),
            {keys, single_row<const T>(lone_scores_), 0, value_.rows(), out_.rows(block.count), 0, T{1} / sum});
  }

  const AttentionProblem& problem_;
  QueryBlocks<T> blocks_;
  T* lse_;
  SequenceRows<S> query_, key_, value_, out_;
  ScoreBias<T> bias_;
  Matrix<T> query_transposed_, scores_, out_transposed_;  // [D][queries], [keys][queries], [D][queries]
  T* lone_scores_;                                        // [keys]
  T scale_;
  int64_t batch_ = -1, head_ = -1;
  int64_t bytes_;
};

template <class S>
class AttentionBackwardHead {
 public:
  using T = Compute<S>;
  static constexpr int64_t kMostKeys = 64;

  AttentionBackwardHead(const AttentionBackward& call, Arena arena)
      : problem_(call.problem),
        blocks_(problem_.queries),
        lse_(static_cast<const T*>(call.lse)),
        grad_(call.grad, problem_.dim, QueryBlocks<T>::kMostQueries, arena),
        query_(call.query, problem_.dim, QueryBlocks<T>::kMostQueries, arena),
        key_(call.key, problem_.dim, problem_.keys, arena),
        value_(call.value, problem_.dim, problem_.keys, arena),
        grad_query_(call.grad_query, problem_.dim, QueryBlocks<T>::kMostQueries, arena),
        grad_key_(call.grad_key, problem_.dim, problem_.keys, arena),
        grad_value_(call.grad_value, problem_.dim, problem_.keys, arena),
        bias_(problem_.bias, kMostKeys, arena),
        wants_bias_grad_(call.bias_grad != nullptr),
        query_transposed_(problem_.dim, kWidth, arena),
        grad_transposed_(problem_.dim, kWidth, arena),
        grad_query_transposed_(problem_.dim, kWidth, arena),
        probabilities_(problem_.keys, kRow, arena),
        scores_grad_(problem_.keys, kRow, arena),
        bias_rows_(wants_bias_grad_ ? QueryBlocks<T>::kMostQueries : 0, round_up(kMostKeys, kLanes<T>), arena),
        scale_(static_cast<T>(problem_.scale)),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  // bias_sum, (N or 1, M), is what the gradients of the scores are added to, if it is not null.
  void operator()(int64_t batch, int64_t head, T* bias_sum) {
    for (SequenceRows<S>* rows : {&key_, &value_, &grad_key_, &grad_value_}) {
      rows->select(batch, head, 0, problem_.keys);
    }
    key_.gather();
    value_.gather();
    bias_.select(batch, head);
    const T* lse = lse_ + (batch * problem_.heads + head) * problem_.queries;
    for (int64_t index = 0; index < blocks_.count(); ++index) {
      const QueryBlock block = blocks_[index];
      for (SequenceRows<S>* rows : {&query_, &grad_, &grad_query_}) {
        rows->select(batch, head, block.first, block.queries());
      }
      query_.gather();
      grad_.gather();
      differentiate(block, lse + block.first, bias_sum);
      grad_query_.scatter();
    }
    grad_key_.scatter();
    grad_value_.scatter();
  }

 private:
  static constexpr int64_t kWidth = QueryBlocks<T>::kMostVectors * kLanes<T>;
  static constexpr int64_t kRow = kWidth + kLanes<T>;  // of P^T and dS^T: the lone query's column is behind the vectors

  void differentiate(const QueryBlock& block, const T* lse, T* bias_sum) {
    const int64_t dim = problem_.dim;
    const int64_t lone = block.vectors * kLanes<T>;  // the lone query's column: the others then fill their vectors
    alignas(64) T block_lse[kRow] = {}, factor[kRow] = {}, delta[kRow] = {};
    std::copy_n(lse, block.queries(), block_lse);
    for (auto [rows, matrix] : {std::pair(&query_, &query_transposed_), std::pair(&grad_, &grad_transposed_)}) {
      transpose_rows<T>([&](int64_t i) { return rows->row(i); }, block.count, dim, matrix->row(0), matrix->columns());
    }
    for_each_key_block(problem_.keys, kMostKeys, [&](int64_t first, int64_t keys) {
      gemm<T>(keys, block.vectors,
              {dim, key_.rows(), first, query_transposed_.rows(), probabilities_.rows(), first, scale_, nullptr,
               bias_.rows(block, first, keys), 0});
      gemm<T>(keys, block.vectors,
              {dim, value_.rows(), first, grad_transposed_.rows(), scores_grad_.rows(), first, T{1}});
      for (int64_t v = 0; v < lone; v += kLanes<T>) {
        exponentiate_columns(first, keys, v, load(block_lse + v), factor + v, delta + v);
      }
      if (block.lone) exponentiate_lone(block, first, keys, block_lse[lone], factor[lone], delta[lone]);
    });
    // `factor` and `delta` hold the sums of P and of P dP so far. P is divided by its sum, which the rounding of lse
    // keeps from being 1: the rows of dS then add up to 0.
    for (int64_t v = 0; v < kRow; v += kLanes<T>) {
      store(delta + v, load(delta + v) / load(factor + v));
      store(factor + v, T{1} / load(factor + v));
    }
    for_each_key_block(problem_.keys, kMostKeys, [&](int64_t first, int64_t keys) {
      for (int64_t v = 0; v < lone + (block.lone ? 1 : 0); v += kLanes<T>) {
        differentiate_columns(first, keys, v, load(factor + v), load(delta + v));
      }
      const auto before = [&](Rows<T> rows) { return first > 0 ? Rows<const T>(rows) : Rows<const T>{}; };
      gemm<T>(dim, block.vectors,
              {keys, key_.transposed(first), 0, scores_grad_.rows_from(first), grad_query_transposed_.rows(), 0, scale_,
               nullptr, before(grad_query_transposed_.rows()), 0});
      if (block.lone) {
        const Rows<T> row = grad_query_.rows(block.count);
        gemm<T>(1, parts(dim, kLanes<T>),
                {keys, single_row<const T>(scores_grad_.row(first) + lone, kRow), 0, key_.rows(first), row, 0, scale_,
                 nullptr, before(row), 0});
      }
      add_over_queries(block, scores_grad_, query_, scale_, grad_key_, first, keys);
      add_over_queries(block, probabilities_, grad_, T{1}, grad_value_, first, keys);
      if (bias_sum != nullptr) add_bias_grad(block, first, keys, bias_sum);
    });
    transpose_rows<T>([&](int64_t d) { return grad_query_transposed_.row(d); }, dim, block.count, grad_query_.row(0),
                      grad_query_.stride());
  }

  // A vector of queries takes in a block of keys: S^T <- exp(S^T - lse), which is summed up, as is its product with
  // dP^T.
  void exponentiate_columns(int64_t first, int64_t keys, int64_t column, Vec<T> lse, T* sum, T* product) {
    Vec<T> sums = load(sum), products = load(product);
    for_each_run(first, first + keys, [&](int64_t begin, int64_t end) {
      Vec<T> run{}, run_products{};
      for (int64_t j = begin; j < end; ++j) {
        T* at = probabilities_.row(j) + column;
        const Vec<T> p = exp2_nonpositive<T>((load(at) - lse) * kLog2E<T>);
        store(at, p);
        run += p;
        run_products += p * load(scores_grad_.row(j) + column);
      }
      sums += run;
      products += run_products;
    });
    store(sum, sums);
    store(product, products);
  }

  // The same for the lone query, whose scores are computed here.
  void exponentiate_lone(const QueryBlock& block, int64_t first_key, int64_t keys, T lse, T& sum, T& product) {
    constexpr int L = kLanes<T>;
    const int64_t column = block.vectors * L;
    alignas(64) T scores[kMostKeys + kBlockValues<T>], grads[kMostKeys + kBlockValues<T>];
    for_each_block(keys, [&](int64_t first, int64_t height) {
      const auto dots = [&](const SequenceRows<S>& rows, const SequenceRows<S>& queries, T* out) {
        const BlockValues<T> values =
            row_dots<T>(rows.rows(), first_key + first, height, problem_.dim, queries.row(block.count));
        for_each_vector<T>([&](int i) { store(out + first + i, load(values.data + i)); });
      };
      dots(key_, query_, scores);
      dots(value_, grad_, grads);
    });
    bias_.finish_query(block.first + block.count, first_key, keys, scale_, scores);
    std::fill(scores + keys, scores + round_up(keys, L), -std::numeric_limits<T>::infinity());
    Vec<T> sums{}, products{};
    for (int64_t j = 0; j < keys; j += L) {
      const Vec<T> p = exp2_nonpositive<T>((load(scores + j) - lse) * kLog2E<T>);
      store(scores + j, p);
      sums += p;
      products += p * load_up_to(grads + j, keys - j);
    }
    sum += sum_of_lanes<T>(sums);
    product += sum_of_lanes<T>(products);
    for (int64_t j = 0; j < keys; ++j) {
      probabilities_.row(first_key + j)[column] = scores[j];
      scores_grad_.row(first_key + j)[column] = grads[j];
    }
  }

  // P^T <- P^T factor and dP^T <- dS^T = P^T (dP^T - delta), of a vector of queries.
  void differentiate_columns(int64_t first, int64_t keys, int64_t column, Vec<T> factor, Vec<T> delta) {
    for (int64_t j = first; j < first + keys; ++j) {
      T *at = probabilities_.row(j) + column, *at_grad = scores_grad_.row(j) + column;
      const Vec<T> p = load(at) * factor;
      store(at, p);
      store(at_grad, p * (load(at_grad) - delta));
    }
  }

  // Rows of `result` += alpha a b, [keys][D] = [keys][queries] [queries][D]; the first block of queries sets them.
  void add_over_queries(const QueryBlock& block, const Matrix<T>& a, const SequenceRows<S>& b, T alpha,
                        const SequenceRows<S>& result, int64_t first, int64_t keys) {
    const Rows<T> rows = result.rows();
    gemm<T>(keys, parts(problem_.dim, kLanes<T>),
            {block.queries(), a.rows(), first, b.rows(), rows, first, alpha, nullptr,
             block.first > 0 ? Rows<const T>(rows) : Rows<const T>{}, first});
  }

  void add_bias_grad(const QueryBlock& block, int64_t first, int64_t keys, T* bias_sum) {
    const int64_t lone = block.vectors * kLanes<T>;
    transpose_rows<T>([&](int64_t j) { return scores_grad_.row(first + j); }, keys, block.count, bias_rows_.row(0),
                      bias_rows_.columns());
    if (block.lone) {
      for (int64_t j = 0; j < keys; ++j) bias_rows_.row(block.count)[j] = scores_grad_.row(first + j)[lone];
    }
    const int64_t stride = problem_.bias.queries == 1 ? 0 : problem_.keys;
    for (int64_t i = 0; i < block.queries(); ++i) {
      T* sum = bias_sum + (block.first + i) * stride + first;
      const T* row = bias_rows_.row(i);
      for (int64_t j = 0; j < keys; j += kLanes<T>) {
        store_up_to(sum + j, load_up_to(sum + j, keys - j) + load(row + j), keys - j);
      }
    }
  }

  const AttentionProblem& problem_;
  QueryBlocks<T> blocks_;
  const T* lse_;
  SequenceRows<S> grad_, query_, key_, value_, grad_query_, grad_key_, grad_value_;
  ScoreBias<T> bias_;
  bool wants_bias_grad_;
  Matrix<T> query_transposed_, grad_transposed_, grad_query_transposed_;  // [D][queries]
  Matrix<T> probabilities_, scores_grad_;                                 // P^T and dS^T, [keys][queries]
  Matrix<T> bias_rows_;                                                   // dS, [queries][keys]
  T scale_;
  int64_t bytes_;
};

template <class S>
void attention_forward_of(const AttentionForward& call) {
  const AttentionProblem& problem = call.problem;
  const int64_t blocks = QueryBlocks<Compute<S>>(problem.queries).count();
  const int64_t bytes = AttentionForwardBlock<S>(call, Arena()).bytes();
  constexpr int64_t kWorthwhile = 1 << 20;  // multiply-adds for a thread, some 20 microseconds
  const int64_t work = 2 * QueryBlocks<Compute<S>>::kMostQueries * problem.keys * problem.dim;
  parallel_for(problem.batch * problem.heads * blocks, 1 + kWorthwhile / work, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    AttentionForwardBlock<S> attend(call, Arena(scratch.data()));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks;
      attend(head / problem.heads, head % problem.heads, i % blocks);
    }
  });
}

template <class S>
void attention_backward_of(const AttentionBackward& call) {
  using T = Compute<S>;
  const AttentionProblem& problem = call.problem;
  const int64_t bytes = AttentionBackwardHead<S>(call, Arena()).bytes();
  const BiasView& bias = problem.bias;
  // The heads that share one bias; without a bias, each stands alone.
  const int64_t group_batch = bias.data == nullptr ? problem.batch : bias.batch;
  const int64_t group_heads = bias.data == nullptr ? problem.heads : bias.heads;
  const int64_t batches = problem.batch / group_batch, heads = problem.heads / group_heads;
  const int64_t members = batches * heads, bias_size = bias.queries * problem.keys;
  parallel_for(group_batch * group_heads * call.splits, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    AttentionBackwardHead<S> differentiate(call, Arena(scratch.data()));
    for (int64_t run = begin; run < end; ++run) {
      const int64_t group = run / call.splits, split = run % call.splits;
      T* sum = call.bias_grad == nullptr ? nullptr : static_cast<T*>(call.bias_grad) + run * bias_size;
      if (sum != nullptr) std::fill_n(sum, bias_size, T{0});
      for (int64_t i = members * split / call.splits; i < members * (split + 1) / call.splits; ++i) {
        const int64_t batch = group / group_heads * batches + i / heads;
        const int64_t head = group % group_heads * heads + i % heads;
        differentiate(batch, head, sum);
      }
    }
  });
}

void attention_forward(const AttentionForward& call) {
  with_storage(call.problem.storage, [&](auto s) { attention_forward_of<decltype(s)>(call); });
}

void attention_backward(const AttentionBackward& call) {
  with_storage(call.problem.storage, [&](auto s) { attention_backward_of<decltype(s)>(call); });
}

}  // namespace

extern const AttentionKernels attention_kernels = {attention_forward, attention_backward};

}  // namespace vitfast::cpu::VITFAST_ISA
