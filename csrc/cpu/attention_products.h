// The matrix products of attention for operands of float, double and pairs of bfloat16 numbers; see gemm.h.
#pragma once

#include "amx.h"
#include "attention.h"

namespace leedl {

template <typename E>
using SumOf = typename Operand<E>::Sum;

// What the elements of packed operands are, for tensors of T, and whether they are multiplied on AMX: body(Tag<E>(),
// std::bool_constant<kAmx>()).
template <typename T, typename Body>
void dispatch_products(const Body& body) {
  dispatch_operand<T>([&](auto tag) {
    if constexpr (!std::is_same_v<typename decltype(tag)::Type, Accumulate<T>>) {
      if (multiplies_on_amx()) return body(tag, std::true_type());
    }
    body(tag, std::false_type());
  });
}

// Rows of a strip's scores are 37 cache lines of floats apart: odd, so that they spread over the cache's sets.
constexpr int64_t kScorePitch = 592;

// scores = rows . panels for the kStripRows rows of a strip, kHeadPitch apart, and `count` panels; the scores' rows are
// kScorePitch apart. The products of each score are summed in `runs` runs one after the other.
template <typename E>
void multiply_scores(int64_t runs, int64_t depth, const E* rows, const E* panels, int64_t count, SumOf<E>* scores);

// out = P . V, or out * rescale + P . V where rescale is not null, for kHalfRows rows of P, kScorePitch apart. Rows of
// out are `panels` vectors apart.
template <typename E>
void multiply_values(int64_t depth, const E* p, const E* values, int64_t panel_stride, int64_t panels,
                     const SumOf<E>* rescale, SumOf<E>* out);

// sums += P^T . B over `depth` rows of P, kScorePitch apart, for kHalfRows of its columns. Rows of sums are `panels`
// vectors apart.
template <typename E>
void add_transposed(int64_t depth, const E* p, const E* b, int64_t panel_stride, int64_t panels, SumOf<E>* sums);

}  // namespace leedl
