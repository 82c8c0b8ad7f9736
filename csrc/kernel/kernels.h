// One KernelTable per ISA: plain data and function pointers, so that nothing above names a format or an ISA. The arguments
// are plain structs; the caller owns every pointer. Packed activations and sums are opaque to the caller except for size:
//   activations of m rows   m * steps 32-bit words, in token blocks: [block][step][token of block]
//   sums of a tile          [row][16] floats
#pragma once
#include <cstdint>

#include "format/format.h"

namespace hetero {

struct PackArgs {  // rows of x -> packed activations, rounded to the format's activation type
  const void* x;           // [T, cols] float, or bf16 if x_is_bf16
  bool x_is_bf16;
  const int32_t* tokens;   // which rows of x, [rows]
  int rows;
  int64_t cols, steps;     // steps beyond cols are zero
  uint32_t* out;
};

struct GemmArgs {  // sums[tile][row][16] = W[tile] x[row], one fp32 chain per sum in the order of K
  const uint8_t* tiles;    // `count` neighbouring tiles (1 or 2), 64-byte aligned
  int64_t tile_bytes, scale_offset;
  int64_t lines;
  int count;
  const uint32_t* x;       // packed activations of `rows` rows
  int rows;
  float* sums;
};

struct SiluMulArgs {  // silu(gate) * up of a tile's 16 intermediate columns -> their place in packed activations
  const float* gate;       // sums of the gate tile
  const float* up;
  int rows;
  int64_t tile, steps;     // columns from 16 * tile on, as far as a row of `steps` reaches
  uint32_t* out;           // packed activations of `rows` rows
};

struct AddRowsArgs {  // y[tokens[r]][0..cols) += weights[r] * sums[r], rows in order
  const float* sums;
  int rows;
  const int32_t* tokens;
  const float* weights;
  float* y;                // of token 0, at the tile's first column
  int64_t stride;          // of y, in floats
  int cols;                // 1..16
};

struct FormatKernels {
  void (*pack)(const PackArgs&);
  void (*gemm)(const GemmArgs&);
  void (*silu_mul)(const SiluMulArgs&);
};

struct KernelTable {
  const char* name;
  uint32_t needs;          // Feature bits
  FormatKernels formats[kFormats];
  void (*add_rows)(const AddRowsArgs&);
};

}  // namespace hetero
