// The vector interface on AVX2 + FMA: sixteen floats are two registers. See vec_scalar.h for what each operation means.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "base/bits.h"

namespace hetero {
namespace {

constexpr int kVectors = 1;
constexpr int kTokens = 4;  // 8 sums + 4 weights + 2 activations of 16 registers
constexpr int kRowSums = 4;  // 8 sums + 8 operands
constexpr int kDotTokens = 4;  // 8 accumulators + 4 weights + 2 activations; the fp32 sums wait in memory

struct F32 {
  __m256 lo, hi;
};
struct I32 {
  __m256i lo, hi;
};
struct Bytes {  // 16-bit lanes: bytes 0 and 2 of each row, and bytes 1 and 3
  I32 even, odd;
};
struct BookChoice {
  __m128i book[4];
  I32 lines;
};
struct Pair {
  F32 even, odd;
};

inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32 a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
inline F32 set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }

inline __m256i bits(__m256 a) { return _mm256_castps_si256(a); }
inline __m256 floats(__m256i a) { return _mm256_castsi256_ps(a); }

inline F32 scale_exp2(F32 a, F32 shifted) {
  const auto half = [](__m256 x, __m256 s) { return floats(_mm256_add_epi32(bits(x), _mm256_slli_epi32(bits(s), 23))); };
  return {half(a.lo, shifted.lo), half(a.hi, shifted.hi)};
}

inline F32 load_bf16(const uint16_t* p) {
  const auto half = [](const uint16_t* q) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
    return floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  };
  return {half(p), half(p + 8)};
}
inline __m256i round_bf16(__m256 a) {  // the bf16 in the low half of each dword
  const __m256i u = bits(a), upper = _mm256_srli_epi32(u, 16);
  const __m256i even = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(rounded, quiet, bits(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
inline void store_bf16(uint16_t* p, F32 a) {
  const __m256i packed = _mm256_packus_epi32(round_bf16(a.lo), round_bf16(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}

inline __m256i half_line(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
inline F32 load_line(const uint8_t* line) { return {floats(half_line(line)), floats(half_line(line + 32))}; }
inline __m256 low_bf16(__m256i d) { return floats(_mm256_slli_epi32(d, 16)); }
inline __m256 high_bf16(__m256i d) { return floats(_mm256_and_si256(d, _mm256_set1_epi32(static_cast<int>(0xffff0000)))); }
inline Pair split_pairs(__m256i a, __m256i b) { return {{low_bf16(a), low_bf16(b)}, {high_bf16(a), high_bf16(b)}}; }
inline Pair load_pair(const uint8_t* line) { return split_pairs(half_line(line), half_line(line + 32)); }
inline Pair load_pairs(const uint16_t* p) {
  const auto half = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i); };
  return split_pairs(half(0), half(1));
}
inline F32 dot(F32 acc, const Pair& a, const Pair& b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }

// The E4M3 byte on top of each dword: exponent and mantissa move to the float's place and the bias changes by 120; a
// subnormal is (2^-6 + m * 2^-9) - 2^-6, exact and without denormal arithmetic; 0x7f becomes NaN.
inline __m256 top_e4m3(__m256i d) {
  const __m256i code = _mm256_and_si256(_mm256_srli_epi32(d, 4), _mm256_set1_epi32(0x07f00000));
  const __m256i normal = _mm256_add_epi32(code, _mm256_set1_epi32(120 << 23));
  const __m256 raised = floats(_mm256_add_epi32(code, _mm256_set1_epi32(121 << 23)));
  const __m256i subnormal = bits(_mm256_sub_ps(raised, _mm256_set1_ps(0x1p-6f)));
  const __m256i is_subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(1 << 23), code);
  const __m256i is_nan = _mm256_cmpeq_epi32(code, _mm256_set1_epi32(0x07f00000));
  const __m256i value = _mm256_blendv_epi8(normal, subnormal, is_subnormal);
  const __m256i nan = _mm256_and_si256(is_nan, _mm256_set1_epi32(0x7fc00000));
  const __m256i sign = _mm256_and_si256(d, _mm256_set1_epi32(static_cast<int>(0x80000000)));
  return floats(_mm256_or_si256(_mm256_or_si256(value, nan), sign));
}
inline F32 load_e4m3(const uint8_t* p) {
  const auto half = [&](int i) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i));
    return top_e4m3(_mm256_slli_epi32(_mm256_cvtepu8_epi32(codes), 24));
  };
  return {half(0), half(1)};
}
inline void load_e4m3(const uint8_t* line, Pair& first, Pair& second) {
  const __m256i a = half_line(line), b = half_line(line + 32);
  first.even = {top_e4m3(_mm256_slli_epi32(a, 24)), top_e4m3(_mm256_slli_epi32(b, 24))};
  first.odd = {top_e4m3(_mm256_slli_epi32(a, 8)), top_e4m3(_mm256_slli_epi32(b, 8))};
  second.even = {top_e4m3(_mm256_slli_epi32(a, 16)), top_e4m3(_mm256_slli_epi32(b, 16))};
  second.odd = {top_e4m3(a), top_e4m3(b)};
}

inline F32 dot(F32 acc, F32 w, uint32_t x) { return fma(w, set1(as_float(x)), acc); }
inline F32 dot(F32 acc, const Pair& w, uint32_t x) {
  return fma(w.odd, set1(as_float(x & 0xffff0000)), fma(w.even, set1(as_float(x << 16)), acc));
}
// always_inline: gcc 12 takes a function that only prefetches for one without effects, and drops its calls.
inline __attribute__((always_inline)) void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

inline F32 abs(F32 a) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F32 where_greater(F32 a, F32 b, F32 yes, F32 no) {
  const auto half = [](__m256 x, __m256 y, __m256 t, __m256 f) { return _mm256_blendv_ps(f, t, _mm256_cmp_ps(x, y, _CMP_GT_OQ)); };
  return {half(a.lo, b.lo, yes.lo, no.lo), half(a.hi, b.hi, yes.hi, no.hi)};
}
inline F32 add_where_greater(F32 sum, F32 a, F32 b, F32 term) {
  const auto half = [](__m256 s, __m256 x, __m256 y, __m256 t) { return _mm256_add_ps(s, _mm256_and_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ), t)); };
  return {half(sum.lo, a.lo, b.lo, term.lo), half(sum.hi, a.hi, b.hi, term.hi)};
}
inline float greatest(F32 a) {
  float v[16], most;
  store(v, a);
  most = v[0];
  for (int i = 1; i < 16; i++) most = v[i] > most ? v[i] : most;
  return most;
}
inline float total(F32 a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline bool any_nan(F32 a) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q))) != 0;
}
// The half's bits in the float's place are 2^-112 times its value, subnormals included. Finite ones only.
inline F32 load_fp16(const uint16_t* p) {
  const auto half = [](const uint16_t* q) {
    const __m256i h = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    const __m256 small = floats(_mm256_slli_epi32(_mm256_and_si256(h, _mm256_set1_epi32(0x7fff)), 13));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(h, _mm256_set1_epi32(0x8000)), 16);
    return _mm256_or_ps(_mm256_mul_ps(small, _mm256_set1_ps(0x1p112f)), floats(sign));
  };
  return {half(p), half(p + 8)};
}

inline I32 set1_int(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
inline I32 add(I32 a, I32 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline I32 over_256(I32 a) {
  const I32 raised = add(a, set1_int(128));
  return {_mm256_srai_epi32(raised.lo, 8), _mm256_srai_epi32(raised.hi, 8)};
}
inline F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline I32 round(F32 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline int32_t total(I32 a) {
  alignas(32) int32_t v[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(v), _mm256_add_epi32(a.lo, a.hi));
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}
inline void store_bytes(uint8_t* p, I32 a) {
  const __m256i byte = _mm256_set1_epi32(255);
  const __m256i pairs = _mm256_packus_epi32(_mm256_and_si256(a.lo, byte), _mm256_and_si256(a.hi, byte));
  const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}

inline Bytes widen_bytes(__m256i lo, __m256i hi) {
  const __m256i low_bytes = _mm256_set1_epi16(255);
  return {{_mm256_and_si256(lo, low_bytes), _mm256_and_si256(hi, low_bytes)}, {_mm256_srli_epi16(lo, 8), _mm256_srli_epi16(hi, 8)}};
}
inline Bytes load_bytes(const uint8_t* line) { return widen_bytes(half_line(line), half_line(line + 32)); }

inline BookChoice choose_books(const uint8_t* books, const uint32_t* choices) {
  BookChoice r;
  for (int i = 0; i < 4; i++) r.book[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(books) + i);
  r.lines = set1_int(0);
  const auto* words = reinterpret_cast<const __m256i*>(choices);
  if (choices != nullptr) r.lines = {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
  return r;
}
inline void look_up(const uint8_t* line, BookChoice& c, Bytes& low, Bytes& high) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const auto half = [&](const uint8_t* codes, __m256i& lines, __m256i& lower, __m256i& upper) {
    const __m256i bit0 = _mm256_srai_epi32(_mm256_slli_epi32(lines, 31), 31), bit1 = _mm256_srai_epi32(_mm256_slli_epi32(lines, 30), 31);
    const auto chosen = [&](__m256i code) {
      const auto in = [&](int i) { return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(c.book[i]), code); };
      return _mm256_blendv_epi8(_mm256_blendv_epi8(in(0), in(1), bit0), _mm256_blendv_epi8(in(2), in(3), bit0), bit1);
    };
    const __m256i both = half_line(codes);
    lower = chosen(_mm256_and_si256(both, nibble)), upper = chosen(_mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
    lines = _mm256_srli_epi32(lines, 2);
  };
  __m256i lower[2], upper[2];
  half(line, c.lines.lo, lower[0], upper[0]), half(line + 32, c.lines.hi, lower[1], upper[1]);
  low = widen_bytes(lower[0], lower[1]), high = widen_bytes(upper[0], upper[1]);
}
inline void store_line(uint8_t* line, const Bytes& w) {
  const auto half = [&](int at, __m256i even, __m256i odd) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(line + at), _mm256_or_si256(even, _mm256_slli_epi16(odd, 8)));
  };
  half(0, w.even.lo, w.odd.lo), half(32, w.even.hi, w.odd.hi);
}
// vpmaddubsw would saturate; 16-bit lanes are exact.
inline I32 dot(I32 acc, const Bytes& w, uint32_t x) {
  const __m256i four = _mm256_set1_epi32(static_cast<int>(x));
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), odd = _mm256_srai_epi16(four, 8);
  const auto half = [&](__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(a, even), _mm256_madd_epi16(b, odd)));
  };
  return {half(acc.lo, w.even.lo, w.odd.lo), half(acc.hi, w.even.hi, w.odd.hi)};
}

}  // namespace
}  // namespace hetero
