// Diffusion processes: noise.
#include "entry_points.h"
#include "normal.h"
#include "numbers.h"
#include "runtime.h"

namespace leedl {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) randn_kernel(T* out, const int64_t* seeds, int64_t n, int blocks_per_sample, bool is_aligned) {
  constexpr int kCount = kPerVector<T>;
  const int sample = blockIdx.x / blocks_per_sample, block = blockIdx.x % blocks_per_sample;
  const int64_t i = (static_cast<int64_t>(block) * kThreads + threadIdx.x) * kCount;
  if (i >= n) return;
  float z[kCount];
#pragma unroll
  for (int k = 0; k < kCount; k += 4) {
    float four[4];
    normal_block(seeds[sample], (i + k) / 4, 0, four);
#pragma unroll
    for (int j = 0; j < 4; ++j) z[k + j] = four[j];
  }
  store(z, n - i, is_aligned, out + sample * n + i);
}

}  // namespace

namespace entry_points {

void randn(const Tensor& out, const Tensor& seeds) {
  const int64_t batch = out.size(0), numel = out.numel();
  if (numel == 0) return;
  const Stream stream(out);
  dispatch_to_float(out.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const int64_t n = numel / batch;
    const int blocks = ceil_div<int64_t>(n, kThreads * kPerVector<T>);
    const bool is_aligned = n % kPerVector<T> == 0 && out.address() % 16 == 0;
    stream.launch(randn_kernel<T>, blocks * batch, kThreads, 0, out.data<T>(), seeds.data<const int64_t>(), n, blocks, is_aligned);
  });
}

}  // namespace entry_points
}  // namespace leedl
