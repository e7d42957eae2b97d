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

struct AttentionWindow {
  int64_t seqlen_q;
  int64_t key_end;  // keys from here on are padding; at most seqlen_k
  int64_t shift;
  int64_t window_left;
  int64_t window_right;

  LEEDL_HOST_DEVICE int64_t key_begin(int64_t query) const {
    const int64_t first = query + shift - window_left;
    return first > 0 ? first : 0;
  }
  LEEDL_HOST_DEVICE int64_t key_end_of(int64_t query) const {
    const int64_t last = query + shift + window_right;
    return last < key_end ? last + 1 : key_end;
  }
  LEEDL_HOST_DEVICE int64_t query_begin(int64_t key) const {
    const int64_t first = key - shift - window_right;
    return first > 0 ? first : 0;
  }
  LEEDL_HOST_DEVICE int64_t query_end_of(int64_t key) const {
    const int64_t last = key - shift + window_left;
    return last < seqlen_q ? last + 1 : seqlen_q;
  }
};

}  // namespace leedl
