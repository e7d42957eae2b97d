// Each AMX instruction in a function that Python can call, by GCC's intrinsics, and by assembly where a test wants a
// certain form of address. Tiles are 0, 1 and 2; what is loaded and stored is of the shapes that `config` has.
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX __attribute__((target("amx-tile,amx-bf16")))
#define BARRIER() __asm__ volatile("" ::: "memory")  // GCC 12's intrinsics do not say what they read and write

// 0 where Linux lets this process use tiles.
long request_permission(void) { return syscall(SYS_arch_prctl, 0x1023, 18); }

AMX void load_and_store_config(const void* config, void* stored) {
  BARRIER();
  _tile_loadconfig(config);
  _tile_storeconfig(stored);
  BARRIER();
}

AMX void store_config_after_release(const void* config, void* stored) {
  BARRIER();
  _tile_loadconfig(config);
  _tile_release();
  _tile_storeconfig(stored);
  BARRIER();
}

AMX void copy(const void* config, const void* from, int64_t stride, void* to, int64_t to_stride, int streamed) {
  BARRIER();
  _tile_loadconfig(config);
  if (streamed) {
    _tile_stream_loadd(0, from, stride);
  } else {
    _tile_loadd(0, from, stride);
  }
  _tile_stored(0, to, to_stride);
  _tile_release();
  BARRIER();
}

// Loads tiles 0 and 1, zeroes tile 0, and stores both.
AMX void zero_one_of_two(const void* config, const void* from, void* to0, void* to1) {
  BARRIER();
  _tile_loadconfig(config);
  _tile_loadd(0, from, 64);
  _tile_loadd(1, from, 64);
  _tile_zero(0);
  _tile_stored(0, to0, 64);
  _tile_stored(1, to1, 64);
  _tile_release();
  BARRIER();
}

// Tile 0 after the configuration was loaded a second time.
AMX void configure_again(const void* config, const void* from, void* to) {
  BARRIER();
  _tile_loadconfig(config);
  _tile_loadd(0, from, 64);
  _tile_loadconfig(config);
  _tile_stored(0, to, 64);
  _tile_release();
  BARRIER();
}

// c += a . b, all with rows 64 bytes apart, on the tiles C, A and B.
#define MULTIPLY(name, C, A, B)                                                 \
  AMX void name(const void* config, void* c, const void* a, const void* b) {   \
    BARRIER();                                                                  \
    _tile_loadconfig(config);                                                   \
    _tile_loadd(C, c, 64);                                                      \
    _tile_loadd(A, a, 64);                                                      \
    _tile_loadd(B, b, 64);                                                      \
    _tile_dpbf16ps(C, A, B);                                                    \
    _tile_stored(C, c, 64);                                                     \
    _tile_release();                                                            \
    BARRIER();                                                                  \
  }

MULTIPLY(multiply, 0, 1, 2)
// Tiles above 7 do not exist, but registers of an address above 7 do, and every tile has a number of its own.
MULTIPLY(multiply_on_the_last_tiles, 7, 6, 5)

// The same tile, rows 128 bytes apart from `from` on, by eight forms of address into eight places of `to`, 1024 bytes
// each.
void copy_by_every_form_of_address(const void* config, const char* from, char* to) {
  static char here[64] __attribute__((aligned(64)));
  __builtin_memcpy(here, config, 64);
  const int64_t stride = 64;
  BARRIER();
  __asm__ volatile("ldtilecfg %0" : : "m"(here));  // relative to rip
#define COPY(source, ...)                                                                                    \
  __asm__ volatile("tileloadd " source ", %%tmm3\n\ttilestored %%tmm3, (%0,%1)" : : "r"(to), "r"(stride), \
                   __VA_ARGS__ : "memory");                                                                  \
  to += 1024
  register const char* r13 __asm__("r13") = from;
  register int64_t r9 __asm__("r9") = 128;
  register const char* r12 __asm__("r12") = from;
  register int64_t rcx __asm__("rcx") = 64;
  COPY("(%2,%3)", "r"(from), "r"((int64_t)128));
  COPY("(%2,%3,2)", "r"(from), "r"((int64_t)64));
  COPY("(%2,%3,8)", "r"(from), "r"((int64_t)16));
  COPY("-8(%2,%3)", "r"(from + 8), "r"((int64_t)128));
  COPY("4096(%2,%3)", "r"(from - 4096), "r"((int64_t)128));
  COPY("(%2,%3)", "r"(r13), "r"(r9));
  COPY("(%2,%3,2)", "r"(r12), "r"(rcx));
  COPY("(%2,%3,4)", "r"(from), "r"((int64_t)32));
#undef COPY
  __asm__ volatile("tilerelease");
  BARRIER();
}

// Every row from one address: there is no index, and so no stride.
void load_without_index(const void* config, const void* from, void* to) {
  const int64_t stride = 64;
  BARRIER();
  __asm__ volatile("ldtilecfg 64(%0)" : : "r"((const char*)config - 64) : "memory");
  __asm__ volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x04, 0x20" : : "a"(from) : "memory");  // tileloadd (%rax), %tmm0
  __asm__ volatile("tilestored %%tmm0, (%0,%1)" : : "r"(to), "r"(stride) : "memory");
  __asm__ volatile("tilerelease");
  BARRIER();
}

AMX void use_without_configuration(void) { _tile_zero(0); }

AMX void multiply_a_tile_with_itself(const void* config) {
  _tile_loadconfig(config);
  __asm__ volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1");  // tdpbf16ps %tmm1, %tmm1, %tmm0, which no assembler takes
}
