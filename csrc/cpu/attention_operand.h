// The tokens and the bias of a head as the matrices that the kernels of attention work on.
#pragma once

#include "cpu/attention.h"
#include "cpu/prefetch.h"
#include "cpu/softmax.h"

namespace vitfast::cpu::VITFAST_ISA {
namespace {

// One head of one image.
struct Head {
  int64_t batch, head;
};

// One tensor's tokens of one head, as rows [count][D].
//
// They are used where they lie if their elements are adjacent, of the computing dtype and whole vectors. Otherwise
// `gather` copies them and `scatter` puts them back.
template <class S>
class SequenceRows {
 public:
  using Storage = S;
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

  // Of all `count` tokens of a head; of no use to tokens whose elements lie apart.
  Prefetch prefetch(const Head& head, int64_t count, int64_t steps) const {
    constexpr int64_t size = sizeof(S);
    const S* data = static_cast<const S*>(view_.data) + head.batch * view_.stride[0] + head.head * view_.stride[1];
    return {data, 0, view_.stride[2] * size, 1, count, view_.stride[3] == 1 ? dim_ * size : 0, steps};
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

// How many keys' bias is transposed at a time.
inline constexpr int64_t kKeysOfBias = 64;

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

// Adds rows of a matrix, [queries][keys], each from column `first` on, to the sums of a bias, whose rows are `stride`
// apart.
template <class T>
void add_bias_rows(const Matrix<T>& rows, int64_t first, int64_t keys, const QueryBlock& block, int64_t stride,
                   T* sums) {
  for (int64_t i = 0; i < block.queries(); ++i) {
    T* sum = sums + (block.first + i) * stride + first;
    const T* row = rows.row(i);
    for (int64_t j = 0; j < keys; j += kLanes<T>) {
      store_up_to(sum + j, load_up_to(sum + j, keys - j) + load(row + j), keys - j);
    }
  }
}

// The heads of a call in runs that threads take. Where gradients of a bias are summed up, those that share one bias are
// cut into `splits` runs, each summed in order: the result does not depend on the number of threads. Otherwise each
// head is a run.
class HeadRuns {
 public:
  HeadRuns(const AttentionProblem& problem, bool sums_bias, int64_t splits)
      : heads_(sums_bias ? problem.bias.heads : problem.heads),
        batch_per_group_(sums_bias ? problem.batch / problem.bias.batch : 1),
        heads_per_group_(problem.heads / heads_),
        splits_(sums_bias ? splits : 1),
        groups_(problem.batch / batch_per_group_ * heads_) {}

  int64_t count() const { return groups_ * splits_; }

  // Calls f(head, next), where `next` is the head that follows, perhaps in the next run.
  template <class F>
  void for_each_head(int64_t run, F f) const {
    const int64_t begin = first_of(run % splits_), end = first_of(run % splits_ + 1);
    for (int64_t i = begin; i < end; ++i) {
      const Head head = at(run, i);
      if (i + 1 < end) {
        f(head, at(run, i + 1));
      } else {
        f(head, run + 1 < count() ? at(run + 1, first_of((run + 1) % splits_)) : head);
      }
    }
  }

 private:
  // Of the heads of a group, the first of a split.
  int64_t first_of(int64_t split) const { return batch_per_group_ * heads_per_group_ * split / splits_; }
  Head at(int64_t run, int64_t i) const {
    const int64_t group = run / splits_;
    return {group / heads_ * batch_per_group_ + i / heads_per_group_,
            group % heads_ * heads_per_group_ + i % heads_per_group_};
  }

  int64_t heads_, batch_per_group_, heads_per_group_, splits_, groups_;
};

}  // namespace
}  // namespace vitfast::cpu::VITFAST_ISA
