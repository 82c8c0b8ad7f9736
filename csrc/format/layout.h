// Where everything of one expert is: one contiguous blob, the same for every ISA and both devices, on disk and in memory.
//   gate tile 0, up tile 0, gate tile 1, up tile 1, ...   job 1 streams them in this order
//   down tile 0, down tile 1, ...                         job 2
//   zeros up to a multiple of 4096 bytes
// Rows are padded to 16 and K to a whole line with zero codes. Scale blocks are those of the true rows and columns.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "format/format.h"

namespace hetero {

inline constexpr int64_t kBlobAlign = 4096;

struct MatrixLayout {
  int64_t rows, cols;    // true sizes: outputs, inputs
  int64_t tiles;         // ceil(rows / 16)
  int64_t lines;         // of one tile
  int64_t steps;         // 32-bit activation steps of one input row, padding included
  int64_t scale_cols;    // scales of one tile = blocks along K, 0 = none
  int64_t scale_offset;  // bytes from a tile's begin
  int64_t tile_bytes;

  MatrixLayout(Format format, int64_t rows, int64_t cols);
};

struct ExpertLayout {
  Format format;
  int64_t hidden, intermediate;
  MatrixLayout gate, down;  // up is laid out like gate
  int64_t down_offset, blob_bytes;

  ExpertLayout(Format format, int64_t hidden, int64_t intermediate);

  enum Part { kGate, kUp, kDown };
  const MatrixLayout& matrix(Part part) const { return part == kDown ? down : gate; }
  int64_t first_tile(Part part) const { return part == kGate ? 0 : part == kUp ? gate.tile_bytes : down_offset; }
  int64_t tile_stride(Part part) const { return part == kDown ? down.tile_bytes : 2 * gate.tile_bytes; }
};

std::vector<std::string> format_names();
Format format_named(const std::string& name);  // throws, listing the names
const char* format_name(Format format);

}  // namespace hetero
