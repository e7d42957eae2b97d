// Diffusion processes: noise, noising, the training loss and its gradient, and one sampling step. Each is one pass over
// the data; the noise is made a chunk at a time in the first-level cache and never stored.
//
// All tensors are contiguous (batch, n); every sample has its own seed, stream and coefficients, so that its numbers
// depend on nothing else in the batch. A task is one block of one sample, however many threads there are. T is the dtype
// of the tensors; everything is computed, and noise is made, in A = Accumulate<T>.
#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "dtypes.h"
#include "entry_points.h"
#include "huge_pages.h"
#include "normal_simd.h"
#include "simd.h"

namespace leedl {
namespace {

// Short chunks where one takes long: while the noise of the next is made, the stores of the last are on their way.
constexpr int64_t kChunk = kVectorRegisters == 32 ? 1024 : 384;
constexpr int64_t kBlock = (kVectorRegisters == 32 ? 8 : 24) * kChunk;
constexpr int64_t kSerialElements = 16384;  // fewer are done before a second thread has woken up

static_assert(kChunk % NormalGenerator::kGroup == 0);

// What stands for a tensor that is absent because its coefficient is 0.
template <typename T>
alignas(64) const T kZeros[kChunk] = {};

struct Samples {
  Samples(const Tensor& samples, int threads)
      : batch(samples.size(0)), n(batch == 0 ? 0 : samples.numel() / batch), num_threads(threads) {}

  int64_t batch, n;
  int num_threads;

  int64_t blocks() const { return (n + kBlock - 1) / kBlock; }
};

// The caller's noise where `given` is not null, else made from the seeds; none where its coefficient is 0.
template <typename T>
struct Noise {
  const T* given;
  const int64_t* seeds;
  const int64_t* streams;
  const double* coefficients;  // of sample b at [b * stride]; null: 1
  int64_t stride;

  bool is_used(int64_t sample) const { return coefficients == nullptr || coefficients[sample * stride] != 0; }
};

// target[i] = value(load) for i < count, where load(p) is p[i] as a number of A; a vector at a time.
template <typename A, typename T, typename Value>
void fill_vectors(T* target, int64_t count, const Value& value) {
  using V = Vec<A>;
  int64_t i = 0;
  for (; i + V::kSize <= count; i += V::kSize) {
    value([i](const auto* p) { return V::load(p + i); }).store(target + i);
  }
  const int64_t rest = count - i;
  if (rest > 0) value([=](const auto* p) { return V::load_first(p + i, rest); }).store_first(target + i, rest);
}

// `count` numbers as numbers of A: where these differ, converted into `buffer`.
template <typename A, typename T>
const A* widened(const T* from, int64_t count, A* buffer) {
  if constexpr (std::is_same_v<A, T>) {
    return from;
  } else if constexpr (kIsTwoBytes<T>) {
    fill_vectors<A>(buffer, count, [from](auto load) { return load(from); });
    return buffer;
  } else {
    std::copy_n(from, count, buffer);
    return buffer;
  }
}

// Calls body(sample, block, offset, count, noise) for every chunk, the chunks of a block in their order. The chunk is
// elements offset .. offset + count - 1 of the whole tensor. Where the noise itself is the output, `in_place`, whole
// groups of it are made there, and the body gets what is left.
template <typename T, typename Body>
void for_each_chunk(const Samples& samples, const Noise<T>& noise, const Body& body, float* in_place = nullptr) {
  using A = Accumulate<T>;
  const int64_t blocks = samples.blocks(), tasks = samples.batch * blocks;
  const int64_t task_size = std::clamp(samples.n, NormalGenerator::kGroup, kBlock);
  const int64_t tasks_at_once = kBlock / task_size;
#pragma omp parallel for schedule(dynamic, tasks_at_once) num_threads(samples.num_threads) \
    if (tasks * task_size >= kSerialElements)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t sample = task / blocks, block = task % blocks;
    const bool is_made = noise.given == nullptr && noise.is_used(sample);
    const NormalGenerator generator(is_made ? noise.seeds[sample] : 0,
                                    is_made && noise.streams != nullptr ? noise.streams[sample] : 0);
    alignas(64) float made[kChunk];
    alignas(64) A buffer[std::is_same_v<T, float> ? 1 : kChunk];
    const int64_t end = std::min(samples.n, (block + 1) * kBlock);
    for (int64_t first = block * kBlock; first < end; first += kChunk) {
      const int64_t count = std::min(kChunk, end - first), offset = sample * samples.n + first;
      const A* z = kZeros<A>;
      if (in_place != nullptr && count % NormalGenerator::kGroup == 0) {
        generator.fill(first, count, in_place + offset);
        continue;
      }
      if (is_made) {
        generator.fill(first, count, made);
        z = widened<A>(made, count, buffer);
      } else if (noise.is_used(sample)) {
        z = widened<A>(noise.given + offset, count, buffer);
      }
      body(sample, block, offset, count, z);
    }
  }
}

// Fills `out` by kernel(sample, offset, count, noise, target) for every chunk.
template <typename T, typename Kernel>
void fill_chunks(T* out, const Samples& samples, const Noise<T>& noise, const Kernel& kernel) {
  advise_huge_pages(out, samples.batch * samples.n * static_cast<int64_t>(sizeof(T)));
  for_each_chunk(samples, noise, [&](int64_t sample, int64_t, int64_t offset, int64_t count, const auto* z) {
    kernel(sample, offset, count, z, out + offset);
  });
}

// What the model should have predicted, c0 * sample + c1 * noise; `sample` is not read where c0 is 0.
template <typename T>
struct Target {
  using A = Accumulate<T>;

  const T* sample;
  const double* coefficients;

  Vec<A> c0(int64_t b) const { return Vec<A>::broadcast(static_cast<A>(coefficients[2 * b])); }
  Vec<A> c1(int64_t b) const { return Vec<A>::broadcast(static_cast<A>(coefficients[2 * b + 1])); }
  const T* chunk(int64_t b, int64_t offset) const {
    return coefficients[2 * b] == 0 ? kZeros<T> : sample + offset;
  }
};

// The sum of (y - (c0 * x + c1 * z))^2 over one chunk.
template <typename A, typename T>
A squared_error(const T* y, const T* x, const A* z, Vec<A> c0, Vec<A> c1, int64_t count) {
  using V = Vec<A>;
  constexpr int64_t kSums = 4;
  V sums[kSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
  const auto add = [&](V& sum, V output, V data, V noise) {
    const V difference = output - (c0 * data + c1 * noise);
    sum = mul_add(difference, difference, sum);
  };
  int64_t i = 0;
  for (; i + kSums * V::kSize <= count; i += kSums * V::kSize) {
    for (int64_t s = 0; s < kSums; ++s) {
      const int64_t j = i + s * V::kSize;
      add(sums[s], V::load(y + j), V::load(x + j), V::load(z + j));
    }
  }
  for (; i < count; i += V::kSize) {
    const int64_t rest = std::min(V::kSize, count - i);
    add(sums[0], V::load_first(y + i, rest), V::load_first(x + i, rest), V::load_first(z + i, rest));
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// One step from `sample` to `prev_sample`, with coefficients[b] = (p, q, u, w, e, s):
//   m = unconditional + guidance_scale * (model_output - unconditional), or model_output alone
//   prev_sample = u * x0 + w * sample + e * m + s * noise, with x0 = p * sample + q * m clipped to +-clip_range
// M is the dtype of m.
template <typename A, typename T, typename M>
void step_chunk(T* prev, const M* m, const T* x, const A* z, const double* c, double clip_range, int64_t count) {
  using V = Vec<A>;
  const auto coefficient = [](double value) { return V::broadcast(static_cast<A>(value)); };
  const V s = coefficient(c[5]);
  if (clip_range > 0) {
    const V high = coefficient(clip_range), low = -high;
    const V p = coefficient(c[0]), q = coefficient(c[1]), u = coefficient(c[2]);
    const V w = coefficient(c[3]), e = coefficient(c[4]);
    fill_vectors<A>(prev, count, [&](auto load) {
      const V x0 = min(high, max(low, p * load(x) + q * load(m)));  // in this order NaN stays NaN
      return (u * x0 + w * load(x)) + (e * load(m) + s * load(z));
    });
  } else {
    const V w = coefficient(c[3] + c[2] * c[0]), e = coefficient(c[4] + c[2] * c[1]);
    fill_vectors<A>(prev, count, [&](auto load) { return (w * load(x) + e * load(m)) + s * load(z); });
  }
}

}  // namespace

namespace entry_points {

void sample_seeds(const Tensor& seeds, int64_t seed) {
  int64_t* to = seeds.data<int64_t>();
  uint64_t state = static_cast<uint64_t>(seed);
  for (int64_t b = 0; b < seeds.numel(); ++b) {
    state += 0x9E3779B97F4A7C15;
    uint64_t mixed = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB;
    to[b] = static_cast<int64_t>(mixed ^ (mixed >> 31));
  }
}

void randn(const Tensor& out, const Tensor& seeds, const Tensor& streams, int num_threads) {
  dispatch(out.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    const Noise<T> noise = {nullptr, seeds.data<const int64_t>(), streams.data<const int64_t>(), nullptr, 0};
    T* const target = out.data<T>();
    const Samples samples(out, num_threads);
    advise_huge_pages(target, out.numel() * static_cast<int64_t>(sizeof(T)));
    float* const in_place = std::is_same_v<T, float> ? out.data<float>() : nullptr;
    const auto store = [=](int64_t, int64_t, int64_t offset, int64_t count, const A* z) {
      fill_vectors<A>(target + offset, count, [z](auto load) { return load(z); });
    };
    for_each_chunk(samples, noise, store, in_place);
  });
}

// noisy = c0 * sample + c1 * noise, with coefficients[b] = (c0, c1).
void add_noise(const Tensor& noisy, const Tensor& sample, const Tensor& noise, const Tensor& coefficients,
               const Tensor& seeds, int num_threads) {
  dispatch(noisy.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    const double* c = coefficients.data<const double>();
    const T* x = sample.data<const T>();
    const Noise<T> source = {noise.data<const T>(), seeds.data<const int64_t>(), nullptr, c + 1, 2};
    fill_chunks<T>(noisy.data<T>(), Samples(noisy, num_threads), source,
                   [=](int64_t b, int64_t offset, int64_t count, const A* z, T* target) {
                     const auto c0 = Vec<A>::broadcast(static_cast<A>(c[2 * b]));
                     const auto c1 = Vec<A>::broadcast(static_cast<A>(c[2 * b + 1]));
                     fill_vectors<A>(target, count, [&](auto load) { return c0 * load(x + offset) + c1 * load(z); });
                   });
  });
}

// sums[b] = the sum of (model_output - target)^2 over sample b: each chunk in A, the chunks in double and in order.
void noise_prediction_loss_forward(const Tensor& sums, const Tensor& model_output, const Tensor& sample,
                                   const Tensor& noise, const Tensor& coefficients, const Tensor& seeds,
                                   int num_threads) {
  dispatch(model_output.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    const Target<T> target = {sample.data<const T>(), coefficients.data<const double>()};
    const T* y = model_output.data<const T>();
    const double* c1 = target.coefficients + 1;
    const Noise<T> source = {noise.data<const T>(), seeds.data<const int64_t>(), nullptr, c1, 2};
    const Samples samples(model_output, num_threads);
    const int64_t blocks = samples.blocks();
    std::vector<double> partial(samples.batch * blocks, 0.0);
    for_each_chunk(samples, source, [&](int64_t b, int64_t block, int64_t offset, int64_t count, const A* z) {
      partial[b * blocks + block] +=
          squared_error(y + offset, target.chunk(b, offset), z, target.c0(b), target.c1(b), count);
    });
    for (int64_t b = 0; b < samples.batch; ++b) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += partial[b * blocks + block];
      sums.data<double>()[b] = sum;
    }
  });
}

// dmodel_output = 2 * dsums[b] * (model_output - target)
void noise_prediction_loss_backward(const Tensor& dmodel_output, const Tensor& model_output, const Tensor& sample,
                                    const Tensor& noise, const Tensor& coefficients, const Tensor& dsums,
                                    const Tensor& seeds, int num_threads) {
  dispatch(dmodel_output.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    const Target<T> target = {sample.data<const T>(), coefficients.data<const double>()};
    const T* y = model_output.data<const T>();
    const double *scales = dsums.data<const double>(), *c1 = target.coefficients + 1;
    const Noise<T> source = {noise.data<const T>(), seeds.data<const int64_t>(), nullptr, c1, 2};
    fill_chunks<T>(dmodel_output.data<T>(), Samples(dmodel_output, num_threads), source,
                   [=](int64_t b, int64_t offset, int64_t count, const A* z, T* dy) {
                     const auto scale = Vec<A>::broadcast(static_cast<A>(2 * scales[b]));
                     const auto c0 = target.c0(b), c1 = target.c1(b);
                     const T* x = target.chunk(b, offset);
                     fill_vectors<A>(dy, count, [&](auto load) {
                       return scale * (load(y + offset) - (c0 * load(x) + c1 * load(z)));
                     });
                   });
  });
}

void step(const Tensor& prev_sample, const Tensor& model_output, const Tensor& unconditional_output,
          const Tensor& sample, const Tensor& noise, const Tensor& coefficients, const Tensor& seeds,
          const Tensor& streams, double guidance_scale, double clip_range, int num_threads) {
  dispatch(prev_sample.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    const double* all_coefficients = coefficients.data<const double>();
    const T *conditional = model_output.data<const T>(), *unconditional = unconditional_output.data<const T>();
    const T* current = sample.data<const T>();
    const auto guidance = Vec<A>::broadcast(static_cast<A>(guidance_scale));
    const Noise<T> source = {noise.data<const T>(), seeds.data<const int64_t>(), streams.data<const int64_t>(),
                             all_coefficients + 5, 6};
    const auto kernel = [=](int64_t b, int64_t offset, int64_t count, const A* z, T* prev) {
      const double* c = all_coefficients + 6 * b;
      const T *m = conditional + offset, *x = current + offset;
      if (unconditional == nullptr) {
        step_chunk(prev, m, x, z, c, clip_range, count);
      } else {
        const T* base = unconditional + offset;
        alignas(64) A guided[kChunk];
        fill_vectors<A>(guided, count, [&](auto load) { return load(base) + guidance * (load(m) - load(base)); });
        step_chunk(prev, guided, x, z, c, clip_range, count);
      }
    };
    fill_chunks<T>(prev_sample.data<T>(), Samples(prev_sample, num_threads), source, kernel);
  });
}

// Philox and Box-Muller on given words, as normal.h and philox.h have them for the device: for tests.
std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const Philox4x32 words = leedl::philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {words.word[0], words.word[1], words.word[2], words.word[3]};
}

std::array<float, 2> normal_pair(uint32_t a, uint32_t b) {
  const NormalPair pair = leedl::normal_pair(a, b);
  return {pair.z0, pair.z1};
}

}  // namespace entry_points
}  // namespace leedl
