// Diffusion processes: noise, noising, the training loss and its gradient, and one sampling step. Each is one pass over
// the data; the noise is made in registers and never stored.
//
// All tensors are contiguous (batch, n); every sample has its own seed, stream and coefficients, read on the device, so
// that its numbers depend on nothing else in the batch. Numbers of T are read and written 16 bytes at a time where the
// addresses allow it, and computed in float. Products and sums are those of csrc/cpu/diffusion.cpp, so that noise, noisy
// samples and steps are the same in every bit.
#include "entry_points.h"
#include "normal.h"
#include "numbers.h"
#include "reductions.h"
#include "runtime.h"

namespace leedl {
namespace {

constexpr int kThreads = 256;

template <typename T>
using Values = float[kPerVector<T>];

// Samples of n numbers, of which a block takes kThreads vectors at once.
template <typename T>
struct Samples {
  int64_t batch, n;
  bool is_aligned;

  template <typename... Others>
  explicit Samples(const Tensor& samples, const Others&... others)
      : batch(samples.size(0)),
        n(batch == 0 ? 0 : samples.numel() / batch),
        is_aligned(n % kPerVector<T> == 0 && ((samples.address() | ... | others.address()) % 16) == 0) {}

  unsigned chunks() const { return grid_size(ceil_div<int64_t>(n, kThreads * kPerVector<T>)); }
  unsigned grid() const { return grid_size(batch * chunks()); }
};

// Where a thread's vector stands in its sample; what is beyond the sample's end is not counted.
template <typename T>
struct Place {
  int64_t sample, first, offset, count;
  bool is_aligned;

  __device__ Place(const Samples<T>& samples, int64_t sample, int64_t chunk) : sample(sample) {
    first = (chunk * kThreads + threadIdx.x) * kPerVector<T>;
    offset = sample * samples.n + first;
    count = samples.n - first;
    is_aligned = samples.is_aligned;
  }
  __device__ void load(const T* from, Values<T>& to) const { leedl::load(from + offset, count, is_aligned, to); }
  __device__ void store(const Values<T>& from, T* to) const { leedl::store(from, count, is_aligned, to + offset); }
};

// The place of a thread where each block has one chunk.
template <typename T>
__device__ Place<T> own_place(const Samples<T>& samples, unsigned chunks) {
  return Place<T>(samples, blockIdx.x / chunks, blockIdx.x % chunks);
}

// The caller's noise where `given` is not null, else made from the seeds; zeros where neither is there, or is used.
template <typename T>
struct Noise {
  const T* given;
  const int64_t* seeds;
  const int64_t* streams;

  __device__ void load(const Place<T>& place, bool is_used, Values<T>& z) const {
    constexpr int kBlock = 4;  // elements of one counter
    if (is_used && given != nullptr) {
      place.load(given, z);
    } else if (is_used && seeds != nullptr) {
      const uint64_t seed = seeds[place.sample];
      const uint32_t stream = streams == nullptr ? 0 : streams[place.sample];
#pragma unroll
      for (int i = 0; i < kPerVector<T>; i += kBlock) {
        float block[kBlock];
        normal_block(seed, (place.first + i) / kBlock, stream, block);
#pragma unroll
        for (int j = 0; j < kBlock; ++j) z[i + j] = block[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) z[i] = 0.0f;
    }
  }
};

template <typename T>
Noise<T> noise_of(const Tensor& given, const Tensor& seeds, const Tensor& streams = Tensor()) {
  return {given.data<const T>(), seeds.data<const int64_t>(), streams.data<const int64_t>()};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    randn_kernel(T* out, const int64_t* seeds, const __grid_constant__ Samples<T> samples, unsigned chunks) {
  const Place<T> place = own_place(samples, chunks);
  Values<T> z;
  Noise<T>{nullptr, seeds, nullptr}.load(place, true, z);
  place.store(z, out);
}

// Two coefficients of one sample as the block's numbers; converted once, since float64 is slow on many GPUs.
struct Pair {
  float c0, c1;
};

__device__ Pair load_pair(const double* coefficients, int64_t sample) {
  Pair* const shared = shared_memory<Pair>();
  if (threadIdx.x == 0) {
    *shared = {static_cast<float>(coefficients[2 * sample]), static_cast<float>(coefficients[2 * sample + 1])};
  }
  __syncthreads();
  return *shared;
}

// noisy = c0 * sample + c1 * noise
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_noise_kernel(T* noisy, const T* sample, const __grid_constant__ Noise<T> noise, const double* coefficients,
                     const __grid_constant__ Samples<T> samples, unsigned chunks) {
  const Place<T> place = own_place(samples, chunks);
  Values<T> x, z;
  place.load(sample, x);
  const auto [c0, c1] = load_pair(coefficients, place.sample);
  noise.load(place, c1 != 0, z);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) x[i] = c0 * x[i] + c1 * z[i];
  place.store(x, noisy);
}

// What the model should have predicted, c0 * sample + c1 * noise; a term is not read where its coefficient is 0.
template <typename T>
struct Target {
  const T* sample;
  Noise<T> noise;

  __device__ void load(const Place<T>& place, Pair c, Values<T>& target) const {
    Values<T> x = {}, z;
    if (c.c0 != 0) place.load(sample, x);
    noise.load(place, c.c1 != 0, z);
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) target[i] = c.c0 * x[i] + c.c1 * z[i];
  }
};

// partial[sample][part] = the squared error of every parts-th chunk of the sample, from the part's own on.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    loss_kernel(double* partial, const T* model_output, const __grid_constant__ Target<T> target,
                const double* coefficients, const __grid_constant__ Samples<T> samples, unsigned chunks, unsigned parts) {
  const int64_t sample = blockIdx.x / parts;
  const Pair c = load_pair(coefficients, sample);
  float total = 0;
  for (unsigned chunk = blockIdx.x % parts; chunk < chunks; chunk += parts) {
    const Place<T> place(samples, sample, chunk);
    Values<T> y, t;
    place.load(model_output, y);
    target.load(place, c, t);
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) {
      const float difference = i < place.count ? y[i] - t[i] : 0.0f;
      total = fmaf(difference, difference, total);
    }
  }
  double sums[1] = {total};
  __syncthreads();  // the coefficients were read
  sum_over_block(sums, shared_memory<double[1]>());
  if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}

// sums[sample] = the sum of the sample's partial sums; a warp has one sample.
__global__ void __launch_bounds__(kWarpSize) loss_sum_kernel(double* sums, const double* partial, unsigned parts) {
  double total[1] = {0};
  for (unsigned part = threadIdx.x; part < parts; part += kWarpSize) {
    total[0] += partial[static_cast<int64_t>(blockIdx.x) * parts + part];
  }
  sum_over_lanes(total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total[0];
}

// dmodel_output = 2 * dsums[sample] * (model_output - target)
template <typename T>
__global__ void __launch_bounds__(kThreads)
    loss_backward_kernel(T* dmodel_output, const T* model_output, const __grid_constant__ Target<T> target,
                         const double* coefficients, const double* dsums, const __grid_constant__ Samples<T> samples,
                         unsigned chunks) {
  const Place<T> place = own_place(samples, chunks);
  Values<T> y, t;
  place.load(model_output, y);
  target.load(place, load_pair(coefficients, place.sample), t);
  const auto scale = static_cast<float>(2 * dsums[place.sample]);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) y[i] = scale * (y[i] - t[i]);
  place.store(y, dmodel_output);
}

template <typename T>
struct StepInputs {
  const T* model_output;
  const T* unconditional_output;  // or null
  const T* sample;
  Noise<T> noise;
  float guidance_scale, clip_range;  // 0: no clipping
};

// One step from `sample` to `prev_sample`, with the coefficients (p, q, u, w, e, s) of each sample:
//   m = unconditional + guidance_scale * (model_output - unconditional), or model_output alone
//   prev_sample = u * x0 + w * sample + e * m + s * noise, with x0 = p * sample + q * m clipped to +-clip_range
template <typename T>
__global__ void __launch_bounds__(kThreads)
    step_kernel(T* prev_sample, const __grid_constant__ StepInputs<T> inputs, const double* coefficients,
                const __grid_constant__ Samples<T> samples, unsigned chunks) {
  constexpr int kCoefficients = 6;
  const Place<T> place = own_place(samples, chunks);
  const bool clips = inputs.clip_range > 0;
  Values<T> x, m, base, z;
  place.load(inputs.sample, x);
  place.load(inputs.model_output, m);
  if (inputs.unconditional_output != nullptr) place.load(inputs.unconditional_output, base);

  float* const shared = shared_memory<float>();
  if (threadIdx.x < kCoefficients) {
    const double* const own = coefficients + kCoefficients * place.sample;
    const int i = threadIdx.x;
    const bool takes_x0 = !clips && (i == 3 || i == 4);  // u * x0 is linear, too: w + u * p and e + u * q
    shared[i] = static_cast<float>(takes_x0 ? own[i] + own[2] * own[i - 3] : own[i]);
  }
  __syncthreads();
  const float p = shared[0], q = shared[1], u = shared[2], w = shared[3], e = shared[4], s = shared[5];

  inputs.noise.load(place, s != 0, z);
  if (inputs.unconditional_output != nullptr) {
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) m[i] = base[i] + inputs.guidance_scale * (m[i] - base[i]);
  }
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    if (clips) {
      float x0 = p * x[i] + q * m[i];
      x0 = x0 < -inputs.clip_range ? -inputs.clip_range : x0;  // in this order NaN stays NaN
      x0 = x0 > inputs.clip_range ? inputs.clip_range : x0;
      x[i] = (u * x0 + w * x[i]) + (e * m[i] + s * z[i]);
    } else {
      x[i] = (w * x[i] + e * m[i]) + s * z[i];
    }
  }
  place.store(x, prev_sample);
}

}  // namespace

namespace entry_points {

void randn(const Tensor& out, const Tensor& seeds) {
  if (out.numel() == 0) return;
  const Stream stream(out);
  dispatch_to_float(out.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const Samples<T> samples(out);
    stream.launch(randn_kernel<T>, samples.grid(), kThreads, 0, out.data<T>(), seeds.data<const int64_t>(), samples,
                  samples.chunks());
  });
}

void add_noise(const Tensor& noisy, const Tensor& sample, const Tensor& noise, const Tensor& coefficients,
               const Tensor& seeds) {
  if (noisy.numel() == 0) return;
  const Stream stream(noisy);
  dispatch_to_float(noisy.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const Samples<T> samples(noisy, sample, noise);
    stream.launch(add_noise_kernel<T>, samples.grid(), kThreads, sizeof(Pair), noisy.data<T>(),
                  sample.data<const T>(), noise_of<T>(noise, seeds), coefficients.data<const double>(), samples,
                  samples.chunks());
  });
}

void noise_prediction_loss_forward(const Tensor& sums, const Tensor& partial, const Tensor& model_output,
                                   const Tensor& sample, const Tensor& noise, const Tensor& coefficients,
                                   const Tensor& seeds) {
  const int64_t batch = sums.numel(), parts = partial.size(1);
  if (batch == 0) return;
  const Stream stream(sums);
  dispatch_to_float(model_output.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const Samples<T> samples(model_output, sample, noise);
    const Target<T> target = {sample.data<const T>(), noise_of<T>(noise, seeds)};
    constexpr size_t kSharedBytes = kThreads / kWarpSize * sizeof(double);
    stream.launch(loss_kernel<T>, grid_size(batch * parts), kThreads, kSharedBytes, partial.data<double>(),
                  model_output.data<const T>(), target, coefficients.data<const double>(), samples, samples.chunks(),
                  static_cast<unsigned>(parts));
  });
  stream.launch(loss_sum_kernel, grid_size(batch), kWarpSize, 0, sums.data<double>(), partial.data<const double>(),
                static_cast<unsigned>(parts));
}

void noise_prediction_loss_backward(const Tensor& dmodel_output, const Tensor& model_output, const Tensor& sample,
                                    const Tensor& noise, const Tensor& coefficients, const Tensor& dsums,
                                    const Tensor& seeds) {
  if (dmodel_output.numel() == 0) return;
  const Stream stream(dmodel_output);
  dispatch_to_float(dmodel_output.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const Samples<T> samples(dmodel_output, model_output, sample, noise);
    const Target<T> target = {sample.data<const T>(), noise_of<T>(noise, seeds)};
    stream.launch(loss_backward_kernel<T>, samples.grid(), kThreads, sizeof(Pair), dmodel_output.data<T>(),
                  model_output.data<const T>(), target, coefficients.data<const double>(), dsums.data<const double>(),
                  samples, samples.chunks());
  });
}

void step(const Tensor& prev_sample, const Tensor& model_output, const Tensor& unconditional_output,
          const Tensor& sample, const Tensor& noise, const Tensor& coefficients, const Tensor& seeds,
          const Tensor& streams, double guidance_scale, double clip_range) {
  if (prev_sample.numel() == 0) return;
  const Stream stream(prev_sample);
  dispatch_to_float(prev_sample.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const Samples<T> samples(prev_sample, model_output, unconditional_output, sample, noise);
    const StepInputs<T> inputs = {model_output.data<const T>(),      unconditional_output.data<const T>(),
                                  sample.data<const T>(),            noise_of<T>(noise, seeds, streams),
                                  static_cast<float>(guidance_scale), static_cast<float>(clip_range)};
    stream.launch(step_kernel<T>, samples.grid(), kThreads, 6 * sizeof(float), prev_sample.data<T>(), inputs,
                  coefficients.data<const double>(), samples, samples.chunks());
  });
}

}  // namespace entry_points
}  // namespace leedl
