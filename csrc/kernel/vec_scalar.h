// Sixteen floats in plain C++: the specification of the vector interface. A fused multiply-add rounds once (fmaf), as the
// vector units do, so that FP32 gives the same bits everywhere. min/max return the second operand if either is NaN (x86).
#pragma once
#include <cstdint>
#include <cstring>

#include "base/bf16.h"
#include "base/fp8.h"

namespace hetero {
namespace {

constexpr int kTiles = 1;       // tiles of a register block when there are several token blocks
constexpr int kTokens = 4;      // most tokens of a block
constexpr int kFoldTokens = 4;  // the same where sums are folded with a scale

struct F32 {
  float v[16];
};
struct Pair {  // one bf16 pair (k, k + 1) of each of 16 rows
  F32 even, odd;
};

template <class Op> inline F32 each(Op op) {
  F32 r;
  for (int i = 0; i < 16; i++) r.v[i] = op(i);
  return r;
}

inline F32 load(const float* p) { return each([&](int i) { return p[i]; }); }
inline void store(float* p, F32 a) { std::memcpy(p, a.v, sizeof a.v); }
inline F32 set1(float a) { return each([&](int) { return a; }); }
inline F32 fma(F32 a, F32 b, F32 c) { return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); }); }
inline F32 add(F32 a, F32 b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline F32 sub(F32 a, F32 b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline F32 mul(F32 a, F32 b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline F32 div(F32 a, F32 b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline F32 min(F32 a, F32 b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline F32 max(F32 a, F32 b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
// a * 2^n, where n is the low mantissa bits of `shifted` (n + 1.5 * 2^23); the result must be normal.
inline F32 scale_exp2(F32 a, F32 shifted) {
  return each([&](int i) { return as_float(as_bits(a.v[i]) + (as_bits(shifted.v[i]) << 23)); });
}

inline F32 load_bf16(const uint16_t* p) { return each([&](int i) { return bf16_to_float(p[i]); }); }
inline void store_bf16(uint16_t* p, F32 a) {
  for (int i = 0; i < 16; i++) p[i] = float_to_bf16(a.v[i]);
}

inline F32 load_line(const uint8_t* line) {
  F32 r;
  std::memcpy(r.v, line, 64);
  return r;
}
inline Pair load_pair(const uint8_t* line) {
  uint16_t h[32];
  std::memcpy(h, line, 64);
  return {each([&](int i) { return bf16_to_float(h[2 * i]); }), each([&](int i) { return bf16_to_float(h[2 * i + 1]); })};
}
// E4M3 bytes in the order k0 k2 k1 k3 of each row.
inline void load_e4m3(const uint8_t* line, Pair& first, Pair& second) {
  const auto byte = [&](int at) { return each([&](int i) { return e4m3_to_float(line[4 * i + at]); }); };
  first = {byte(0), byte(2)};
  second = {byte(1), byte(3)};
}

inline F32 dot(F32 acc, F32 w, uint32_t x) { return fma(w, set1(as_float(x)), acc); }
inline F32 dot(F32 acc, const Pair& w, uint32_t x) {
  return fma(w.odd, set1(as_float(x & 0xffff0000)), fma(w.even, set1(as_float(x << 16)), acc));
}
inline void prefetch(const uint8_t*) {}

}  // namespace
}  // namespace hetero
