// Products of bfloat16 matrices on AMX, the tile registers of Intel's processors: see the chapters on AMX in the
// Software Developer's Manual, volume 1, and in the Optimization Reference Manual.
//
// A register holds 16 rows of 64 bytes. One instruction adds 16 x 16 sums of 32 products each: A comes as rows of 16
// pairs, B as 16 vectors of a panel (gemm.h), C is float. Products go in blocks of two by two tiles of C, so that each
// tile of A and of B is loaded for two of them.
#pragma once

#include "gemm.h"

namespace leedl {

constexpr int64_t kTileSize = 16;  // rows of A and C, columns of B and C, pairs along the depth

// Whether bfloat16 products go to AMX: where the processor has it, the system lets this process use it, and use_amx has
// not said otherwise.
bool multiplies_on_amx();

// AMX from now on, or not, whatever this machine has. For tests, which may bring an emulator.
void use_amx(bool wanted);

// What bfloat16 matrices are multiplied by: "AMX", "AVX512-BF16" or "float32".
const char* bfloat16_products();

// The calling thread's tile registers, configured for multiply_on_amx, while this lives; nothing unless it is wanted.
class TileRegisters {
 public:
  explicit TileRegisters(bool wanted);
  ~TileRegisters();
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  const bool configured_;
};

// A: rows of pairs, `stride` of them apart.
struct AmxRows {
  const BFloat16Pair* data;
  int64_t stride;
};

// B: panels of kTileSize columns, with a vector of pairs for each step along the depth.
struct AmxPanels {
  const BFloat16Pair* data;
  int64_t panel_stride, step_stride;  // in pairs
};

// C: rows of numbers, `stride` of them apart.
struct AmxSums {
  float* data;
  int64_t stride;
};

// C = A . B, or C + A . B where `add`. Tiles are read and written whole: rows are rounded up to kTileSize, and so is
// the depth, in pairs.
void multiply_on_amx(int64_t rows, int64_t depth, AmxRows a, AmxPanels b, int64_t panels, bool add, AmxSums c);

}  // namespace leedl
