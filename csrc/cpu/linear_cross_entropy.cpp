// A linear layer with the cross-entropy of its logits, and the gradients; the formulas stand in
// leedl_fast/reference/linear_cross_entropy.py.
//
// Rows whose target is ignored are left out first. The others come in chunks of kChunkRows, classes in blocks of
// kBlockClasses. The logits are made transposed, class by class with the rows of a chunk side by side: so sums over
// classes are sums of whole vectors, and the logits' gradient is the left operand of both products that follow, of
// dweight as it lies (a row for each class) and of dhidden read column by column; it is never packed.
//
// A task is one slice of the classes for one group of chunks. Per chunk it makes its logits, replaces them by
// exp(logit - maximum of the block) and keeps the sums; when all slices have, lse is known, and a factor per row and
// block makes probabilities out of them. It then adds to its own rows of dweight, and to a dhidden of its own; these are
// added up slice by slice, and the groups' dweight group by memory. Few classes make few slices, then several groups work
// at once. How many of both depends on the sizes alone, so threads change no result.
//
// Bytes, for float and 256 features: a block of logits 98 K, the packed hidden rows 224 K for each product, the packed
// weights 112 K, the partial dhidden 224 K: each product has its operands in a second-level cache of 1 M. More features
// than kDepth are taken kDepth at a time.
#include "linear_cross_entropy.h"

#include <omp.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "bindings.h"
#include "huge_pages.h"

namespace leedl {
namespace {

constexpr int64_t kSerialProducts = 200000;  // smaller problems are done before a second thread has woken up

template <typename X>
class Run {
 public:
  using T = Accumulate<X>;

  explicit Run(const LinearCrossEntropy<X>& args)
      : args_(args), plan_(args), smoothing_(static_cast<T>(args.label_smoothing)), losses_(plan_.kept.size()) {}

  void run() {
    const bool parallel = plan_.rows() * args_.classes * args_.features >= kSerialProducts;
    const int threads = parallel ? std::max(args_.num_threads, 1) : 1;
    const int64_t chunks = plan_.slices == 1 ? threads : plan_.groups;
    const int64_t chunk_size = ChunkMemory<T>(nullptr, plan_).size, scratch_size = Scratch<T>(nullptr, plan_).size;
    const int64_t count = chunks * chunk_size + threads * scratch_size + partial_size();
    const Buffer<T> memory = allocate<T>(count);
    advise_huge_pages(memory.get(), count * static_cast<int64_t>(sizeof(T)));
    for (int64_t i = 0; i < chunks; ++i) memories_.emplace_back(memory.get() + i * chunk_size, plan_);
    T* const scratches = memory.get() + chunks * chunk_size;
    make_partials(scratches + threads * scratch_size);
    if (plan_.gradients) clear_gradients();

#pragma omp parallel num_threads(threads) if (parallel)
    {
      const Scratch<T> scratch(scratches + omp_get_thread_num() * scratch_size, plan_);
      if (plan_.slices == 1) {
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
  using V = Vec<T>;
  static constexpr int64_t kLanes = V::kSize;
  static constexpr int64_t kLaneGroups = kChunkRows / kLanes;  // of the rows of a chunk
  static constexpr T kLog2e = static_cast<T>(1.44269504088896340735992468100189214L);

  // One chunk of one memory.
  struct Work {
    Chunk chunk;
    bool first;  // of the group's chunks
    const ChunkMemory<T>& memory;
    const Partial<T>& partial;
  };

  // A chunk whose classes are one slice.
  void run_alone(const Work& work, const Scratch<T>& scratch) {
    const int64_t rows = work.chunk.rows;
    for (int64_t lane = 0; lane < rows; lane += kLanes) pack_hidden(work, lane, scratch);
    make_logits(work, 0, scratch);
    for (int64_t lane = 0; lane < rows; lane += kLanes) make_losses(work, lane);
    if (!plan_.gradients) return;
    make_gradients(work, 0, scratch);
    for (int64_t lane = 0; lane < rows; lane += kLanes) add_slices(work, lane);
  }

  // A chunk of each group, by all threads.
  void run_together(int64_t step, const Scratch<T>& scratch) {
    const auto for_lanes = [&](int64_t i, const auto& body) {
      const Work work = this->work(step, i / kLaneGroups);
      const int64_t lane = i % kLaneGroups * kLanes;
      if (lane < work.chunk.rows) body(work, lane);
    };
    const int64_t packs = plan_.groups * kLaneGroups, tasks = plan_.groups * plan_.slices;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < packs; ++i) {
      for_lanes(i, [&](const Work& work, int64_t lane) { pack_hidden(work, lane, scratch); });
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) make_logits(work(step, i / plan_.slices), i % plan_.slices, scratch);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < packs; ++i) {
      for_lanes(i, [&](const Work& work, int64_t lane) { make_losses(work, lane); });
    }
    if (!plan_.gradients) return;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) make_gradients(work(step, i / plan_.slices), i % plan_.slices, scratch);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < packs; ++i) {
      for_lanes(i, [&](const Work& work, int64_t lane) { add_slices(work, lane); });
    }
  }

  Work work(int64_t step, int64_t group) const {
    return {plan_.chunk(step, group), step == 0, memories_[group], partials_[group]};
  }

  int64_t partial_size() const {
    return plan_.gradients ? std::max<int64_t>(plan_.groups - 1, 0) * args_.classes * (args_.features + 1) : 0;
  }

  void make_partials(T* base) {
    if (plan_.groups > 0) partials_.push_back({args_.dweight, args_.dbias});
    for (int64_t i = 1; i < plan_.groups; ++i) {
      T* const dweight = plan_.gradients ? base + (i - 1) * args_.classes * (args_.features + 1) : nullptr;
      partials_.push_back({dweight, plan_.gradients ? dweight + args_.classes * args_.features : nullptr});
    }
  }

  // A lane group of rows of the hidden states, in both packings, and the gradient of each row's loss.
  void pack_hidden(const Work& work, int64_t begin, const Scratch<T>& scratch) {
    const ChunkMemory<T>& memory = work.memory;
    const int64_t rows = std::min(work.chunk.rows - begin, kLanes);
    std::fill_n(memory.dlosses + begin, kLanes, T(0));
    std::fill_n(memory.target_logits + begin, kLanes, std::numeric_limits<T>::quiet_NaN());
    const T scale = args_.mean ? T(1) / static_cast<T>(plan_.rows()) : T(1);
    const int64_t* const kept = plan_.kept.data() + work.chunk.first + begin;
    for (int64_t i = 0; i < rows; ++i) {
      memory.dlosses[begin + i] = args_.dloss != nullptr ? load_number(args_.dloss + kept[i]) : scale;
    }
    if constexpr (std::is_same_v<X, T>) {
      if (kept[rows - 1] == kept[0] + rows - 1) {
        pack_lanes(memory, begin, args_.hidden + kept[0] * args_.hidden_stride, args_.hidden_stride, rows);
        return;
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const X* const row = args_.hidden + kept[i] * args_.hidden_stride;
      pack_panels(scratch.rows + i * plan_.pitch, kLanes, row, 0, 1, args_.features);
    }
    pack_lanes(memory, begin, scratch.rows, plan_.pitch, rows);
  }

  void pack_lanes(const ChunkMemory<T>& memory, int64_t begin, const T* from, int64_t stride, int64_t rows) const {
    pack_transposed(memory.columns + begin * args_.features, from, stride, rows, args_.features);
    if (plan_.gradients) {
      pack_panels(memory.panels + begin * kLanes, kChunkRows * kLanes, from, stride, rows, args_.features);
    }
  }

  // The logits of a slice, replaced by exp(logit - maximum of the block), and the statistics of each block.
  void make_logits(const Work& work, int64_t slice, const Scratch<T>& scratch) {
    const ChunkMemory<T>& memory = work.memory;
    const Chunk& chunk = work.chunk;
    if (chunk.rows == 0) return;
    const int64_t lane_groups = divide_up(chunk.rows, kLanes);
    plan_.for_each_block(slice, [&](int64_t first_class, int64_t classes, int64_t block) {
      T* const logits = plan_.gradients ? memory.logits + first_class * kChunkRows : scratch.logits;
      for (int64_t k = 0; k < args_.features; k += kDepth) {
        const int64_t depth = std::min(kDepth, args_.features - k);
        for (int64_t strip = 0; strip < classes; strip += kTileRows) {
          const int64_t first = first_class + strip, valid = std::min(kTileRows, classes - strip);
          pack_rows<kTileRows, kPitch>(scratch.strip, args_.weight + first * args_.weight_stride + k,
                                       args_.weight_stride, valid, depth, T(1));
          T bias[kTileRows] = {};
          for (int64_t i = 0; i < valid && args_.bias != nullptr; ++i) bias[i] = load_number(args_.bias + first + i);
          with_tile_height(valid, [&](auto height) {
            tile_rows<height(), TileLayout<kPitch, 1>>(
                depth, scratch.strip, memory.columns + k * kLanes, args_.features * kLanes, lane_groups,
                [&](int64_t row, int64_t lanes, V value) {
                  T* const to = logits + (strip + row) * kChunkRows + lanes * kLanes;
                  (value + (k == 0 ? V::broadcast(bias[row]) : V::load(to))).store(to);
                });
          });
        }
      }
      for_each_target(chunk, first_class, classes, [&](int64_t row, int64_t target) {
        memory.target_logits[row] = logits[target * kChunkRows + row];
      });
      for (int64_t lanes = 0; lanes < lane_groups; ++lanes) {
        block_statistics(memory, logits + lanes * kLanes, classes, block * kChunkRows + lanes * kLanes);
      }
    });
  }

  // Calls body(row of the chunk, class of the block) for each row whose target is one of `classes` classes.
  template <typename Body>
  void for_each_target(const Chunk& chunk, int64_t first_class, int64_t classes, const Body& body) const {
    for (int64_t row = 0; row < chunk.rows; ++row) {
      const int64_t target = args_.targets[plan_.kept[chunk.first + row]] - first_class;
      if (target >= 0 && target < classes) body(row, target);
    }
  }

  void block_statistics(const ChunkMemory<T>& memory, T* logits, int64_t classes, int64_t at) const {
    // Not from -inf: where all logits are -inf they would be subtracted from themselves.
    V largest = V::broadcast(std::numeric_limits<T>::lowest());
    for (int64_t i = 0; i < classes; ++i) largest = max(V::load(logits + i * kChunkRows), largest);
    if (smoothing_ != 0) {
      V sum = V::zero();
      for (int64_t i = 0; i < classes; ++i) sum = sum + V::load(logits + i * kChunkRows);
      sum.store(memory.logit_sums + at);
    }
    V sum = V::zero();
    const V scale = V::broadcast(kLog2e);
    for (int64_t i = 0; i < classes; ++i) {
      const V p = exp2((V::load(logits + i * kChunkRows) - largest) * scale);
      p.store(logits + i * kChunkRows);
      sum = sum + p;
    }
    largest.store(memory.maxima + at);
    sum.store(memory.sums + at);
  }

  // The losses of a lane group of rows; the maxima become what makes probabilities times dloss of each block.
  void make_losses(const Work& work, int64_t begin) {
    const ChunkMemory<T>& memory = work.memory;
    const int64_t rows = std::min(work.chunk.rows - begin, kLanes);
    V largest = V::broadcast(std::numeric_limits<T>::lowest()), sum = V::zero(), logit_sum = V::zero();
    for (int64_t at = begin; at < plan_.blocks * kChunkRows; at += kChunkRows) {
      largest = max(V::load(memory.maxima + at), largest);
    }
    for (int64_t at = begin; at < plan_.blocks * kChunkRows; at += kChunkRows) {
      const V factor = exp2((V::load(memory.maxima + at) - largest) * V::broadcast(kLog2e));
      sum = mul_add(V::load(memory.sums + at), factor, sum);
      factor.store(memory.maxima + at);
      if (smoothing_ != 0) logit_sum = logit_sum + V::load(memory.logit_sums + at);
    }
    V loss = (largest - V::load(memory.target_logits + begin)) * V::broadcast(1 - smoothing_);
    if (smoothing_ != 0) {
      const V mean = logit_sum / V::broadcast(static_cast<T>(args_.classes));
      loss = mul_add(largest - mean, V::broadcast(smoothing_), loss);
    }
    T losses[kLanes];
    (loss + log(sum)).store(losses);
    for (int64_t i = 0; i < rows; ++i) {
      losses_[work.chunk.first + begin + i] = losses[i];
      // A target that is no class has no gradient either.
      if (std::isnan(memory.target_logits[begin + i])) memory.dlosses[begin + i] = memory.target_logits[begin + i];
    }
    const V scale = V::load(memory.dlosses + begin) / sum;
    for (int64_t at = begin; at < plan_.blocks * kChunkRows; at += kChunkRows) {
      (V::load(memory.maxima + at) * scale).store(memory.maxima + at);
    }
  }

  // The gradient of a slice's logits, and what it adds to dweight, dbias and the slice's dhidden.
  void make_gradients(const Work& work, int64_t slice, const Scratch<T>& scratch) {
    const ChunkMemory<T>& memory = work.memory;
    const Chunk& chunk = work.chunk;
    if (chunk.rows == 0) return;
    T* const dhidden = memory.dhidden + slice * kChunkRows * plan_.pitch;
    bool first_block = true;
    plan_.for_each_block(slice, [&](int64_t first_class, int64_t classes, int64_t block) {
      T* const dlogits = memory.logits + first_class * kChunkRows;
      const T* const factors = memory.maxima + block * kChunkRows;
      const V uniform = V::broadcast(smoothing_ / static_cast<T>(args_.classes));
      for (int64_t i = 0; i < classes; ++i) {
        T* const row = dlogits + i * kChunkRows;
        for (int64_t lane = 0; lane < chunk.rows; lane += kLanes) {
          const V p = V::load(row + lane) * V::load(factors + lane);
          (p - V::load(memory.dlosses + lane) * uniform).store(row + lane);
        }
      }
      for_each_target(chunk, first_class, classes, [&](int64_t row, int64_t target) {
        dlogits[target * kChunkRows + row] -= memory.dlosses[row] * (1 - smoothing_);
      });
      if (args_.dbias != nullptr) {
        for (int64_t i = 0; i < classes; ++i) {
          T* const to = work.partial.dbias + first_class + i;
          const T sum = row_sum(dlogits + i * kChunkRows, chunk.rows);
          *to = work.first ? sum : *to + sum;
        }
      }
      for (int64_t column = 0; column < args_.features; column += kDepth) {
        const int64_t columns = std::min(kDepth, args_.features - column);
        add_to_dweight(work, dlogits, first_class, classes, column, columns);
        pack_panels(scratch.weights, kBlockClasses * kLanes,
                    args_.weight + first_class * args_.weight_stride + column, args_.weight_stride, classes, columns);
        add_to_dhidden(dhidden + column, dlogits, scratch.weights, classes, chunk.rows, columns, first_block);
      }
      first_block = false;
    });
  }

  static T row_sum(const T* row, int64_t n) {
    V sum = V::zero();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) sum = sum + V::load(row + i);
    if (i < n) sum = sum + V::load_first(row + i, n - i);
    return reduce_add(sum);
  }

  void add_to_dweight(const Work& work, const T* dlogits, int64_t first_class, int64_t classes, int64_t column,
                      int64_t columns) const {
    for (int64_t strip = 0; strip < classes; strip += kTileRows) {
      const int64_t valid = std::min(kTileRows, classes - strip);
      T* const out = work.partial.dweight + (first_class + strip) * args_.features + column;
      with_tile_height(valid, [&](auto height) {
        tile_rows<height(), TileLayout<kChunkRows, 1>>(
            work.chunk.rows, dlogits + strip * kChunkRows, work.memory.panels + column * kChunkRows, kChunkRows * kLanes,
            divide_up(columns, kLanes), [&](int64_t row, int64_t panel, V value) {
              if (row >= valid) return;
              T* const to = out + row * args_.features + panel * kLanes;
              const int64_t width = columns - panel * kLanes;
              if (width >= kLanes) {
                (work.first ? value : V::load(to) + value).store(to);
              } else {
                (work.first ? value : V::load_first(to, width) + value).store_first(to, width);
              }
            });
      });
    }
  }

  void add_to_dhidden(T* dhidden, const T* dlogits, const T* weights, int64_t classes, int64_t rows, int64_t columns,
                      bool first) const {
    for (int64_t strip = 0; strip < rows; strip += kTileRows) {
      T* const out = dhidden + strip * plan_.pitch;
      with_tile_height(rows - strip, [&](auto height) {
        tile_rows<height(), TileLayout<1, kChunkRows>>(
            classes, dlogits + strip, weights, kBlockClasses * kLanes, divide_up(columns, kLanes),
            [&](int64_t row, int64_t panel, V value) {
              T* const to = out + row * plan_.pitch + panel * kLanes;
              (first ? value : V::load(to) + value).store(to);
            });
      });
    }
  }

  // dhidden of a lane group of rows: the sum over the slices.
  void add_slices(const Work& work, int64_t begin) {
    for (int64_t row = begin; row < std::min(work.chunk.rows, begin + kLanes); ++row) {
      const T* const from = work.memory.dhidden + row * plan_.pitch;
      T* const to = args_.dhidden + plan_.kept[work.chunk.first + row] * args_.features;
      for (int64_t column = 0; column < args_.features; column += kLanes) {
        V sum = V::load(from + column);
        for (int64_t slice = 1; slice < plan_.slices; ++slice) {
          sum = sum + V::load(from + slice * kChunkRows * plan_.pitch + column);
        }
        sum.store_first(to + column, std::min(kLanes, args_.features - column));
      }
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

  static T load_number(const X* p) {
    T lanes[kLanes];
    V::load_first(p, 1).store(lanes);
    return lanes[0];
  }
  static void store_number(T x, X* p) { V::broadcast(x).store_first(p, 1); }

  const LinearCrossEntropy<X>& args_;
  const Plan plan_;
  const T smoothing_;
  std::vector<T> losses_;  // of the kept rows
  std::vector<ChunkMemory<T>> memories_;
  std::vector<Partial<T>> partials_;
};

// `loss` or `dhidden` and `dweight` may be null, and are not made; dloss null means 1.
void linear_cross_entropy(int dtype, std::uintptr_t loss, std::uintptr_t dhidden, std::uintptr_t dweight,
                          std::uintptr_t dbias, std::uintptr_t dloss, std::uintptr_t hidden, std::uintptr_t weight,
                          std::uintptr_t bias, std::uintptr_t targets, int64_t rows, int64_t features, int64_t classes,
                          int64_t hidden_stride, int64_t weight_stride, int64_t ignore_index, bool per_row, bool mean,
                          double label_smoothing, int num_threads) {
  dispatch(dtype, [&](auto tag) {
    using X = typename decltype(tag)::Type;
    using T = Accumulate<X>;
    const LinearCrossEntropy<X> args = {
        pointer<X>(loss), pointer<T>(dhidden), pointer<T>(dweight), pointer<T>(dbias), pointer<const X>(dloss),
        pointer<const X>(hidden), pointer<const X>(weight), pointer<const X>(bias), pointer<const int64_t>(targets),
        rows, features, classes, hidden_stride, weight_stride, ignore_index, per_row, mean, label_smoothing,
        num_threads};
    Run<X>(args).run();
  });
}

}  // namespace

void bind_linear_cross_entropy(pybind11::module_& m) {
  m.def("linear_cross_entropy", &linear_cross_entropy, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace leedl
