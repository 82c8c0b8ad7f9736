#include "dense/keys.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/bf16.h"
#include "base/fp8.h"
#include "base/round.h"

namespace hetero {
namespace {

// An FP8 row: codes, an fp32 scale for each group of them, the kept values; its parts may begin at any byte.
struct Fp8Row {
  uint8_t* codes;
  int64_t coded;

  uint8_t* scale(int64_t group) const { return codes + coded + 4 * group; }
  uint8_t* kept() const { return scale(ceil_div(coded, kKeyGroup)); }
};

Fp8Row row_at(const Keys& keys, int64_t slot) {
  return {static_cast<uint8_t*>(keys.data) + slot * keys.elements(), keys.width - keys.kept};
}

float scale_of(const float* x, int64_t count) {
  float largest = 0;
  for (int64_t i = 0; i < count; i++) {
    if (std::isnan(x[i])) return x[i];
    largest = std::max(std::fabs(x[i]), largest);
  }
  return std::max(largest / kE4m3Max, std::numeric_limits<float>::min());
}

}  // namespace

int64_t Keys::elements() const {
  if (plain()) return width;
  const int64_t coded = width - kept;
  return coded + 4 * ceil_div(coded, kKeyGroup) + 2 * kept;
}

void Keys::store(int64_t slot, const float* x) const {
  if (type == KeyType::fp32) {
    std::copy_n(x, width, static_cast<float*>(data) + slot * width);
  } else if (type == KeyType::bf16) {
    std::transform(x, x + width, static_cast<uint16_t*>(data) + slot * width, float_to_bf16);
  } else {
    const Fp8Row row = row_at(*this, slot);
    for (int64_t first = 0; first < row.coded; first += kKeyGroup) {
      const int64_t count = std::min(kKeyGroup, row.coded - first);
      const float scale = scale_of(x + first, count);
      for (int64_t i = first; i < first + count; i++) row.codes[i] = float_to_e4m3(x[i] / scale);
      std::memcpy(row.scale(first / kKeyGroup), &scale, 4);
    }
    for (int64_t i = 0; i < kept; i++) {
      const uint16_t value = float_to_bf16(x[row.coded + i]);
      std::memcpy(row.kept() + 2 * i, &value, 2);
    }
  }
}

void Keys::decode(const RowKernels& kernels, int64_t slot, float* x) const {
  const Fp8Row row = row_at(*this, slot);
  for (int64_t first = 0; first < row.coded; first += kKeyGroup) {
    float scale;
    std::memcpy(&scale, row.scale(first / kKeyGroup), 4);
    kernels.widen(row.codes + first, std::min(kKeyGroup, row.coded - first), scale, x + first);
  }
  for (int64_t i = 0; i < kept; i++) {
    uint16_t value;
    std::memcpy(&value, row.kept() + 2 * i, 2);
    x[row.coded + i] = bf16_to_float(value);
  }
}

}  // namespace hetero
