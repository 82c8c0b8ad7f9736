// Checkpoint tensors -> expert blob, and back to float by the scalar truth. Row-major sources, converted on the way without
// a full-size temporary: float and half sources round to the format; an E4M3 source keeps its codes and scales in FP8 and is
// upcast (value * scale, fp32, then rounded or quantised) otherwise. Single-threaded; callers pack several experts at once.
#pragma once
#include <cstdint>
#include <string>

#include "format/layout.h"
#include "format/quantize.h"

namespace hetero {

enum class Source { f32, bf16, f16, e4m3 };
Source source_named(const std::string& dtype);  // torch's name: float32, bfloat16, float16, float8_e4m3fn; throws
int64_t source_bytes(Source source);

struct SourceMatrix {
  const void* data;     // [rows, cols], row-major
  Source dtype;
  const float* scales;  // [ceil(rows/128), ceil(cols/128)], only and always for e4m3
};

// Writes every byte of part's tiles; padding is zero. `quantize`: that of an integer format, from the kernel table.
void pack_matrix(const ExpertLayout& layout, ExpertLayout::Part part, const SourceMatrix& from, Quantize quantize, uint8_t* blob);
// As pack_matrix, for INT4 under the linear books, with codes and fp16 scales that are given. codes: [rows, ceil(cols/8) * 4],
// two a byte, the first in the low bits; scales: [rows, ceil(cols/group)].
void pack_codes(const ExpertLayout& layout, ExpertLayout::Part part, const uint8_t* codes, const uint16_t* scales, uint8_t* blob);
// out: [rows, cols] of that part.
void dequantize_matrix(const ExpertLayout& layout, ExpertLayout::Part part, const uint8_t* blob, float* out);

}  // namespace hetero
