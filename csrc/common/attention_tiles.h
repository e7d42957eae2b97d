// Which keys a query sees and which queries see a key, for hosts and devices alike.
//
// Query i sees key j when i + shift - window_left <= j <= i + shift + window_right and j < key_end, where
// shift = seqlen_k - seqlen_q: the last query stands at the last key. Both begins and both ends grow with their
// argument, so a range of queries sees [begin(first), end(last)) together, and a range is empty when its end is not
// above its begin.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace leedl {

// Index holds sums of three of its members.
template <typename Index>
struct AttentionWindowOf {
  Index seqlen_q;
  Index key_end;  // keys from here on are padding; at most seqlen_k
  Index shift;
  Index window_left;
  Index window_right;

  LEEDL_HOST_DEVICE Index key_begin(Index query) const {
    const Index first = query + shift - window_left;
    return first > 0 ? first : 0;
  }
  LEEDL_HOST_DEVICE Index key_end_of(Index query) const {
    const Index last = query + shift + window_right;
    return last < key_end ? last + 1 : key_end;
  }
  LEEDL_HOST_DEVICE Index query_begin(Index key) const {
    const Index first = key - shift - window_right;
    return first > 0 ? first : 0;
  }
  LEEDL_HOST_DEVICE Index query_end_of(Index key) const {
    const Index last = key - shift + window_left;
    return last < seqlen_q ? last + 1 : seqlen_q;
  }
};

using AttentionWindow = AttentionWindowOf<int64_t>;

}  // namespace leedl
