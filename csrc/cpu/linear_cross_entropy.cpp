// A linear layer with the cross-entropy of its logits, and the gradients; the formulas stand in
// leedl_fast/reference/linear_cross_entropy.py.
//
// Rows whose target is ignored are left out first. The others come in chunks of kChunkRows, classes in blocks of
// P::kBlockClasses. The logits are made transposed, class by class with the rows of a chunk side by side: so sums over
// classes are sums of whole vectors, and the logits' gradient is the left operand of both products that follow, of
// dweight as it lies (a row for each class) and of dhidden read column by column; it is packed only to be rounded: where
// the processor multiplies pairs of bfloat16 numbers and the tensors hold such numbers, all operands are pairs, and the
// logits' gradient is what plain PyTorch has too, bfloat16. On AMX, which reads no columns, it is transposed for dhidden.
//
// A task is one slice of the classes for one group of chunks. Per chunk it makes its logits, replaces them by
// exp(logit - maximum of the block) and keeps the sums; when all slices have, lse is known, and a factor per row and
// block makes probabilities out of them. It then adds to its own rows of dweight, and to a dhidden of its own; these are
// added up slice by slice, and the groups' dweight group by group. Few classes make few slices, then several groups work
// at once. How many of both depends on the sizes alone, so threads change no result, but only who does what: one thread
// all slices of a group where the groups are enough for the threads, else all threads the slices of all groups.
//
// Bytes, for float and 256 features: a block of logits 98 K, the packed hidden rows 224 K for each product, the packed
// weights 112 K, the partial dhidden 224 K: each product has its operands in a second-level cache of 1 M. More features
// than kDepth are taken kDepth at a time.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "entry_points.h"
#include "huge_pages.h"
#include "linear_cross_entropy_tasks.h"

namespace leedl {
namespace {

constexpr int64_t kSerialProducts = 200000;  // smaller problems are done before a second thread has woken up
constexpr int64_t kGroupsPerThread = 4;      // are enough for threads to take whole groups

template <typename X, typename P>
class Run {
 public:
  using T = Accumulate<X>;

  explicit Run(const LinearCrossEntropy<X>& args)
      : args_(args), plan_(args, P::kBlockClasses), losses_(plan_.kept.size()), tasks_(args, plan_, losses_.data()) {}

  void run() {
    const bool parallel = plan_.rows() * args_.classes * args_.features >= kSerialProducts;
    const int threads = parallel ? std::max(args_.num_threads, 1) : 1;
    const bool alone =
        plan_.slices == 1 || plan_.groups % threads == 0 || plan_.groups >= kGroupsPerThread * threads;
    const int64_t chunks = alone ? threads : plan_.groups;
    const int64_t chunk_bytes = ChunkMemory<P>(nullptr, plan_).bytes, scratch_bytes = Scratch<X, P>(nullptr, plan_).bytes;
    const int64_t bytes = chunks * chunk_bytes + threads * scratch_bytes + partial_bytes();
    const Buffer<std::byte> memory = allocate<std::byte>(bytes);
    advise_huge_pages(memory.get(), bytes);
    for (int64_t i = 0; i < chunks; ++i) memories_.emplace_back(memory.get() + i * chunk_bytes, plan_);
    std::byte* const scratches = memory.get() + chunks * chunk_bytes;
    make_partials(reinterpret_cast<T*>(scratches + threads * scratch_bytes));
    if (plan_.gradients) {
      advise_huge_pages(args_.dhidden, args_.rows * args_.features * static_cast<int64_t>(sizeof(T)));
      advise_huge_pages(args_.dweight, args_.classes * args_.features * static_cast<int64_t>(sizeof(T)));
      clear_gradients();
    }

#pragma omp parallel num_threads(threads) if (parallel)
    {
      const TileRegisters registers(P::kOnAmx);
      const Scratch<X, P> scratch(scratches + omp_get_thread_num() * scratch_bytes, plan_);
      if (alone) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t group = 0; group < plan_.groups; ++group) {
          for (int64_t step = 0; step < plan_.steps; ++step) {
            run_alone({plan_.chunk(step, group), step == 0, memories_[omp_get_thread_num()], partials_[group]}, scratch);
          }
        }
      } else {
        for (int64_t step = 0; step < plan_.steps; ++step) run_together(step, scratch);
      }
      if (plan_.gradients && plan_.groups > 1) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < args_.classes; ++i) add_groups(i);
      }
    }
    if (args_.loss != nullptr) write_loss();
  }

 private:
  static constexpr int64_t kLanes = Vec<T>::kSize;
  static constexpr int64_t kLaneGroups = kChunkRows / kLanes;  // of the rows of a chunk

  // A chunk by one thread, which finds all of it in its own cache.
  void run_alone(const Work<P>& work, const Scratch<X, P>& scratch) {
    const int64_t rows = work.chunk.rows;
    for (int64_t lane = 0; lane < rows; lane += kLanes) tasks_.pack_hidden(work, lane, scratch);
    for (int64_t slice = 0; slice < plan_.slices; ++slice) tasks_.make_logits(work, slice, scratch);
    for (int64_t lane = 0; lane < rows; lane += kLanes) tasks_.make_losses(work, lane);
    if (!plan_.gradients) return;
    for (int64_t slice = 0; slice < plan_.slices; ++slice) tasks_.make_gradients(work, slice, scratch);
    if (plan_.slices == 1) return;
    for (int64_t lane = 0; lane < rows; lane += kLanes) tasks_.add_slices(work, lane);
  }

  // A chunk of each group, by all threads.
  void run_together(int64_t step, const Scratch<X, P>& scratch) {
    const auto for_lanes = [&](int64_t i, const auto& body) {
      const Work<P> work = this->work(step, i / kLaneGroups);
      const int64_t lane = i % kLaneGroups * kLanes;
      if (lane < work.chunk.rows) body(work, lane);
    };
    const int64_t packs = plan_.groups * kLaneGroups, tasks = plan_.groups * plan_.slices;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < packs; ++i) {
      for_lanes(i, [&](const Work<P>& work, int64_t lane) { tasks_.pack_hidden(work, lane, scratch); });
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) tasks_.make_logits(work(step, i / plan_.slices), i % plan_.slices, scratch);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < packs; ++i) {
      for_lanes(i, [&](const Work<P>& work, int64_t lane) { tasks_.make_losses(work, lane); });
    }
    if (!plan_.gradients) return;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) tasks_.make_gradients(work(step, i / plan_.slices), i % plan_.slices, scratch);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < packs; ++i) {
      for_lanes(i, [&](const Work<P>& work, int64_t lane) { tasks_.add_slices(work, lane); });
    }
  }

  Work<P> work(int64_t step, int64_t group) const {
    return {plan_.chunk(step, group), step == 0, memories_[group], partials_[group]};
  }

  int64_t partial_bytes() const {
    const int64_t count = std::max<int64_t>(plan_.groups - 1, 0) * args_.classes * (args_.features + 1);
    return plan_.gradients ? count * static_cast<int64_t>(sizeof(T)) : 0;
  }

  void make_partials(T* base) {
    if (plan_.groups > 0) partials_.push_back({args_.dweight, args_.dbias});
    for (int64_t i = 1; i < plan_.groups; ++i) {
      T* const dweight = plan_.gradients ? base + (i - 1) * args_.classes * (args_.features + 1) : nullptr;
      partials_.push_back({dweight, plan_.gradients ? dweight + args_.classes * args_.features : nullptr});
    }
  }

  // dweight and dbias of one class: the sum over the groups.
  void add_groups(int64_t index) {
    const int64_t n = args_.features;
    for (size_t group = 1; group < partials_.size(); ++group) {
      const T* const from = partials_[group].dweight + index * n;
      for (int64_t i = 0; i < n; ++i) args_.dweight[index * n + i] += from[i];
      if (args_.dbias != nullptr) args_.dbias[index] += partials_[group].dbias[index];
    }
  }

  // What no task writes: the gradients of ignored rows, and all of them where there are no others.
  void clear_gradients() {
    size_t next = 0;
    for (int64_t row = 0; row < args_.rows; ++row) {
      if (next < plan_.kept.size() && plan_.kept[next] == row) {
        ++next;
      } else {
        std::fill_n(args_.dhidden + row * args_.features, args_.features, T(0));
      }
    }
    if (!plan_.kept.empty()) return;
    std::fill_n(args_.dweight, args_.classes * args_.features, T(0));
    if (args_.dbias != nullptr) std::fill_n(args_.dbias, args_.classes, T(0));
  }

  void write_loss() const {
    if (args_.per_row) {
      for (int64_t row = 0; row < args_.rows; ++row) store_number(T(0), args_.loss + row);
      for (size_t i = 0; i < plan_.kept.size(); ++i) store_number(losses_[i], args_.loss + plan_.kept[i]);
    } else {
      double sum = 0, lost = 0;  // Kahan's sum: what rounding has taken is subtracted from the next loss
      for (const T loss : losses_) {
        const double next = static_cast<double>(loss) - lost, total = sum + next;
        lost = std::isfinite(total) ? (total - sum) - next : 0;
        sum = total;
      }
      store_number(static_cast<T>(args_.mean ? sum / static_cast<double>(plan_.rows()) : sum), args_.loss);
    }
  }

  static void store_number(T x, X* p) { Vec<T>::broadcast(x).store_first(p, 1); }

  const LinearCrossEntropy<X>& args_;
  const Plan plan_;
  std::vector<T> losses_;  // of the kept rows
  LinearCrossEntropyTasks<X, P> tasks_;
  std::vector<ChunkMemory<P>> memories_;
  std::vector<Partial<T>> partials_;
};

}  // namespace

namespace entry_points {

void linear_cross_entropy(const Tensor& loss, const Tensor& dhidden, const Tensor& dweight, const Tensor& dbias,
                          const Tensor& dloss, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                          const Tensor& targets, int64_t ignore_index, bool per_row, bool mean, double label_smoothing,
                          int num_threads) {
  dispatch(hidden.dtype(), [&](auto tag) {
    using X = typename decltype(tag)::Type;
    using T = Accumulate<X>;
    const LinearCrossEntropy<X> args = {
        loss.data<X>(), dhidden.data<T>(), dweight.data<T>(), dbias.data<T>(), dloss.data<const X>(),
        hidden.data<const X>(), weight.data<const X>(), bias.data<const X>(), targets.data<const int64_t>(),
        hidden.size(0), hidden.size(1), weight.size(0), hidden.stride(0), weight.stride(0), ignore_index, per_row,
        mean, label_smoothing, num_threads};
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<X, BFloat16>) {
      if (can_multiply_pairs()) {
        if (multiplies_on_amx()) return Run<X, AmxProducts>(args).run();
        return Run<X, VectorProducts<BFloat16Pair>>(args).run();
      }
    }
#endif
    Run<X, VectorProducts<T>>(args).run();
  });
}

}  // namespace entry_points
}  // namespace leedl
