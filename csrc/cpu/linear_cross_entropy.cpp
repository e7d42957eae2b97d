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
// added up slice by slice, and the groups' dweight group by group. Few classes make few slices, then several groups work
// at once. How many of both depends on the sizes alone, so threads change no result.
//
// Bytes, for float and 256 features: a block of logits 98 K, the packed hidden rows 224 K for each product, the packed
// weights 112 K, the partial dhidden 224 K: each product has its operands in a second-level cache of 1 M. More features
// than kDepth are taken kDepth at a time.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "bindings.h"
#include "dtypes.h"
#include "gemm.h"
#include "huge_pages.h"
#include "memory.h"
#include "simd.h"

namespace leedl {
namespace {

constexpr int64_t kChunkRows = kTileRows == 14 ? 224 : 240;
constexpr int64_t kBlockClasses = kTileRows == 14 ? 112 : 96;
constexpr int64_t kDepth = 256;
constexpr int64_t kPitch = kDepth + 16;  // of packed weights: an odd number of cache lines, to spread over the sets
constexpr int64_t kTasks = 24;           // many divisors: few numbers of threads leave one idle
constexpr int64_t kSerialProducts = 200000;  // smaller problems are done before a second thread has woken up
static_assert(kChunkRows % kTileRows == 0 && kBlockClasses % kTileRows == 0 && kChunkRows % (kVectorBytes / 4) == 0);

// X is the dtype of hidden, weight and bias. Everything is computed in T, and so are the gradients kept.
template <typename X>
struct LinearCrossEntropy {
  using T = Accumulate<X>;

  // loss is (rows) where per_row, else a scalar; null where it is not wanted. So are dhidden (rows, features), dweight
  // (classes, features) and dbias (classes), contiguous; they are made all three or none, but for dbias.
  X* loss;
  T* dhidden;
  T* dweight;
  T* dbias;
  const X* dloss;  // (rows) where per_row, else null for 1
  const X* hidden;
  const X* weight;
  const X* bias;  // (classes) or null
  const int64_t* targets;
  int64_t rows, features, classes, hidden_stride, weight_stride, ignore_index;
  bool per_row, mean;
  double label_smoothing;
  int num_threads;
};

template <typename X>
class Run {
 public:
  using T = Accumulate<X>;

  explicit Run(const LinearCrossEntropy<X>& args)
      : args_(args), smoothing_(static_cast<T>(args.label_smoothing)), gradients_(args.dweight != nullptr) {
    for (int64_t row = 0; row < args.rows; ++row) {
      if (args.targets[row] != args.ignore_index) kept_.push_back(row);
    }
    losses_.resize(kept_.size());
    chunks_ = divide_up(kept(), kChunkRows);
    blocks_ = divide_up(args.classes, kBlockClasses);
    slices_ = std::min(blocks_, kTasks);
    groups_ = std::min(chunks_, kTasks / slices_);
    steps_ = groups_ > 0 ? divide_up(chunks_, groups_) : 0;
    pitch_ = round_up(args.features, kLanes);
  }

  void run() {
    const bool parallel = kept() * args_.classes * args_.features >= kSerialProducts;
    const int threads = parallel ? std::max(args_.num_threads, 1) : 1;
    const int64_t group_size = Group(nullptr, *this).size, scratch_size = Scratch(nullptr, *this).size;
    const int64_t count = groups_ * group_size + threads * scratch_size;
    const Buffer<T> memory = allocate<T>(count);
    advise_huge_pages(memory.get(), count * static_cast<int64_t>(sizeof(T)));
    for (int64_t i = 0; i < groups_; ++i) group_.emplace_back(memory.get() + i * group_size, *this);
    T* const scratches = memory.get() + groups_ * group_size;
    if (gradients_) clear_gradients();

#pragma omp parallel num_threads(threads) if (parallel)
    {
      const Scratch scratch(scratches + omp_get_thread_num() * scratch_size, *this);
      for (int64_t step = 0; step < steps_; ++step) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups_ * kLaneGroups; ++i) pack_hidden(step, i / kLaneGroups, i % kLaneGroups, scratch);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < groups_ * slices_; ++i) make_logits(step, i / slices_, i % slices_, scratch);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups_ * kLaneGroups; ++i) make_losses(step, i / kLaneGroups, i % kLaneGroups);
        if (!gradients_) continue;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < groups_ * slices_; ++i) make_gradients(step, i / slices_, i % slices_, scratch);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups_ * kLaneGroups; ++i) add_slices(step, i / kLaneGroups, i % kLaneGroups);
      }
      if (gradients_ && groups_ > 1) {
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

  static int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }
  int64_t kept() const { return static_cast<int64_t>(kept_.size()); }

  // The memory of one group: of its present chunk, and its dweight and dbias.
  struct Group {
    T* columns;        // hidden^T: [kChunkRows / W] panels of [features][W]
    T* panels;         // hidden: [pitch / W] panels of [kChunkRows][W]
    T* logits;         // [blocks][kBlockClasses][kChunkRows], then the probabilities, then the gradient
    T* maxima;         // [blocks][kChunkRows] largest logits, then what makes probabilities of the block
    T* sums;           // [blocks][kChunkRows] sums of exp(logit - maximum)
    T* logit_sums;     // [blocks][kChunkRows], with label smoothing alone
    T* target_logits;  // [kChunkRows], NaN where a target is no class
    T* dlosses;        // [kChunkRows], 0 beyond the last row
    T* dhidden;        // [slices][kChunkRows][pitch]
    T* dweight;        // [classes][features]: the output for the first group
    T* dbias;          // [classes]
    int64_t size;

    Group(T* base, const Run& run) {
      const bool gradients = run.gradients_;
      const int64_t statistics = run.blocks_ * kChunkRows;
      const int64_t own_classes = gradients && run.groups_ > 1 ? run.args_.classes : 0;
      Arena<T> arena(base);
      columns = arena.take(kChunkRows * run.args_.features);
      panels = arena.take(gradients ? kChunkRows * run.pitch_ : 0);
      logits = arena.take(gradients ? statistics * kBlockClasses : 0);
      maxima = arena.take(statistics);
      sums = arena.take(statistics);
      logit_sums = arena.take(statistics);
      target_logits = arena.take(kChunkRows);
      dlosses = arena.take(kChunkRows);
      dhidden = arena.take(gradients ? run.slices_ * kChunkRows * run.pitch_ : 0);
      dweight = arena.take(own_classes * run.args_.features);
      dbias = arena.take(own_classes);
      size = arena.taken();
      if (run.group_.empty()) dweight = run.args_.dweight, dbias = run.args_.dbias;
    }
  };

  // The memory of one thread.
  struct Scratch {
    T* rows;     // [W][pitch] of hidden
    T* strip;    // [kTileRows][kPitch] of weight
    T* weights;  // [kDepth / W] panels of [kBlockClasses][W]
    T* logits;   // [kBlockClasses][kChunkRows], where a group keeps none
    int64_t size;

    Scratch(T* base, const Run& run) {
      Arena<T> arena(base);
      rows = arena.take(kLanes * run.pitch_);
      strip = arena.take(kTileRows * kPitch);
      weights = arena.take(run.gradients_ ? kDepth * kBlockClasses : 0);
      logits = arena.take(run.gradients_ ? 0 : kBlockClasses * kChunkRows);
      size = arena.taken();
    }
  };

  // The rows of a group's chunk: kept_[first], kept_[first + 1], ...
  struct Chunk {
    int64_t first, rows;
  };

  Chunk chunk(int64_t step, int64_t group) const {
    const int64_t index = group * chunks_ / groups_ + step;
    if (index >= (group + 1) * chunks_ / groups_) return {0, 0};
    return {index * kChunkRows, std::min(kChunkRows, kept() - index * kChunkRows)};
  }

  // Calls body(first class, classes, block) for the blocks of a slice.
  template <typename Body>
  void for_each_block(int64_t slice, const Body& body) const {
    for (int64_t block = slice * blocks_ / slices_; block < (slice + 1) * blocks_ / slices_; ++block) {
      body(block * kBlockClasses, std::min(kBlockClasses, args_.classes - block * kBlockClasses), block);
    }
  }

  // A lane group of rows of the hidden states, in both packings, and the gradient of each row's loss.
  void pack_hidden(int64_t step, int64_t index, int64_t lanes, const Scratch& scratch) {
    const Group& group = group_[index];
    const Chunk chunk = this->chunk(step, index);
    const int64_t begin = lanes * kLanes, rows = std::clamp<int64_t>(chunk.rows - begin, 0, kLanes);
    if (rows == 0) return;
    std::fill_n(group.dlosses + begin, kLanes, T(0));
    std::fill_n(group.target_logits + begin, kLanes, std::numeric_limits<T>::quiet_NaN());
    const T scale = args_.mean ? T(1) / static_cast<T>(kept()) : T(1);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = kept_[chunk.first + begin + i];
      pack_panels(scratch.rows + i * pitch_, kLanes, args_.hidden + row * args_.hidden_stride, 0, 1, args_.features);
      group.dlosses[begin + i] = args_.dloss != nullptr ? load_number(args_.dloss + row) : scale;
    }
    pack_transposed(group.columns + begin * args_.features, scratch.rows, pitch_, rows, args_.features);
    if (gradients_) {
      pack_panels(group.panels + begin * kLanes, kChunkRows * kLanes, scratch.rows, pitch_, rows, args_.features);
    }
  }

  // The logits of a slice, replaced by exp(logit - maximum of the block), and the statistics of each block.
  void make_logits(int64_t step, int64_t index, int64_t slice, const Scratch& scratch) {
    const Group& group = group_[index];
    const Chunk chunk = this->chunk(step, index);
    if (chunk.rows == 0) return;
    const int64_t lane_groups = divide_up(chunk.rows, kLanes);
    for_each_block(slice, [&](int64_t first_class, int64_t classes, int64_t block) {
      T* const logits = gradients_ ? group.logits + first_class * kChunkRows : scratch.logits;
      for (int64_t k = 0; k < args_.features; k += kDepth) {
        const int64_t depth = std::min(kDepth, args_.features - k);
        for (int64_t strip = 0; strip < classes; strip += kTileRows) {
          const int64_t first = first_class + strip, valid = std::min(kTileRows, classes - strip);
          pack_rows<kTileRows, kPitch>(scratch.strip, args_.weight + first * args_.weight_stride + k,
                                       args_.weight_stride, valid, depth, T(1));
          T bias[kTileRows] = {};
          for (int64_t i = 0; i < valid && args_.bias != nullptr; ++i) bias[i] = load_number(args_.bias + first + i);
          tile_rows<kTileRows, TileLayout<kPitch, 1>>(
              depth, scratch.strip, group.columns + k * kLanes, args_.features * kLanes, lane_groups,
              [&](int64_t row, int64_t lanes, V value) {
                T* to = logits + (strip + row) * kChunkRows + lanes * kLanes;
                (value + (k == 0 ? V::broadcast(bias[row]) : V::load(to))).store(to);
              });
        }
      }
      for_each_target(chunk, first_class, classes, [&](int64_t row, int64_t target) {
        group.target_logits[row] = logits[target * kChunkRows + row];
      });
      for (int64_t lanes = 0; lanes < lane_groups; ++lanes) {
        block_statistics(group, logits + lanes * kLanes, classes, block * kChunkRows + lanes * kLanes);
      }
    });
  }

  // Calls body(row of the chunk, class of the block) for each row whose target is one of `classes` classes.
  template <typename Body>
  void for_each_target(const Chunk& chunk, int64_t first_class, int64_t classes, const Body& body) const {
    for (int64_t row = 0; row < chunk.rows; ++row) {
      const int64_t target = args_.targets[kept_[chunk.first + row]] - first_class;
      if (target >= 0 && target < classes) body(row, target);
    }
  }

  void block_statistics(const Group& group, T* logits, int64_t classes, int64_t at) const {
    // Not from -inf: where all logits are -inf they would be subtracted from themselves.
    V largest = V::broadcast(std::numeric_limits<T>::lowest());
    for (int64_t i = 0; i < classes; ++i) largest = max(V::load(logits + i * kChunkRows), largest);
    if (smoothing_ != 0) {
      V sum = V::zero();
      for (int64_t i = 0; i < classes; ++i) sum = sum + V::load(logits + i * kChunkRows);
      sum.store(group.logit_sums + at);
    }
    V sum = V::zero();
    const V scale = V::broadcast(kLog2e);
    for (int64_t i = 0; i < classes; ++i) {
      const V p = exp2((V::load(logits + i * kChunkRows) - largest) * scale);
      p.store(logits + i * kChunkRows);
      sum = sum + p;
    }
    largest.store(group.maxima + at);
    sum.store(group.sums + at);
  }

  // The losses of a lane group of rows; the maxima become what makes probabilities times dloss of each block.
  void make_losses(int64_t step, int64_t index, int64_t lanes) {
    const Group& group = group_[index];
    const Chunk chunk = this->chunk(step, index);
    const int64_t begin = lanes * kLanes, rows = std::clamp<int64_t>(chunk.rows - begin, 0, kLanes);
    if (rows == 0) return;
    V largest = V::broadcast(std::numeric_limits<T>::lowest()), sum = V::zero(), logit_sum = V::zero();
    for (int64_t at = begin; at < blocks_ * kChunkRows; at += kChunkRows) {
      largest = max(V::load(group.maxima + at), largest);
    }
    for (int64_t at = begin; at < blocks_ * kChunkRows; at += kChunkRows) {
      const V factor = exp2((V::load(group.maxima + at) - largest) * V::broadcast(kLog2e));
      sum = mul_add(V::load(group.sums + at), factor, sum);
      factor.store(group.maxima + at);
      if (smoothing_ != 0) logit_sum = logit_sum + V::load(group.logit_sums + at);
    }
    V loss = (largest - V::load(group.target_logits + begin)) * V::broadcast(1 - smoothing_);
    if (smoothing_ != 0) {
      const V mean = logit_sum / V::broadcast(static_cast<T>(args_.classes));
      loss = mul_add(largest - mean, V::broadcast(smoothing_), loss);
    }
    T losses[kLanes];
    (loss + log(sum)).store(losses);
    for (int64_t i = 0; i < rows; ++i) {
      losses_[chunk.first + begin + i] = losses[i];
      // A target that is no class has no gradient either.
      if (std::isnan(group.target_logits[begin + i])) group.dlosses[begin + i] = group.target_logits[begin + i];
    }
    const V scale = V::load(group.dlosses + begin) / sum;
    for (int64_t at = begin; at < blocks_ * kChunkRows; at += kChunkRows) {
      (V::load(group.maxima + at) * scale).store(group.maxima + at);
    }
  }

  // The gradient of a slice's logits, and what it adds to dweight, dbias and the slice's dhidden.
  void make_gradients(int64_t step, int64_t index, int64_t slice, const Scratch& scratch) {
    const Group& group = group_[index];
    const Chunk chunk = this->chunk(step, index);
    if (chunk.rows == 0) return;
    T* const dhidden = group.dhidden + slice * kChunkRows * pitch_;
    bool first_block = true;
    for_each_block(slice, [&](int64_t first_class, int64_t classes, int64_t block) {
      T* const dlogits = group.logits + first_class * kChunkRows;
      const T* const factors = group.maxima + block * kChunkRows;
      const V uniform = V::broadcast(smoothing_ / static_cast<T>(args_.classes));
      for (int64_t i = 0; i < classes; ++i) {
        T* const row = dlogits + i * kChunkRows;
        for (int64_t lane = 0; lane < chunk.rows; lane += kLanes) {
          const V p = V::load(row + lane) * V::load(factors + lane);
          (p - V::load(group.dlosses + lane) * uniform).store(row + lane);
        }
      }
      for_each_target(chunk, first_class, classes, [&](int64_t row, int64_t target) {
        dlogits[target * kChunkRows + row] -= group.dlosses[row] * (1 - smoothing_);
      });
      if (args_.dbias != nullptr) {
        for (int64_t i = 0; i < classes; ++i) {
          T* const to = group.dbias + first_class + i;
          const T sum = row_sum(dlogits + i * kChunkRows, chunk.rows);
          *to = step == 0 ? sum : *to + sum;
        }
      }
      for (int64_t column = 0; column < args_.features; column += kDepth) {
        const int64_t columns = std::min(kDepth, args_.features - column);
        add_to_dweight(group, dlogits, first_class, classes, chunk.rows, column, columns, step == 0);
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

  void add_to_dweight(const Group& group, const T* dlogits, int64_t first_class, int64_t classes, int64_t rows,
                      int64_t column, int64_t columns, bool first) const {
    for (int64_t strip = 0; strip < classes; strip += kTileRows) {
      const int64_t valid = std::min(kTileRows, classes - strip);
      T* const out = group.dweight + (first_class + strip) * args_.features + column;
      tile_rows<kTileRows, TileLayout<kChunkRows, 1>>(
          rows, dlogits + strip * kChunkRows, group.panels + column * kChunkRows, kChunkRows * kLanes,
          divide_up(columns, kLanes), [&](int64_t row, int64_t panel, V value) {
            if (row >= valid) return;
            T* const to = out + row * args_.features + panel * kLanes;
            const int64_t width = columns - panel * kLanes;
            if (width >= kLanes) {
              (first ? value : V::load(to) + value).store(to);
            } else {
              (first ? value : V::load_first(to, width) + value).store_first(to, width);
            }
          });
    }
  }

  void add_to_dhidden(T* dhidden, const T* dlogits, const T* weights, int64_t classes, int64_t rows, int64_t columns,
                      bool first) const {
    for (int64_t strip = 0; strip < rows; strip += kTileRows) {
      T* const out = dhidden + strip * pitch_;
      tile_rows<kTileRows, TileLayout<1, kChunkRows>>(classes, dlogits + strip, weights, kBlockClasses * kLanes,
                                                      divide_up(columns, kLanes),
                                                      [&](int64_t row, int64_t panel, V value) {
                                                        T* const to = out + row * pitch_ + panel * kLanes;
                                                        (first ? value : V::load(to) + value).store(to);
                                                      });
    }
  }

  // dhidden of a lane group of rows: the sum over the slices.
  void add_slices(int64_t step, int64_t index, int64_t lanes) {
    const Chunk chunk = this->chunk(step, index);
    const int64_t begin = lanes * kLanes;
    for (int64_t row = begin; row < std::min(chunk.rows, begin + kLanes); ++row) {
      const T* const from = group_[index].dhidden + row * pitch_;
      T* const to = args_.dhidden + kept_[chunk.first + row] * args_.features;
      for (int64_t column = 0; column < args_.features; column += kLanes) {
        V sum = V::load(from + column);
        for (int64_t slice = 1; slice < slices_; ++slice) {
          sum = sum + V::load(from + slice * kChunkRows * pitch_ + column);
        }
        sum.store_first(to + column, std::min(kLanes, args_.features - column));
      }
    }
  }

  // dweight and dbias of one class: the sum over the groups.
  void add_groups(int64_t index) {
    const int64_t n = args_.features;
    for (size_t group = 1; group < group_.size(); ++group) {
      const T* const from = group_[group].dweight + index * n;
      for (int64_t i = 0; i < n; ++i) args_.dweight[index * n + i] += from[i];
      if (args_.dbias != nullptr) args_.dbias[index] += group_[group].dbias[index];
    }
  }

  // What no task writes: the gradients of ignored rows, and all of them where there are no others.
  void clear_gradients() {
    size_t next = 0;
    for (int64_t row = 0; row < args_.rows; ++row) {
      if (next < kept_.size() && kept_[next] == row) {
        ++next;
      } else {
        std::fill_n(args_.dhidden + row * args_.features, args_.features, T(0));
      }
    }
    if (!kept_.empty()) return;
    std::fill_n(args_.dweight, args_.classes * args_.features, T(0));
    if (args_.dbias != nullptr) std::fill_n(args_.dbias, args_.classes, T(0));
  }

  void write_loss() const {
    if (args_.per_row) {
      for (int64_t row = 0; row < args_.rows; ++row) store_number(T(0), args_.loss + row);
      for (size_t i = 0; i < kept_.size(); ++i) store_number(losses_[i], args_.loss + kept_[i]);
    } else {
      double sum = 0, lost = 0;  // Kahan's sum: what rounding has taken is subtracted from the next loss
      for (const T loss : losses_) {
        const double next = static_cast<double>(loss) - lost, total = sum + next;
        lost = std::isfinite(total) ? (total - sum) - next : 0;
        sum = total;
      }
      store_number(static_cast<T>(args_.mean ? sum / static_cast<double>(kept()) : sum), args_.loss);
    }
  }

  static T load_number(const X* p) {
    T lanes[kLanes];
    V::load_first(p, 1).store(lanes);
    return lanes[0];
  }
  static void store_number(T x, X* p) { V::broadcast(x).store_first(p, 1); }

  const LinearCrossEntropy<X>& args_;
  const T smoothing_;
  const bool gradients_;
  std::vector<int64_t> kept_;  // the rows that are not ignored
  std::vector<T> losses_;      // of the kept rows
  std::vector<Group> group_;
  int64_t chunks_, blocks_, slices_, groups_, steps_, pitch_;
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
