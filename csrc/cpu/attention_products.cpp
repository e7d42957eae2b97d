#include "attention_products.h"

namespace leedl {
namespace {

constexpr int64_t kProductVecs = 3;  // beside kHalfRows rows

}  // namespace

template <typename E>
void multiply_scores(int64_t runs, int64_t depth, const E* rows, const E* panels, int64_t count, SumOf<E>* scores) {
  using A = SumOf<E>;
  constexpr int64_t kLanes = Vec<A>::kSize;
  const int64_t run = (depth + runs - 1) / runs;
  for (int64_t half = 0; half < kStripRows; half += kHalfRows, rows += kHalfRows * kHeadPitch) {
    for (int64_t k = 0; k < depth; k += run) {
      tile_rows<kHalfRows, TileLayout<kHeadPitch, 1>, kProductVecs>(
          std::min(run, depth - k), rows + k, panels + k * kLanes, depth * kLanes, count,
          [&](int64_t row, int64_t panel, Vec<A> value) {
            A* to = scores + (half + row) * kForwardPitch + panel * kLanes;
            (k == 0 ? value : Vec<A>::load(to) + value).store(to);
          });
    }
  }
}

template <typename E>
void multiply_values(int64_t depth, const E* p, const E* values, int64_t panel_stride, int64_t panels,
                     const SumOf<E>* rescale, SumOf<E>* out) {
  using A = SumOf<E>;
  constexpr int64_t kLanes = Vec<A>::kSize;
  tile_rows<kHalfRows, TileLayout<kForwardPitch, 1>, kProductVecs>(
      depth, p, values, panel_stride, panels, [&](int64_t row, int64_t panel, Vec<A> value) {
        A* to = out + (row * panels + panel) * kLanes;
        if (rescale != nullptr) value = mul_add(Vec<A>::load(to), Vec<A>::broadcast(rescale[row]), value);
        value.store(to);
      });
}

#define LEEDL_PRODUCTS(E)                                                                                            \
  template void multiply_scores<E>(int64_t, int64_t, const E*, const E*, int64_t, SumOf<E>*);                        \
  template void multiply_values<E>(int64_t, const E*, const E*, int64_t, int64_t, const SumOf<E>*, SumOf<E>*);

LEEDL_PRODUCTS(float)
LEEDL_PRODUCTS(double)
#if defined(__AVX512F__)
LEEDL_PRODUCTS(BFloat16Pair)
#endif
#undef LEEDL_PRODUCTS

}  // namespace leedl
