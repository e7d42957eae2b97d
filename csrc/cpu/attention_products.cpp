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
  for (int64_t half = 0; half < kStripRows; half += kHalfRows) {
    const auto multiply = [=](int64_t k, auto epilogue) {
      tile_rows<kHalfRows, TileLayout<kHeadPitch, 1>, kProductVecs>(std::min(run, depth - k),
                                                                    rows + half * kHeadPitch + k, panels + k * kLanes,
                                                                    depth * kLanes, count, epilogue);
    };
    A* to = scores + half * kScorePitch;
    multiply(0, [=](int64_t row, int64_t panel, Vec<A> value) {
      value.store(to + row * kScorePitch + panel * kLanes);
    });
    for (int64_t k = run; k < depth; k += run) {
      multiply(k, [=](int64_t row, int64_t panel, Vec<A> value) {
        A* sum = to + row * kScorePitch + panel * kLanes;
        (Vec<A>::load(sum) + value).store(sum);
      });
    }
  }
}

template <typename E>
void multiply_values(int64_t depth, const E* p, const E* values, int64_t panel_stride, int64_t panels,
                     const SumOf<E>* rescale, SumOf<E>* out) {
  using A = SumOf<E>;
  constexpr int64_t kLanes = Vec<A>::kSize;
  const int64_t pitch = panels * kLanes;
  const auto multiply = [=](auto epilogue) {
    tile_rows<kHalfRows, TileLayout<kScorePitch, 1>, kProductVecs>(depth, p, values, panel_stride, panels, epilogue);
  };
  if (rescale == nullptr) {
    multiply([=](int64_t row, int64_t panel, Vec<A> value) { value.store(out + row * pitch + panel * kLanes); });
  } else {
    multiply([=](int64_t row, int64_t panel, Vec<A> value) {
      A* to = out + row * pitch + panel * kLanes;
      mul_add(Vec<A>::load(to), Vec<A>::broadcast(rescale[row]), value).store(to);
    });
  }
}

template <typename E>
void add_transposed(int64_t depth, const E* p, const E* b, int64_t panel_stride, int64_t panels, SumOf<E>* sums) {
  using A = SumOf<E>;
  constexpr int64_t kLanes = Vec<A>::kSize;
  const int64_t pitch = panels * kLanes;
  tile_rows<kHalfRows, TileLayout<1, kScorePitch>, kProductVecs>(
      depth, p, b, panel_stride, panels, [=](int64_t row, int64_t panel, Vec<A> value) {
        A* to = sums + row * pitch + panel * kLanes;
        (Vec<A>::load(to) + value).store(to);
      });
}

#define LEEDL_PRODUCTS(E)                                                                                            \
  template void multiply_scores<E>(int64_t, int64_t, const E*, const E*, int64_t, SumOf<E>*);                        \
  template void multiply_values<E>(int64_t, const E*, const E*, int64_t, int64_t, const SumOf<E>*, SumOf<E>*); \
  template void add_transposed<E>(int64_t, const E*, const E*, int64_t, int64_t, SumOf<E>*);

LEEDL_PRODUCTS(float)
LEEDL_PRODUCTS(double)
#if defined(__AVX512F__)
LEEDL_PRODUCTS(BFloat16Pair)
#endif
#undef LEEDL_PRODUCTS

}  // namespace leedl
