// Checkpoint tensors -> expert blob, and back to float by the scalar truth. Row-major sources, converted on the way without
// a full-size temporary: float and half sources round to the format; an E4M3 source keeps its codes and scales in FP8 and is
// upcast (value * scale, fp32, then rounded or quantised) otherwise. Single-threaded; callers pack several experts at once.
#pragma once
#include <array>
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

struct Codes {  // INT4 as a checkpoint has it
  const uint8_t* codes;    // [rows, ceil(cols/8) * 4], two a byte, the first in the low bits
  const uint16_t* scales;  // fp16 [rows, ceil(cols/group)]
};

template <class T> using Parts = std::array<T, 3>;  // gate, up, down

// Writes every byte of the blob; padding is zero. `quantize`: that of an integer format, from the kernel table.
void pack_expert(const ExpertLayout& layout, const Parts<SourceMatrix>& from, Quantize quantize, uint8_t* blob);
// As pack_expert, for INT4 under the linear books, with given codes and scales, kept bit for bit: all column scales are 1.
void pack_codes(const ExpertLayout& layout, const Parts<Codes>& from, uint8_t* blob);
// out: [rows, cols] of that part, as it was before its columns were scaled.
void dequantize_matrix(const ExpertLayout& layout, ExpertLayout::Part part, const uint8_t* blob, float* out);

}  // namespace hetero
