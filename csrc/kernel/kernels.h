// One KernelTable per ISA: plain data and function pointers, so that nothing above names a format or an ISA. The arguments
// are plain structs; the caller owns every pointer. Packed inputs and sums are opaque to the caller except for size:
//   inputs of m rows        m * words 32-bit words, in token blocks; see packed_inputs.h
//   sums of a tile          [row][32] floats
#pragma once
#include <cstdint>

#include "format/matrix_layout.h"
#include "format/quantize.h"

namespace hetero {

struct PackArgs {  // columns [begin, end) of some rows of x -> their place in packed rows, rounded to the format's input type
  const void* x;           // column `begin` of row 0: float, or bf16 if x_is_bf16
  bool x_is_bf16;
  const int32_t* tokens;   // which rows of x, [rows]; null: rows 0, 1, ...
  int rows;
  int64_t stride;          // of x, in elements
  int64_t begin, end;      // begin: a multiple of the format's block; end: too, or the last column
  const uint16_t* scales;  // by which columns 0, 1, ... are multiplied, bf16 powers of two; null: 1. Integer formats only
  const MatrixLayout* layout;  // of the matrix whose inputs they are
  uint32_t* out;           // the packed rows; zeros follow the last column
};

struct GemmArgs {  // sums[row][32] = W x[row], one fp32 chain per sum in the order of K
  const uint8_t* tile;
  const MatrixLayout* layout;
  const uint32_t* x;       // packed rows
  int rows;
  float* sums;
  const uint8_t* next;     // the tile that will be read after this one, to prefetch; null: the one that follows in memory
};

struct SiluMulArgs {  // silu(gate) * up of a tile's 32 intermediate columns
  const float* gate;       // sums of the gate tile
  const float* up;
  int rows;
  float* out;
  int64_t stride;          // of out, in floats
};

struct AddRowsArgs {  // y[tokens[r]][0..cols) += weights[r] * sums[r], rows in order
  const float* sums;
  int rows;
  const int32_t* tokens;
  const float* weights;
  float* y;                // of token 0, at the tile's first column
  int64_t stride;          // of y, in floats
  int cols;                // 1..32
};

// ---- matrices and keys as they lie in memory (kernel/rows.h); the other rows do not change a bit of a sum

struct RowMatrix {         // fp32 or bf16, row after row, or the rows that `at` names
  const void* data;
  bool bf16;
  int64_t stride;          // elements
  const int64_t* at;       // null: rows 0, 1, ...
};

struct DotArgs {  // out[t][n] = w[n] . x[t], or that much more
  RowMatrix w;
  int64_t rows, cols;      // of w
  const void* x;           // floats, or bf16 (which w is then too)
  bool x_is_bf16;
  int64_t x_stride;        // elements
  int64_t tokens;
  float* out;
  int64_t out_stride;
  bool add;
};

struct MixArgs {  // out[m] = sum over s of weights[m][s] w[s]
  RowMatrix w;
  int64_t rows, cols;
  const float* weights;
  int64_t weights_stride;
  int64_t outputs;
  float* out;
  int64_t out_stride;
};

struct NormArgs {  // out = weight * x / sqrt(mean(x^2) + eps); may be in place
  const float* x;
  const float* weight;
  int64_t cols;
  float eps;
  float* out;
};

struct RowKernels {
  void (*dot)(const DotArgs&);
  void (*round)(const float* x, int64_t count, uint16_t* out);  // to bf16
  void (*widen)(const uint8_t* codes, int64_t count, float scale, float* out);  // scale times E4M3
  void (*mix)(const MixArgs&);
  void (*softmax)(float* x, int64_t count, float scale);  // of scale * x, in place; room for a multiple of kLanes
  void (*rms_norm)(const NormArgs&);
};

struct FormatKernels {
  void (*pack)(const PackArgs&);
  void (*gemm)(const GemmArgs&);
  Quantize quantize;       // integer formats, else null
};

struct KernelTable {
  const char* name;
  uint32_t needs;          // Feature bits
  FormatKernels formats[kFormats];
  void (*silu_mul)(const SiluMulArgs&);
  void (*add_rows)(const AddRowsArgs&);
  RowKernels rows;
};

}  // namespace hetero
