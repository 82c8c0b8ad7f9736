// Inputs of a product in the form its kernels read: rows in token blocks, the tokens of a block interleaved word by word.
// Floating-point formats: [step][token]. Integer formats, for a block of w tokens:
//   steps        [group][part][group / 4][w]  four int8 each
//   corrections  [group][part][w]             int32, -128 * sum of the part over the group
//   scales       [block of 128][2][w]         float, the block's scale and its reciprocal
// A block's scale is absmax / 127 (/ 32512 in two parts), but at least 2^-40, so that quotients of scales stay finite; a
// value below that is noise beside whatever else a row can hold. A block with NaN or infinity has the scale NaN.
#pragma once
#include "format/int4.h"
#include "format/int8.h"
#include "kernel/kernels.h"
#include "kernel/token_blocks.h"

namespace hetero {
namespace {

struct InputPlace {
  uint32_t* steps;
  int32_t* corrections;
  float* scales;

  InputPlace at(const MatrixLayout& m, int64_t group, int64_t width) const {
    const int64_t n = group * m.parts, block = group * m.quantization.group / kInputBlock;
    return {steps + n * (m.quantization.group / 4) * width, corrections + n * width, scales + block * 2 * width};
  }
};

// `words` is where a block of `width` tokens begins.
template <IntegerFormat F> InputPlace input_place(uint32_t* words, const MatrixLayout& m, int64_t width) {
  const int64_t corrections = m.scale_cols * m.parts * width, steps = corrections * (m.quantization.group / F::step_k);
  return {words, reinterpret_cast<int32_t*>(words + steps), reinterpret_cast<float*>(words + steps + corrections)};
}

inline F32 load_some(const void* x, bool is_bf16, int64_t at, int64_t count) {  // zeros from count on
  const auto* f = static_cast<const float*>(x) + at;
  const auto* h = static_cast<const uint16_t*>(x) + at;
  if (count >= 16) return is_bf16 ? load_bf16(h) : load(f);
  float some[16] = {};
  for (int64_t i = 0; i < count; i++) some[i] = is_bf16 ? as_float(uint32_t{h[i]} << 16) : f[i];
  return load(some);
}

// 16 values as activation steps: 16 floats, or 8 bf16 pairs.
template <int step_k> inline void to_steps(F32 values, uint32_t* steps) {
  if constexpr (step_k == 1) store(reinterpret_cast<float*>(steps), values);
  else store_bf16(reinterpret_cast<uint16_t*>(steps), values);
}

// Calls body(row, its column `begin` in x, where its token block is packed, its place there, the block's width).
template <class F, class Body> void each_row(const PackArgs& a, Body body) {
  const TokenBlocks blocks = token_blocks<F>(a.rows);
  for (int b = 0; b < blocks.count; b++)
    for (int j = 0; j < blocks.width(b); j++) {
      const int64_t row = blocks.start(b) + j;
      body((a.tokens == nullptr ? row : a.tokens[row]) * a.stride, a.out + blocks.start(b) * a.layout->words, j, blocks.width(b));
    }
}

template <class F> void pack(const PackArgs& args) {
  const PackArgs a = args;
  constexpr int kSteps = 16 / F::step_k;
  const int64_t last = a.end == a.layout->cols ? a.layout->words : a.end / F::step_k;
  each_row<F>(a, [&](int64_t x, uint32_t* out, int64_t j, int64_t width) {
    for (int64_t s = a.begin / F::step_k; s < last; s += kSteps) {
      alignas(64) uint32_t steps[16];
      const int64_t k = s * F::step_k;
      to_steps<F::step_k>(load_some(a.x, a.x_is_bf16, x + k - a.begin, a.end - k), steps);
      for (int64_t i = 0; i < kSteps && s + i < last; i++) out[(s + i) * width + j] = steps[i];
    }
  });
}

struct QuantizedBlock {  // of one row
  float scale, reciprocal;
  alignas(64) uint8_t high[kInputBlock], low[kInputBlock];  // one part: `low` only
  I32 values[kInputBlock / 16];
};

// The `count` values from `at` on, up to column a.end, zeros after them; each times the scale of its column.
inline void quantize_block(const PackArgs& a, int64_t at, int64_t count, QuantizedBlock& q) {
  constexpr int kVectors = kInputBlock / 16;
  F32 x[kVectors], most = set1(0), poison = set1(0);
  for (int v = 0; v < kVectors; v++) {
    x[v] = load_some(a.x, a.x_is_bf16, at + v * 16, count - v * 16);
    if (a.scales != nullptr) x[v] = mul(x[v], load_some(a.scales, true, a.end - count + v * 16, count - v * 16));
    most = max(abs(x[v]), most);
    poison = fma(x[v], set1(0), poison);
  }
  const bool finite = !any_nan(poison);
  const float scale = greatest(most) * (1 / (a.layout->parts == 1 ? 127.f : 32512.f));
  q.scale = finite ? (scale > 0x1p-40f ? scale : 0x1p-40f) : as_float(0x7fc00000);
  q.reciprocal = 1 / q.scale;
  for (int v = 0; v < kVectors; v++) {
    q.values[v] = finite ? round(mul(x[v], set1(q.reciprocal))) : set1_int(0);
    store_bytes(q.low + v * 16, q.values[v]);
    if (a.layout->parts == 2) store_bytes(q.high + v * 16, over_256(q.values[v]));
  }
}

inline void put_steps(const uint8_t* bytes, int64_t count, int64_t width, uint32_t* out) {
  for (int64_t i = 0; i < count; i++) __builtin_memcpy(out + i * width, bytes + 4 * i, 4);
}

template <IntegerFormat F> void pack_int8(const PackArgs& args) {
  const PackArgs a = args;
  const MatrixLayout& m = *a.layout;
  const int group = m.quantization.group, block_groups = kInputBlock / group;
  each_row<F>(a, [&](int64_t x, uint32_t* out, int64_t j, int64_t width) {
    const InputPlace row = input_place<F>(out + j, m, width);
    // input_place counts from the block's begin, and j shifts all three arrays alike
    for (int64_t k = a.begin; k < a.end; k += kInputBlock) {
      QuantizedBlock q;
      quantize_block(a, x + k - a.begin, a.end - k, q);
      InputPlace to = row.at(m, k / group, width);
      to.scales[0] = q.scale, to.scales[width] = q.reciprocal;
      const int64_t groups = m.scale_cols - k / group < block_groups ? m.scale_cols - k / group : block_groups;
      for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * group / 16, last = first + group / 16;
        I32 sum = set1_int(0);
        for (int64_t v = first; v < last; v++) sum = add(sum, q.values[v]);
        int32_t whole = total(sum);
        if (m.parts == 2) {
          I32 high = set1_int(0);
          for (int64_t v = first; v < last; v++) high = add(high, over_256(q.values[v]));
          const int32_t upper = total(high);
          put_steps(q.high + g * group, group / 4, width, to.steps);
          *to.corrections = -128 * upper;
          whole -= 256 * upper;
          to.steps += group / 4 * width, to.corrections += width;
        }
        put_steps(q.low + g * group, group / 4, width, to.steps);
        *to.corrections = -128 * whole;
        to.steps += group / 4 * width, to.corrections += width;
      }
    }
  });
}

}  // namespace
}  // namespace hetero
