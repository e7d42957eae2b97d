// Preloaded: the kernels' working memory comes as NaN, so that what is read before it is written shows.
#include <stdlib.h>
#include <string.h>

void* aligned_alloc(size_t alignment, size_t size) {
  void* memory = NULL;
  return posix_memalign(&memory, alignment, size) == 0 ? memset(memory, 0xff, size) : NULL;
}
