// Where everything of one matrix is, inside its tiles and inside a packed row of its inputs. Plain data: kernels include it.
#pragma once
#include <cstdint>

#include "format/format.h"

namespace hetero {

struct Quantization {  // integer formats; zeros and null otherwise
  int group = 0;                   // columns of a row that share a scale
  const uint8_t* books = nullptr;  // INT4's, 64 bytes, 64-byte aligned
  bool choices = false;            // whether each row's share of a line chooses among them
};

struct MatrixLayout {
  int64_t rows, cols;    // true sizes: outputs, inputs
  int64_t tiles;         // ceil(rows / 32)
  int64_t lines;         // of one tile
  int64_t words;         // 32-bit words of one packed input row, padding and scales included
  int64_t scale_cols;    // scales along K: of a tile (FP8) or of each of its rows (integer formats), 0 = none
  int64_t scale_offset;  // bytes from a tile's begin
  int64_t choice_offset; // the same, of the choices of INT4's books, a line for every 16 lines
  int64_t tile_bytes;
  Quantization quantization;
  int parts;             // int8 parts of an input value; integer formats

  MatrixLayout(Format format, int64_t rows, int64_t cols, Quantization quantization, int parts);
};

}  // namespace hetero
