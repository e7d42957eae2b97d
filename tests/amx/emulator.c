// Intel's AMX-TILE and AMX-BF16 instructions for processors that lack them: loading this library installs a handler of
// SIGILL that executes them on tiles in memory, a set for each thread, as Intel's Software Developer's Manual defines
// them (volume 2, and the exception classes AMX-E1 to E6), and steps over them. For tests: each costs a signal.
//
// Where the processor would raise #UD the process dies of SIGILL, where #GP of SIGSEGV; the reason goes to stderr.
#define _GNU_SOURCE
#include <immintrin.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

enum { kTiles = 8, kMaxRows = 16, kRowBytes = 64 };  // of palette 1

enum Instruction { kLoadConfig, kStoreConfig, kRelease, kZero, kLoad, kStore, kProduct, kInstructions };

// How many of each were executed, by all threads.
atomic_ullong amx_emulator_counts[kInstructions];

// What LDTILECFG reads and STTILECFG writes.
struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
};

struct State {
  struct Config config;
  uint8_t tiles[kTiles][kMaxRows][kRowBytes] __attribute__((aligned(64)));
};

// Initial-exec: a handler must not wait for the loader to make thread-local memory. It is never unmapped.
static __thread struct State* thread_state __attribute__((tls_model("initial-exec")));

static struct sigaction previous;

static struct State* state(void) {
  if (thread_state == NULL) {
    void* memory = mmap(NULL, sizeof(struct State), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) _exit(71);
    thread_state = memory;
  }
  return thread_state;
}

static void say(const char* reason) {
  const char prefix[] = "amx emulator: ";
  if (write(STDERR_FILENO, prefix, sizeof prefix - 1) < 0 || write(STDERR_FILENO, reason, strlen(reason)) < 0 ||
      write(STDERR_FILENO, "\n", 1) < 0) {
    _exit(71);
  }
}

static void general_protection(const char* reason) {
  say(reason);
  signal(SIGSEGV, SIG_DFL);
  raise(SIGSEGV);
}

// Returned by execute() where the processor raises #UD.
static int undefined(const char* reason) {
  say(reason);
  return 0;
}

// An instruction with the VEX prefix C4, of map 0F38, W0 and 128 bits: the only form in which AMX comes.
struct Decoded {
  uint8_t opcode, prefix;  // 0: none, 1: 66, 2: F3, 3: F2
  uint8_t vvvv, mod, reg, rm;
  uint8_t* address;  // where mod is not 3: base + displacement, and with them scale * index unless it is a stride
  int64_t stride;    // of an operand with a SIB byte: scale * index
  int has_sib;
  int length;
};

static int64_t general_register(const ucontext_t* context, int number) {
  static const int kPlaces[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[kPlaces[number]];
}

static int64_t displacement(const uint8_t* at, int bytes) {
  int32_t value = 0;
  if (bytes == 1) return (int8_t)at[0];
  if (bytes == 4) memcpy(&value, at, 4);
  return value;
}

static int decode(const ucontext_t* context, struct Decoded* decoded) {
  const uint8_t* code = (const uint8_t*)context->uc_mcontext.gregs[REG_RIP];
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return 0;
  const int extend_reg = !(code[1] & 0x80), extend_index = !(code[1] & 0x40), extend_base = !(code[1] & 0x20);
  decoded->prefix = code[2] & 3;
  decoded->vvvv = ~(code[2] >> 3) & 15;
  decoded->opcode = code[3];
  decoded->mod = code[4] >> 6;
  decoded->reg = ((code[4] >> 3) & 7) + 8 * extend_reg;
  decoded->rm = (code[4] & 7) + 8 * extend_base;
  decoded->has_sib = decoded->mod != 3 && (code[4] & 7) == 4;
  decoded->stride = 0;
  decoded->address = NULL;
  int length = 5, bytes = decoded->mod == 1 ? 1 : decoded->mod == 2 ? 4 : 0;
  if (decoded->mod == 3) {
    decoded->length = length;
    return 1;
  }
  int64_t base;
  if (decoded->has_sib) {
    const uint8_t sib = code[length++];
    const int index = ((sib >> 3) & 7) + 8 * extend_index;
    if (index != 4) decoded->stride = (int64_t)((uint64_t)general_register(context, index) << (sib >> 6));
    const int without_base = (sib & 7) == 5 && decoded->mod == 0;
    if (without_base) bytes = 4;
    base = without_base ? 0 : general_register(context, (sib & 7) + 8 * extend_base);
  } else if (decoded->mod == 0 && (code[4] & 7) == 5) {  // relative to the next instruction
    bytes = 4;
    base = (int64_t)(code + length + 4);
  } else {
    base = general_register(context, decoded->rm);
  }
  decoded->address = (uint8_t*)(base + displacement(code + length, bytes));
  decoded->length = length + bytes;
  return 1;
}

static void load_config(struct State* tiles, const uint8_t* memory) {
  struct Config config;
  memcpy(&config, memory, sizeof config);
  if (config.palette > 1) general_protection("#GP: the palette is neither 0 nor 1");
  if (config.palette == 0) {
    memset(tiles, 0, sizeof *tiles);
    return;
  }
  for (int i = 0; i < 14; ++i) {
    if (config.reserved[i] != 0) general_protection("#GP: a reserved byte of the configuration is not 0");
  }
  for (int tile = 0; tile < 16; ++tile) {
    if (tile >= kTiles && (config.rows[tile] != 0 || config.colsb[tile] != 0)) {
      general_protection("#GP: palette 1 has 8 tiles");
    }
    if (config.rows[tile] > kMaxRows || config.colsb[tile] > kRowBytes) {
      general_protection("#GP: a tile has more than 16 rows or rows of more than 64 bytes");
    }
    if ((config.rows[tile] == 0) != (config.colsb[tile] == 0)) {
      general_protection("#GP: a tile has rows without bytes, or bytes without rows");
    }
  }
  memset(tiles, 0, sizeof *tiles);
  tiles->config = config;
}

// dst += a . b, a row of dst at a time, with the sums of even and of odd products kept apart until the end.
static __attribute__((noinline)) void product(struct State* tiles, int dst, int a, int b) {
  const int columns = tiles->config.colsb[dst] / 4, depth = tiles->config.colsb[a] / 4;
  for (int m = 0; m < kMaxRows; ++m) {
    float even[16] = {0}, odd[16] = {0}, sums[16] = {0};
    if (m < tiles->config.rows[dst]) {
      for (int k = 0; k < depth; ++k) {
        uint32_t pair, pairs[16];
        memcpy(&pair, tiles->tiles[a][m] + 4 * k, 4);
        memcpy(pairs, tiles->tiles[b][k], kRowBytes);
        const uint32_t low = pair << 16, high = pair & 0xffff0000u;
        float first, second;
        memcpy(&first, &low, 4);
        memcpy(&second, &high, 4);
        for (int n = 0; n < 16; ++n) {
          const union {
            uint32_t bits;
            float number;
          } b_even = {pairs[n] << 16}, b_odd = {pairs[n] & 0xffff0000u};
          even[n] = __builtin_fmaf(first, b_even.number, even[n]);
          odd[n] = __builtin_fmaf(second, b_odd.number, odd[n]);
        }
      }
      float before[16];
      memcpy(before, tiles->tiles[dst][m], kRowBytes);
      for (int n = 0; n < columns; ++n) sums[n] = before[n] + (even[n] + odd[n]);
    }
    memcpy(tiles->tiles[dst][m], sums, kRowBytes);
  }
}

// Whether the instruction was one of AMX's, and was executed.
static int execute(const struct Decoded* i) {
  enum { kNone, k66, kF3, kF2 };
  struct State* tiles = state();
  struct Config* config = &tiles->config;
  enum Instruction which;
  if (i->opcode == 0x49 && i->vvvv == 0 && i->mod != 3 && i->reg == 0 && i->prefix == kNone) {
    which = kLoadConfig;
    load_config(tiles, i->address + i->stride);
  } else if (i->opcode == 0x49 && i->vvvv == 0 && i->mod != 3 && i->reg == 0 && i->prefix == k66) {
    which = kStoreConfig;
    memcpy(i->address + i->stride, config, sizeof *config);
  } else if (i->opcode == 0x49 && i->vvvv == 0 && i->mod == 3 && i->reg == 0 && i->rm == 0 && i->prefix == kNone) {
    which = kRelease;
    memset(tiles, 0, sizeof *tiles);
  } else {
    const int zeroes = i->opcode == 0x49 && i->mod == 3 && i->prefix == kF2 && i->rm == 0 && i->vvvv == 0;
    const int moves = i->opcode == 0x4b && i->has_sib && i->prefix != kNone && i->vvvv == 0;
    const int multiplies = i->opcode == 0x5c && i->mod == 3 && i->prefix == kF3;
    if (!zeroes && !moves && !multiplies) return 0;
    if (config->palette == 0) return undefined("#UD: the tiles are not configured");
    if (i->reg >= kTiles || config->rows[i->reg] == 0) return undefined("#UD: the tile has no rows");
    const int rows = config->rows[i->reg], bytes = config->colsb[i->reg];
    uint8_t(*tile)[kRowBytes] = tiles->tiles[i->reg];
    if (zeroes) {
      which = kZero;
      memset(tile, 0, sizeof tiles->tiles[0]);
    } else if (moves && i->prefix == kF3) {
      which = kStore;
      for (int row = config->start_row; row < rows; ++row) memcpy(i->address + row * i->stride, tile[row], bytes);
    } else if (moves) {  // the hint of TILELOADDT1 changes nothing
      which = kLoad;
      if (config->start_row == 0) memset(tile, 0, sizeof tiles->tiles[0]);
      for (int row = config->start_row; row < rows; ++row) memcpy(tile[row], i->address + row * i->stride, bytes);
    } else {
      which = kProduct;
      const int a = i->rm, b = i->vvvv;
      if (a >= kTiles || b >= kTiles || config->rows[a] == 0 || config->rows[b] == 0) {
        return undefined("#UD: an operand has no rows");
      }
      if (a == b || a == i->reg || b == i->reg) return undefined("#UD: two operands are one tile");
      if (bytes % 4 != 0 || config->colsb[a] % 4 != 0 || config->colsb[b] % 4 != 0) {
        return undefined("#UD: a row is not made of pairs");
      }
      if (rows != config->rows[a] || config->colsb[a] / 4 != config->rows[b] || bytes != config->colsb[b]) {
        return undefined("#UD: the shapes of the operands do not fit");
      }
      _mm_setcsr(0x1f80 | 0x8040);  // round to nearest even, subnormal numbers are 0; a handler has an MXCSR of its own
      product(tiles, i->reg, a, b);
    }
    config->start_row = 0;
  }
  atomic_fetch_add(&amx_emulator_counts[which], 1);
  return 1;
}

static void on_illegal_instruction(int number, siginfo_t* info, void* memory) {
  (void)info;
  ucontext_t* context = memory;
  struct Decoded decoded;
  if (decode(context, &decoded) && execute(&decoded)) {
    context->uc_mcontext.gregs[REG_RIP] += decoded.length;
  } else {
    sigaction(number, &previous, NULL);  // the instruction is tried again, and dies of it
  }
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO};
  sigaction(SIGILL, &action, &previous);
}
