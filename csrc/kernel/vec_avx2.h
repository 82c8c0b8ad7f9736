// The vector interface on AVX2 + FMA: sixteen floats are two registers. See vec_scalar.h for what each operation means.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "base/bits.h"

namespace hetero {
namespace {

constexpr int kTiles = 1;
constexpr int kTokens = 4;  // 8 sums + 4 weights + 2 activations of 16 registers
constexpr int kFoldTokens = 4;

struct F32 {
  __m256 lo, hi;
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
inline Pair load_pair(const uint8_t* line) {
  const __m256i a = half_line(line), b = half_line(line + 32);
  return {{low_bf16(a), low_bf16(b)}, {high_bf16(a), high_bf16(b)}};
}

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
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace hetero
