// Sixteen floats in plain C++: the specification of the vector interface. A fused multiply-add rounds once (fmaf), as the
// vector units do, so that FP32 gives the same bits everywhere. min/max return the second operand if either is NaN (x86).
#pragma once
#include <cstdint>
#include <cstring>

#include "base/bf16.h"
#include "base/fp16.h"
#include "base/fp8.h"

namespace hetero {
namespace {

constexpr int kVectors = 1;     // vectors of 16 rows side by side in a register block: 1, or the tile's 2
constexpr int kTokens = 4;      // most tokens of a block
constexpr int kDotTokens = 4;   // the same for integer dots
constexpr int kRowSums = 4;     // sums that kernel/rows.h holds at once

struct F32 {
  float v[16];
};
struct I32 {
  int32_t v[16];
};
struct Bytes {  // four unsigned bytes of each of 16 rows
  uint8_t v[64];
};
struct BookChoice {  // INT4's books, and 16 rows' choices for the lines to come, two bits each
  const uint8_t* books;
  uint32_t lines[16];
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
inline Pair load_pairs(const uint16_t* p) { return load_pair(reinterpret_cast<const uint8_t*>(p)); }  // at any address
inline F32 dot(F32 acc, const Pair& a, const Pair& b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }
inline F32 load_e4m3(const uint8_t* p) { return each([&](int i) { return e4m3_to_float(p[i]); }); }  // at any address
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

inline F32 abs(F32 a) { return each([&](int i) { return as_float(as_bits(a.v[i]) & 0x7fffffff); }); }
inline F32 where_greater(F32 a, F32 b, F32 yes, F32 no) {  // a > b ? yes : no, false for NaN
  return each([&](int i) { return a.v[i] > b.v[i] ? yes.v[i] : no.v[i]; });
}
inline F32 add_where_greater(F32 sum, F32 a, F32 b, F32 term) {  // a > b ? sum + term : sum
  return each([&](int i) { return a.v[i] > b.v[i] ? sum.v[i] + term.v[i] : sum.v[i]; });
}
inline float greatest(F32 a) {  // no NaN
  float most = a.v[0];
  for (int i = 1; i < 16; i++) most = a.v[i] > most ? a.v[i] : most;
  return most;
}
inline float total(F32 a) {  // ((a0 + a8) + (a4 + a12)) + ...: halves are added until one is left
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; i++) a.v[i] += a.v[i + n];
  return a.v[0];
}
inline bool any_nan(F32 a) {
  bool any = false;
  for (int i = 0; i < 16; i++) any |= a.v[i] != a.v[i];
  return any;
}
inline F32 load_fp16(const uint16_t* p) { return each([&](int i) { return fp16_to_float(p[i]); }); }

template <class Op> inline I32 each_int(Op op) {
  I32 r;
  for (int i = 0; i < 16; i++) r.v[i] = op(i);
  return r;
}
inline I32 set1_int(int32_t a) { return each_int([&](int) { return a; }); }
inline I32 add(I32 a, I32 b) { return each_int([&](int i) { return a.v[i] + b.v[i]; }); }
inline I32 over_256(I32 a) { return each_int([&](int i) { return (a.v[i] + 128) >> 8; }); }  // rounded, halves up
inline F32 to_float(I32 a) { return each([&](int i) { return static_cast<float>(a.v[i]); }); }
inline I32 round(F32 a) {  // to nearest, ties to even; |a| < 2^22
  return each_int([&](int i) { return static_cast<int32_t>((a.v[i] + 12582912.f) - 12582912.f); });
}
inline int32_t total(I32 a) {
  int32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += a.v[i];
  return sum;
}
inline void store_bytes(uint8_t* p, I32 a) {  // the low byte of each
  for (int i = 0; i < 16; i++) p[i] = static_cast<uint8_t>(a.v[i]);
}

inline Bytes load_bytes(const uint8_t* line) {
  Bytes r;
  std::memcpy(r.v, line, 64);
  return r;
}
inline BookChoice choose_books(const uint8_t* books, const uint32_t* choices) {  // null: book 0
  BookChoice r{books, {}};
  if (choices != nullptr) std::memcpy(r.lines, choices, sizeof r.lines);
  return r;
}
inline void look_up(const uint8_t* line, BookChoice& c, Bytes& low, Bytes& high) {  // line by line
  for (int i = 0; i < 64; i++) {
    const uint8_t* book = c.books + (c.lines[i / 4] & 3) * 16;
    low.v[i] = book[line[i] & 15];
    high.v[i] = book[line[i] >> 4];
  }
  for (uint32_t& row : c.lines) row >>= 2;
}
inline void store_line(uint8_t* line, const Bytes& w) { std::memcpy(line, w.v, 64); }
// Exact: each row's four weights times the four signed bytes of x.
inline I32 dot(I32 acc, const Bytes& w, uint32_t x) {
  const auto signed_byte = [&](int k) { return static_cast<int8_t>(x >> (8 * k)); };
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 4; k++) acc.v[i] += w.v[4 * i + k] * signed_byte(k);
  return acc;
}

}  // namespace
}  // namespace hetero
