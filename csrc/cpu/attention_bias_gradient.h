// The gradient of attention's bias: dS, added up over whatever dimensions the bias is broadcast along.
//
// Its order is fixed by the sizes. Every task of the backward pass owns a chunk of keys for the query heads of one key
// head of one sample. Where samples or heads share a row of dbias, they add to it in their order, a block of queries at
// a time: a counter tells whose turn it is, and tasks of one chunk begin in that order. Where queries share a row, a
// task adds up its own queries first and takes one turn in the end.
#pragma once

#include <atomic>
#include <thread>

#include "attention.h"

namespace leedl {

// Whose turn it is among those that add to the same numbers.
class Turn {
 public:
  void wait_for(int64_t rank) const {
    while (taken_.load(std::memory_order_acquire) != rank) std::this_thread::yield();
  }
  void pass_on() { taken_.fetch_add(1, std::memory_order_release); }

 private:
  std::atomic<int64_t> taken_{0};
};

template <typename A>
class BiasGradient {
 public:
  // A task holds at most task_keys keys and takes block_rows queries at a time; chunks: of keys, query_blocks: per head.
  BiasGradient(const BiasTensor<A>& dbias, int64_t size, const AttentionSizes& sizes, int64_t task_keys,
               int64_t block_rows, int64_t chunks, int64_t query_blocks, int threads)
      : dbias_(dbias),
        size_(size),
        by_query_(dbias.query_stride != 0 || sizes.seqlen_q == 1),
        // A row's place in its turn: among all samples that share it, or all heads, or both.
        sample_rank_(dbias.batch_stride != 0 ? 0 : dbias.head_stride != 0 ? 1 : sizes.num_heads),
        head_rank_(dbias.head_stride != 0 ? 0 : 1),
        shared_((sample_rank_ != 0 && sizes.batch > 1) || (head_rank_ != 0 && sizes.num_heads > 1)),
        num_heads_(sizes.num_heads),
        group_(sizes.num_heads_k == 0 ? 0 : sizes.group()),
        task_keys_(task_keys),
        block_rows_(block_rows),
        chunks_(chunks),
        seqlen_q_(sizes.seqlen_q),
        query_blocks_(by_query_ ? query_blocks : 1),
        threads_(threads) {
    if (!wanted()) return;
    rows_ = allocate<A>(threads * rows_of_thread() * task_keys);
    taken_.resize(threads * group_ * query_blocks_);
    if (shared_) turns_ = std::vector<Turn>(sizes.batch * num_heads_ * chunks * query_blocks_);
  }

  bool wanted() const { return dbias_.data != nullptr; }

  // Every thread of a parallel region calls it.
  void zero() const {
#pragma omp for schedule(static)
    for (int part = 0; part < threads_; ++part) {
      std::fill(dbias_.data + size_ * part / threads_, dbias_.data + size_ * (part + 1) / threads_, A(0));
    }
  }

  // What one task of the backward pass adds.
  class Task {
   public:
    Task(BiasGradient& whole, int thread, int64_t batch, int64_t first_head, int64_t chunk, int64_t keys)
        : whole_(whole), batch_(batch), first_head_(first_head), chunk_(chunk), keys_(keys) {
      if (!whole.wanted()) return;
      rows_ = whole.rows_.get() + thread * whole.rows_of_thread() * whole.task_keys_;
      sums_ = rows_ + whole.task_keys_;
      if (!whole.by_query_) std::fill_n(sums_, whole.group_ * whole.task_keys_, A(0));
      taken_ = whole.taken_.data() + thread * whole.group_ * whole.query_blocks_;
      std::fill_n(taken_, whole.group_ * whole.query_blocks_, false);
    }

    bool wanted() const { return whole_.wanted(); }

    void begin_block(int64_t head, int64_t row_begin) {
      head_ = head;
      row_begin_ = row_begin;
      if (!whole_.wanted()) return;
      std::fill_n(rows_, (whole_.by_query_ ? whole_.block_rows_ : 1) * whole_.task_keys_, A(0));
    }

    // dS of a query of the block, for `count` of the task's keys from `key` on.
    void add(int64_t row, int64_t key, int64_t count, const A* ds) {
      if (!whole_.wanted()) return;
      A* to = rows_ + (whole_.by_query_ ? row - row_begin_ : 0) * whole_.task_keys_ + key;
      for (int64_t i = 0; i < count; ++i) to[i] += ds[i];
    }

    void end_block() {
      if (!whole_.wanted()) return;
      if (!whole_.by_query_) {
        A* to = sums_ + (head_ - first_head_) * whole_.task_keys_;
        for (int64_t i = 0; i < keys_; ++i) to[i] += rows_[i];
        return;
      }
      put(head_, row_begin_ / whole_.block_rows_, rows_);
    }

    // Whoever adds nothing to a block lets the next one pass all the same.
    void finish() {
      if (!whole_.wanted()) return;
      for (int64_t block = 0; block < whole_.query_blocks_; ++block) {
        for (int64_t i = 0; i < whole_.group_; ++i) {
          if (taken_[i * whole_.query_blocks_ + block]) continue;
          put(first_head_ + i, block, whole_.by_query_ ? nullptr : sums_ + i * whole_.task_keys_);
        }
      }
    }

   private:
    void put(int64_t head, int64_t block, const A* from) {
      const int64_t sample = whole_.sample_rank_ != 0 ? 0 : batch_, shared_head = whole_.head_rank_ != 0 ? 0 : head;
      const int64_t owner = (sample * whole_.num_heads_ + shared_head) * whole_.chunks_ + chunk_;
      Turn* turn = whole_.shared_ ? &whole_.turns_[owner * whole_.query_blocks_ + block] : nullptr;
      if (turn != nullptr) turn->wait_for(batch_ * whole_.sample_rank_ + head * whole_.head_rank_);
      if (from != nullptr) {
        const int64_t first = whole_.by_query_ ? block * whole_.block_rows_ : 0;
        const int64_t end = whole_.by_query_ ? std::min(first + whole_.block_rows_, whole_.seqlen_q_) : 1;
        for (int64_t row = first; row < end; ++row, from += whole_.task_keys_) {
          A* to = whole_.dbias_.row(batch_, head, row) + chunk_ * whole_.task_keys_;
          for (int64_t i = 0; i < keys_; ++i) to[i] += from[i];
        }
      }
      if (turn != nullptr) turn->pass_on();
      taken_[(head - first_head_) * whole_.query_blocks_ + block] = true;
    }

    BiasGradient& whole_;
    const int64_t batch_, first_head_, chunk_, keys_;
    int64_t head_ = 0, row_begin_ = 0;
    A *rows_ = nullptr, *sums_ = nullptr;  // of the block; by head where queries share a row
    char* taken_ = nullptr;                // (group, query_blocks): turns this task has had
  };

 private:
  // Of task_keys numbers each: a block, or the sum of its queries and those of all blocks for each head.
  int64_t rows_of_thread() const { return by_query_ ? block_rows_ : 1 + group_; }

  const BiasTensor<A> dbias_;
  const int64_t size_;
  const bool by_query_;
  const int64_t sample_rank_, head_rank_;
  const bool shared_;
  const int64_t num_heads_, group_, task_keys_, block_rows_, chunks_, seqlen_q_, query_blocks_;
  const int threads_;
  Buffer<A> rows_;
  std::vector<char> taken_;
  std::vector<Turn> turns_;
};

}  // namespace leedl
