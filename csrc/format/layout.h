// Where everything of one expert is: one contiguous blob, the same for every ISA and both devices, on disk and in memory.
//   gate tile 0, up tile 0, gate tile 1, up tile 1, ...   job 1 streams them in this order
//   down tile 0, down tile 1, ...                         job 2
//   integer formats: column scales of gate and up, bf16 [hidden], and of down, bf16 [intermediate]; see column_scales.h
//   zeros up to a multiple of 4096 bytes
// Rows are padded to 32 and K to a whole line (integer formats: to a whole group) with zero codes. Scale blocks are those of
// the true rows and columns.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "format/matrix_layout.h"

namespace hetero {

inline constexpr int64_t kBlobAlign = 4096;

struct ExpertLayout {
  Format format;
  std::string book;      // INT4's books: "gaussian" or "linear"; empty otherwise
  int64_t hidden, intermediate;
  MatrixLayout gate, down;  // up is laid out like gate
  int64_t down_offset, scales_offset, scales_bytes, blob_bytes;  // scales_bytes: 0 where columns have no scales
  int64_t hidden_block;  // intermediate columns that are made ready for `down` together

  // group: 32, 64 or 128 in integer formats, else 0; 0 = the format's own. book: INT4 only, empty = gaussian.
  ExpertLayout(Format format, int64_t hidden, int64_t intermediate, int group = 0, const std::string& book = "");

  enum Part { kGate, kUp, kDown };
  const MatrixLayout& matrix(Part part) const { return part == kDown ? down : gate; }
  int64_t first_tile(Part part) const { return part == kGate ? 0 : part == kUp ? gate.tile_bytes : down_offset; }
  int64_t column_scales(Part part) const { return scales_offset + (part == kDown ? hidden * sizeof(uint16_t) : 0); }
  int64_t tile_stride(Part part) const { return part == kDown ? down.tile_bytes : 2 * gate.tile_bytes; }
};

std::vector<std::string> format_names();
Format format_named(const std::string& name);  // throws, listing the names
const char* format_name(Format format);

}  // namespace hetero
