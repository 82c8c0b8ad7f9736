// INT8 (W8A8): w = (code - 128) * scale, one fp16 scale per row and `group` columns; absmax / 127. Tile [K/4][32][4], then
// the scales [K/group][32]. Codes are unsigned because vpdpbusd wants one unsigned operand:
//
//   sum x8 * (code - 128) = sum x8 * code - 128 * sum x8
//
// and the second term is one number per (token, group), with which the accumulator starts.
// Inputs are quantised per token and 128 columns. The intermediate rows (down's input) have heavy tails: as one int8 they
// bring the layer's error from 0.0148 to 0.0198, so they are taken in two parts, 256 * high + low, each a dot of its own.
#pragma once
#include "base/fp16.h"
#include "format/format.h"

namespace hetero {
namespace {

struct Int8 {
  static constexpr Format id = Format::int8;
  static constexpr const char* name = "INT8";
  using Code = uint8_t;
  static constexpr int line_k = 4, step_k = 4, group = 128, hidden_parts = 2;
  static constexpr int place(int k) { return k; }
  static constexpr float weight(const uint8_t* quad, int k, uint16_t scale, const uint8_t*) {
    return static_cast<float>(quad[k] - 128) * fp16_to_float(scale);
  }
  static constexpr void put(uint8_t* quad, int k, uint8_t code) { quad[k] = code; }
};

}  // namespace
}  // namespace hetero
