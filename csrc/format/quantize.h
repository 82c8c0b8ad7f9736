// What packing asks of an integer format's quantiser (kernel/quantize.h, one per ISA, all of them bit-equal).
#pragma once
#include <cstdint>

namespace hetero {
namespace {

// INT4's search: where the extreme weight may fall, in units of the greatest entry (127 of a Gaussian book).
constexpr float kExtremes[] = {-0.79f, -0.86f, -0.92f, -0.98f, -1.05f, -1.13f, 0.66f, 0.72f, 0.78f, 0.84f, 0.9f, 0.97f};
constexpr int kRefinements = 2;

}  // namespace

struct QuantizeArgs {  // 16 rows, group by group; books and choices are INT4's
  const float* weights;  // [groups * group][16], finite
  int64_t groups;
  int group;
  const uint8_t* books;
  uint8_t* codes;        // [groups * group][16]
  uint16_t* scales;      // [groups][16], fp16
  uint8_t* choices;      // [groups * group / 8][16]; null: all are 0
};

using Quantize = void (*)(const QuantizeArgs&);

}  // namespace hetero
