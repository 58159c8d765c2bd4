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

#include "cpu/attention_operand.h"
#include "cpu/attention_tangents_kernel.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

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

  // Block `index` of the queries of one head. Meanwhile it prefetches what the head after it will read and write.
  void operator()(int64_t batch, int64_t head, int64_t index) {
    if (batch != batch_ || head != head_) {
      batch_ = batch, head_ = head;
      const int64_t heads = problem_.heads, next = batch * heads + head + 1;
      prefetch_ = prefetch_of(next < problem_.batch * heads ? Head{next / heads, next % heads} : Head{batch, head});
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

  // Taken in as many steps as `attend` makes for all blocks of a head.
  std::array<Prefetch, 4> prefetch_of(const Head& head) const {
    const int64_t queries = problem_.queries, keys = problem_.keys;
    const int64_t steps = std::max<int64_t>(1, 2 * blocks_.count() * parts(keys, kMostKeys));
    return {query_.prefetch(head, queries, steps), key_.prefetch(head, keys, steps), value_.prefetch(head, keys, steps),
            out_.prefetch(head, queries, steps)};
  }
  void fetch_ahead() {
    for (Prefetch& rows : prefetch_) rows.advance(false);
  }

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
      fetch_ahead();
      for (int64_t v = 0; v < block.vectors; ++v) add_block(keys, v * L, first > 0, top + v * L, sum + v * L);
      fetch_ahead();
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
  std::array<Prefetch, 4> prefetch_ = prefetch_of({0, 0});
  int64_t bytes_;
};

template <class S>
class AttentionBackwardHead {
 public:
  using T = Compute<S>;
  static constexpr int64_t kMostKeys = kKeysOfBias;

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

  // bias_sum, (N or 1, M), is what the gradients of the scores are added to, if it is not null. Meanwhile it prefetches
  // what `next` will read and write.
  void operator()(const Head& head, const Head& next, T* bias_sum) {
    for (SequenceRows<S>* rows : {&key_, &value_, &grad_key_, &grad_value_}) {
      rows->select(head.batch, head.head, 0, problem_.keys);
    }
    key_.gather();
    value_.gather();
    bias_.select(head.batch, head.head);
    const T* lse = lse_ + (head.batch * problem_.heads + head.head) * problem_.queries;
    const bool ahead = prefetches();
    const int64_t steps = std::max<int64_t>(1, 2 * blocks_.count() * parts(problem_.keys, kMostKeys));
    Prefetch prefetch[] = {
        query_.prefetch(next, problem_.queries, steps),      grad_.prefetch(next, problem_.queries, steps),
        key_.prefetch(next, problem_.keys, steps),           value_.prefetch(next, problem_.keys, steps),
        grad_query_.prefetch(next, problem_.queries, steps), grad_key_.prefetch(next, problem_.keys, steps),
        grad_value_.prefetch(next, problem_.keys, steps)};
    for (int64_t index = 0; index < blocks_.count(); ++index) {
      const QueryBlock block = blocks_[index];
      for (SequenceRows<S>* rows : {&query_, &grad_, &grad_query_}) {
        rows->select(head.batch, head.head, block.first, block.queries());
      }
      query_.gather();
      grad_.gather();
      differentiate(block, lse + block.first, bias_sum, [&] {
        for (Prefetch& rows : prefetch) {
          if (ahead) rows.advance(false);
        }
      });
      grad_query_.scatter();
    }
    grad_key_.scatter();
    grad_value_.scatter();
  }

 private:
  static constexpr int64_t kWidth = QueryBlocks<T>::kMostVectors * kLanes<T>;
  static constexpr int64_t kRow = kWidth + kLanes<T>;  // of P^T and dS^T: the lone query's column is behind the vectors

  // Whether the next head has room in the second-level cache beside the one at work.
  bool prefetches() const {
    constexpr int64_t kRoom = 448 << 10;
    return (3 * problem_.queries + 4 * problem_.keys) * problem_.dim * static_cast<int64_t>(sizeof(S)) <= kRoom;
  }

  // Calls `meanwhile` twice for every block of keys.
  template <class F>
  void differentiate(const QueryBlock& block, const T* lse, T* bias_sum, F meanwhile) {
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
      meanwhile();
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
      meanwhile();
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
    add_bias_rows(bias_rows_, first, keys, block, problem_.bias.queries == 1 ? 0 : problem_.keys, bias_sum);
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
  const HeadRuns runs(problem, call.bias_grad != nullptr, call.splits);
  const int64_t bias_size = problem.bias.queries * problem.keys;
  parallel_for(runs.count(), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    AttentionBackwardHead<S> differentiate(call, Arena(scratch.data()));
    for (int64_t run = begin; run < end; ++run) {
      T* sum = call.bias_grad == nullptr ? nullptr : static_cast<T*>(call.bias_grad) + run * bias_size;
      if (sum != nullptr) std::fill_n(sum, bias_size, T{0});
      runs.for_each_head(run, [&](const Head& head, const Head& next) { differentiate(head, next, sum); });
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

extern const AttentionKernels attention_kernels = {attention_forward, attention_backward, attention_tangents};

}  // namespace vitfast::cpu::VITFAST_ISA
