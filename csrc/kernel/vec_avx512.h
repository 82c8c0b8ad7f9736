// The vector interface on AVX-512 (F, BW, VL, DQ): sixteen floats are one register. With BF16 and VBMI a pair stays packed
// (vdpbf16ps) and E4M3 is widened by two 128-entry byte look-ups; without them both become fp32 FMAs. vdpbf16ps flushes
// subnormal inputs, which touches only activations below 2^-126: every E4M3 value is a normal bf16.
// See vec_scalar.h for what each operation means.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "base/bf16.h"
#include "base/fp8.h"

namespace hetero {
namespace {

constexpr int kVectors = 2;
constexpr int kTokens = 12;  // 2 x 12 sums + 2 weights + 1 activation of 32 registers
constexpr int kRowSums = 16;
constexpr int kDotTokens = 6;  // 2 x 6 accumulators and as many fp32 sums

struct F32 {
  __m512 v;
};

struct I32 {
  __m512i v;
};

inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
inline F32 set1(float a) { return {_mm512_set1_ps(a)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }

inline __m512i bits(__m512 a) { return _mm512_castps_si512(a); }
inline __m512 floats(__m512i a) { return _mm512_castsi512_ps(a); }

inline F32 scale_exp2(F32 a, F32 shifted) { return {floats(_mm512_add_epi32(bits(a.v), _mm512_slli_epi32(bits(shifted.v), 23)))}; }

inline F32 load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline void store_bf16(uint16_t* p, F32 a) {
  const __m512i u = bits(a.v), upper = _mm512_srli_epi32(u, 16);
  const __m512i even = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i h = _mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(h));
}

// The E4M3 byte on top of each dword; see vec_avx2.h.
inline F32 top_e4m3(__m512i d) {
  const __m512i code = _mm512_and_si512(_mm512_srli_epi32(d, 4), _mm512_set1_epi32(0x07f00000));
  const __m512 raised = floats(_mm512_add_epi32(code, _mm512_set1_epi32(121 << 23)));
  const __m512i subnormal = bits(_mm512_sub_ps(raised, _mm512_set1_ps(0x1p-6f)));
  const __mmask16 is_normal = _mm512_cmpge_epi32_mask(code, _mm512_set1_epi32(1 << 23));
  const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(0x07f00000));
  __m512i value = _mm512_mask_add_epi32(subnormal, is_normal, code, _mm512_set1_epi32(120 << 23));
  value = _mm512_mask_mov_epi32(value, is_nan, _mm512_set1_epi32(0x7fc00000));
  return {floats(_mm512_ternarylogic_epi32(value, d, _mm512_set1_epi32(static_cast<int>(0x80000000)), 0xF8))};
}
inline F32 load_e4m3(const uint8_t* p) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return top_e4m3(_mm512_slli_epi32(_mm512_cvtepu8_epi32(codes), 24));
}

inline __m512i whole_line(const uint8_t* line) { return _mm512_load_si512(line); }
inline F32 load_line(const uint8_t* line) { return {floats(whole_line(line))}; }
inline F32 dot(F32 acc, F32 w, uint32_t x) { return fma(w, set1(as_float(x)), acc); }
// always_inline: gcc 12 takes a function that only prefetches for one without effects, and drops its calls.
inline __attribute__((always_inline)) void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 where_greater(F32 a, F32 b, F32 yes, F32 no) {
  return {_mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), yes.v)};
}
inline F32 add_where_greater(F32 sum, F32 a, F32 b, F32 term) {
  return {_mm512_mask_add_ps(sum.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), sum.v, term.v)};
}
inline float greatest(F32 a) { return _mm512_reduce_max_ps(a.v); }
inline float total(F32 a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline bool any_nan(F32 a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
inline F32 load_fp16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }

inline I32 set1_int(int32_t a) { return {_mm512_set1_epi32(a)}; }
inline I32 add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32 over_256(I32 a) { return {_mm512_srai_epi32(_mm512_add_epi32(a.v, _mm512_set1_epi32(128)), 8)}; }
inline F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32 round(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline int32_t total(I32 a) { return _mm512_reduce_add_epi32(a.v); }
inline void store_bytes(uint8_t* p, I32 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

struct Bytes {
  __m512i v;
};
inline Bytes load_bytes(const uint8_t* line) { return {whole_line(line)}; }

struct BookChoice {
  __m512i books;
  __m512i lines;  // the next line's choice in bits 4 and 5
};
inline BookChoice choose_books(const uint8_t* books, const uint32_t* choices) {
  return {whole_line(books), choices == nullptr ? _mm512_setzero_si512() : _mm512_rol_epi32(_mm512_loadu_si512(choices), 4)};
}
inline void look_up(const uint8_t* line, BookChoice& c, Bytes& low, Bytes& high) {
  const __m512i first_of_four = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0), nibble = _mm512_set1_epi8(15);
  const __m512i codes = whole_line(line), choice = _mm512_shuffle_epi8(c.lines, first_of_four);
  const auto chosen = [&](__m512i code) {  // vpermb ignores bits 6 and 7 of (code & 15) | (choice & ~15)
    return _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(code, nibble, choice, 0xE2), c.books);
  };
  low.v = chosen(codes), high.v = chosen(_mm512_srli_epi16(codes, 4));
  c.lines = _mm512_ror_epi32(c.lines, 2);
}
inline void store_line(uint8_t* line, const Bytes& w) { _mm512_store_si512(line, w.v); }
// gcc 12 copies every accumulator twice around the intrinsic, and spills.
inline I32 dot(I32 acc, Bytes w, uint32_t x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(_mm512_set1_epi32(static_cast<int>(x))));
  return acc;
}

#else

struct Bytes {  // 16-bit lanes: bytes 0 and 2 of each row, and bytes 1 and 3
  __m512i even, odd;
};
inline Bytes widen_bytes(__m512i b) { return {_mm512_and_si512(b, _mm512_set1_epi16(255)), _mm512_srli_epi16(b, 8)}; }
inline Bytes load_bytes(const uint8_t* line) { return widen_bytes(whole_line(line)); }

struct BookChoice {
  __m512i book[4], lines;
};
inline BookChoice choose_books(const uint8_t* books, const uint32_t* choices) {
  BookChoice r;
  for (int i = 0; i < 4; i++) r.book[i] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(books) + i));
  r.lines = choices == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(choices);
  return r;
}
inline void look_up(const uint8_t* line, BookChoice& c, Bytes& low, Bytes& high) {
  const __m512i codes = whole_line(line), nibble = _mm512_set1_epi8(15);
  const __mmask16 bit0 = _mm512_test_epi32_mask(c.lines, _mm512_set1_epi32(1));
  const __mmask16 bit1 = _mm512_test_epi32_mask(c.lines, _mm512_set1_epi32(2));
  const auto chosen = [&](__m512i code) {
    const auto in = [&](int i) { return _mm512_shuffle_epi8(c.book[i], code); };
    return _mm512_mask_blend_epi32(bit1, _mm512_mask_blend_epi32(bit0, in(0), in(1)), _mm512_mask_blend_epi32(bit0, in(2), in(3)));
  };
  low = widen_bytes(chosen(_mm512_and_si512(codes, nibble)));
  high = widen_bytes(chosen(_mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble)));
  c.lines = _mm512_srli_epi32(c.lines, 2);
}
inline void store_line(uint8_t* line, const Bytes& w) {
  _mm512_store_si512(line, _mm512_or_si512(w.even, _mm512_slli_epi16(w.odd, 8)));
}
// vpmaddubsw would saturate; 16-bit lanes are exact.
inline I32 dot(I32 acc, const Bytes& w, uint32_t x) {
  const __m512i four = _mm512_set1_epi32(static_cast<int>(x));
  const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8), odd = _mm512_srai_epi16(four, 8);
  const __m512i sum = _mm512_add_epi32(_mm512_madd_epi16(w.even, even), _mm512_madd_epi16(w.odd, odd));
  return {_mm512_add_epi32(acc.v, sum)};
}

#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

struct Pair {
  __m512bh v;
};
inline Pair load_pair(const uint8_t* line) { return {(__m512bh)whole_line(line)}; }
inline Pair load_pairs(const uint16_t* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
inline F32 dot(F32 acc, Pair a, Pair b) { return {_mm512_dpbf16_ps(acc.v, a.v, b.v)}; }
inline F32 dot(F32 acc, Pair w, uint32_t x) {
  return {_mm512_dpbf16_ps(acc.v, w.v, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)))};
}

struct alignas(64) E4m3Bytes {  // high and low byte of the bf16 of each non-negative code
  uint8_t high[128] = {}, low[128] = {};
  constexpr E4m3Bytes() {
    for (int i = 0; i < 128; i++) {
      const uint16_t h = float_to_bf16(e4m3_to_float(static_cast<uint8_t>(i)));
      high[i] = static_cast<uint8_t>(h >> 8);
      low[i] = static_cast<uint8_t>(h & 255);
    }
  }
};
constexpr E4m3Bytes kE4m3Bytes;

inline void load_e4m3(const uint8_t* line, Pair& first, Pair& second) {
  const __m512i code = whole_line(line), low_bytes = _mm512_set1_epi16(255);
  const auto look_up = [&](const uint8_t* table) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), code, _mm512_load_si512(table + 64));
  };
  const __m512i low = look_up(kE4m3Bytes.low);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(128));
  const __m512i high = _mm512_ternarylogic_epi32(look_up(kE4m3Bytes.high), code, sign, 0xF8);    // high | (code & sign)
  first.v = (__m512bh)_mm512_ternarylogic_epi32(low, low_bytes, _mm512_slli_epi16(high, 8), 0xEA);   // (low & 255) | high << 8
  second.v = (__m512bh)_mm512_ternarylogic_epi32(_mm512_srli_epi16(low, 8), low_bytes, high, 0xF2);  // low >> 8 | (high & ~255)
}

#else

struct Pair {
  F32 even, odd;
};
inline __m512 high_bf16(__m512i d) { return floats(_mm512_and_si512(d, _mm512_set1_epi32(static_cast<int>(0xffff0000)))); }
inline Pair split_pairs(__m512i d) { return {{floats(_mm512_slli_epi32(d, 16))}, {high_bf16(d)}}; }
inline Pair load_pair(const uint8_t* line) { return split_pairs(whole_line(line)); }
inline Pair load_pairs(const uint16_t* p) { return split_pairs(_mm512_loadu_si512(p)); }
inline F32 dot(F32 acc, const Pair& a, const Pair& b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }
inline F32 dot(F32 acc, const Pair& w, uint32_t x) {
  return fma(w.odd, set1(as_float(x & 0xffff0000)), fma(w.even, set1(as_float(x << 16)), acc));
}

inline void load_e4m3(const uint8_t* line, Pair& first, Pair& second) {
  const __m512i d = whole_line(line);
  first = {top_e4m3(_mm512_slli_epi32(d, 24)), top_e4m3(_mm512_slli_epi32(d, 8))};
  second = {top_e4m3(_mm512_slli_epi32(d, 16)), top_e4m3(d)};
}

#endif

}  // namespace
}  // namespace hetero
