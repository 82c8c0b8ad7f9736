// sums[row][32] = W x[row] on AMX tiles, over vec_avx512.h; FP32 has no tiles and keeps its walk.
//
// Sixteen lines of four bytes of K are two B operands as they lie in memory: one for the weight tile's upper 16 rows, one
// for its lower. FP8 and INT4 lines are first widened into a panel that stays in cache while all tokens pass over it. Two A
// tiles of 16 tokens make four C tiles, which is enough to hide the multiplier's latency. A tile's number of tokens is in its
// configuration, so a missing token costs nothing and is never read.
//
// Packed inputs, 16 tokens after 16 tokens (the last ones fewer), w of them:
//   floating-point  [chunk of 16 words][w][word], the last chunk as long as is left
//   integer         as in packed_inputs.h, except that [group][part] is [chunk][w][word], chunks of at most 16 words
//
// Bits. tdpbf16ps sums 32 columns from zero, the even ones and the odd ones apart, before it adds them to C; vdpbf16ps
// cannot do the same, so BF16 and FP8 use tiles from the first row on, and a row's result does not depend on its batch mates.
// Integer dots are exact and folded as in gemm_int.h, to the same bits, so few rows can take that walk.
#pragma once
#include "kernel/elementwise.h"

namespace hetero {
namespace {

// The rows of an expert from which integer formats use tiles. A guess, never measured: no machine with AMX was at hand. Below
// it reading weights dominates, and the walk reads them well.
constexpr int kTilesFrom = 5;

constexpr int kTileTokens = 16, kChunkWords = 16;
constexpr int64_t kPanelLines = 256;  // of four bytes of K; 32 KiB

// ---- Packing -----------------------------------------------------------------------------------------------------------

// Calls body(row, its column `begin` in x, where its 16 tokens are packed, its place there, how many they are).
template <class Body> void each_token(const PackArgs& a, Body body) {
  for (int row = 0; row < a.rows; row++) {
    const int j = row % kTileTokens, first = row - j;
    const int64_t x = (a.tokens == nullptr ? row : a.tokens[row]) * a.stride;
    body(x, a.out + first * a.layout->words, j, a.rows - first < kTileTokens ? a.rows - first : kTileTokens);
  }
}

template <class F> void pack_chunks(const PackArgs& args) {
  const PackArgs a = args;
  const int64_t last = a.end == a.layout->cols ? a.layout->words : a.end / 2;
  each_token(a, [&](int64_t x, uint32_t* out, int64_t j, int64_t width) {
    for (int64_t s = a.begin / 2; s < last; s += kChunkWords) {
      const int64_t words = last - s < kChunkWords ? last - s : kChunkWords;
      uint32_t chunk[kChunkWords];
      for (int i = 0; i < kChunkWords; i += 8) {
        const int64_t k = (s + i) * 2;
        to_steps<2>(load_some(a.x, a.x_is_bf16, x + k - a.begin, a.end - k), chunk + i);
      }
      __builtin_memcpy(out + s * width + j * words, chunk, words * 4);
    }
  });
}

// Each 128 columns of a row are quantised by pack_int8 as if they were all, then moved to where tiles want them.
template <IntegerFormat F> void pack_int8_chunks(const PackArgs& args) {
  if (args.rows < kTilesFrom) return pack_int8<F>(args);
  const PackArgs a = args;
  const MatrixLayout& m = *a.layout;
  const int group = m.quantization.group, words = group / 4, chunk = words < kChunkWords ? words : kChunkWords;
  MatrixLayout block = m;
  each_token(a, [&](int64_t x, uint32_t* out, int64_t j, int64_t width) {
    for (int64_t k = a.begin; k < a.end; k += kInputBlock) {
      uint32_t packed[2 * (kInputBlock / 4 + kInputBlock / 32) + 2];
      block.cols = a.end - k < kInputBlock ? a.end - k : kInputBlock;
      block.scale_cols = (block.cols + group - 1) / group;
      const auto* row = static_cast<const uint8_t*>(a.x) + (x + k - a.begin) * (a.x_is_bf16 ? 2 : 4);
      const uint16_t* scales = a.scales == nullptr ? nullptr : a.scales + k;
      pack_int8<F>({row, a.x_is_bf16, nullptr, 1, 0, 0, block.cols, scales, &block, packed});

      const InputPlace from = input_place<F>(packed, block, 1), to = input_place<F>(out, m, width).at(m, k / group, width);
      for (int64_t n = 0; n < block.scale_cols * m.parts; n++) {
        for (int64_t w = n * words; w < (n + 1) * words; w += chunk)
          __builtin_memcpy(to.steps + w * width + j * chunk, from.steps + w, chunk * 4);
        to.corrections[n * width + j] = from.corrections[n];
      }
      for (int i = 0; i < 2; i++) to.scales[i * width + j] = from.scales[i];
    }
  });
}

// ---- Tiles: 0 to 3 are C (tokens 0..15 by rows 0..15, by rows 16..31; tokens 16..31 likewise), 4 and 5 A, 6 and 7 B -------

// gcc 12's intrinsics do not tell the compiler which memory they read.
template <int T> inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T> inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int T> inline void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <class F, int C, int A, int B> inline void dot_tiles() {
  if constexpr (IntegerFormat<F>) asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  else asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

template <int NA> inline void zero_sums() {
  zero_tile<0>(), zero_tile<1>();
  if constexpr (NA == 2) zero_tile<2>(), zero_tile<3>();
}
template <int NA> inline void load_sums(const float* sums) {
  load_tile<0>(sums, kLineBytes), load_tile<1>(sums + kLanes, kLineBytes);
  sums += kTileTokens * kTileRows;
  if constexpr (NA == 2) load_tile<2>(sums, kLineBytes), load_tile<3>(sums + kLanes, kLineBytes);
}
template <int NA, class T> inline void store_sums(T* sums) {
  store_tile<0>(sums, kLineBytes), store_tile<1>(sums + kLanes, kLineBytes);
  sums += kTileTokens * kTileRows;
  if constexpr (NA == 2) store_tile<2>(sums, kLineBytes), store_tile<3>(sums + kLanes, kLineBytes);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int count, int bytes) {
    rows[tile] = static_cast<uint8_t>(count);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

// Up to 32 tokens that pass over the weights together.
struct Tokens {
  int first, count, width[2];

  Tokens(int first, int rows) : first(first), count(rows - first < 2 * kTileTokens ? rows - first : 2 * kTileTokens) {
    width[0] = count < kTileTokens ? count : kTileTokens, width[1] = count - width[0];
  }
};

inline void configure(const Tokens& t, int chunk_words) {
  TileConfig c;
  for (int a = 0; a < 2 && t.width[a] > 0; a++) {
    c.set(2 * a, t.width[a], 64), c.set(2 * a + 1, t.width[a], 64);
    c.set(4 + a, t.width[a], chunk_words * 4);
  }
  c.set(6, chunk_words, 64), c.set(7, chunk_words, 64);
  asm volatile("ldtilecfg %0" ::"m"(c));
}

// C += A B of one chunk; x: that of each A tile.
template <class F, int NA> inline void multiply(const uint32_t* const (&x)[2], int chunk_words, const uint8_t* b) {
  load_tile<6>(b, kLineBytes);
  load_tile<4>(x[0], chunk_words * 4);
  load_tile<7>(b + kVectorBytes, kLineBytes);
  dot_tiles<F, 0, 4, 6>(), dot_tiles<F, 1, 4, 7>();
  if constexpr (NA == 1) return;
  load_tile<5>(x[1], chunk_words * 4);
  dot_tiles<F, 2, 5, 6>(), dot_tiles<F, 3, 5, 7>();
}

// ---- Weights ----------------------------------------------------------------------------------------------------------

template <class F> constexpr int kWidened = F::line_k / F::step_k;  // B lines in a line of the tile

// Lines [begin, end) as twice as many B lines.
inline void widen_fp8(const GemmArgs& g, int64_t begin, int64_t end, uint8_t* out) {
  for (int64_t n = begin; n < end; n++, out += 2 * kLineBytes)
    for (int v = 0; v < kLineBytes; v += kVectorBytes) {
      Line<Fp8> pairs;
      pairs.read(g.tile + n * kLineBytes + v);
      for (int i = 0; i < 2; i++) _mm512_store_si512(out + i * kLineBytes + v, (__m512i)pairs.w[i].v);
    }
}

inline const uint8_t* next_tile(const GemmArgs& g) { return g.next != nullptr ? g.next : g.tile + g.layout->tile_bytes; }

// Fetches what will be read two pages after these lines of the tile.
inline void prefetch_after(const GemmArgs& g, int64_t line, int64_t count) {
  const MatrixLayout& m = *g.layout;
  const uint8_t* next = next_tile(g);
  for (int64_t n = line + kAheadLines; n < line + kAheadLines + count; n++) {
    const uint8_t* ahead = n < m.lines ? g.tile + n * kLineBytes : next + (n - m.lines) * kLineBytes;
    prefetch(ahead), prefetch(ahead + kVectorBytes);
  }
}

// B lines [begin, end), a multiple of two, as whole chunks: where they lie, or else in `panel`, with zeros after the last.
template <class F> const uint8_t* b_lines(const GemmArgs& g, int64_t begin, int64_t end, uint8_t* panel) {
  const int64_t first = begin / kWidened<F>, last = end / kWidened<F>;
  const uint8_t* line = g.tile + first * kLineBytes;
  if constexpr (kWidened<F> == 1) {
    if (IntegerFormat<F> || (end - begin) % kChunkWords == 0) return line;
    __builtin_memcpy(panel, line, (end - begin) * kLineBytes);
  } else {
    prefetch_after(g, first, last - first);
    if constexpr (IntegerFormat<F>) widen(g, 0, first, last, panel);
    else widen_fp8(g, first, last, panel);
  }
  const int64_t lines = end - begin, chunks = (lines + kChunkWords - 1) / kChunkWords;
  __builtin_memset(panel + lines * kLineBytes, 0, (chunks * kChunkWords - lines) * kLineBytes);
  return panel;
}

// ---- Tokens x piece of K ------------------------------------------------------------------------------------------------

template <class F> struct Pass {
  const GemmArgs& g;
  Tokens tokens;
  int64_t begin, end;  // B lines: a word of inputs each, or one of each part
  const uint8_t* b;    // B line `begin`

  const uint32_t* packed(int a) const { return g.x + (tokens.first + a * kTileTokens) * g.layout->words; }
  float* sums() const { return g.sums + int64_t{tokens.first} * kTileRows; }
  void prefetch_lines(int64_t line, int64_t count) const {  // widening has fetched them already
    if (kWidened<F> == 1 && tokens.first == 0) prefetch_after(g, line, count);
  }
  void prefetch_scales(const void* scales, int64_t groups) const {  // those of the next tile; a group's are 64 bytes at most
    if (tokens.first > 0) return;
    const uint8_t* ahead = static_cast<const uint8_t*>(scales) + (next_tile(g) - g.tile);
    for (int64_t i = 0; i < groups; i++) prefetch(ahead + i * kTileRows * sizeof(uint16_t));
  }
};

// C += x B over some B lines of a floating-point format.
template <class F, int NA> void multiply_lines(const Pass<F>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += kChunkWords) {
    const uint8_t* b = p.b + (n - p.begin) * kLineBytes;
    const uint32_t* x[2] = {};
    for (int a = 0; a < NA; a++) x[a] = p.packed(a) + n * p.tokens.width[a];
    p.prefetch_lines(n, kChunkWords);
    const int64_t words = end - n;
    if (words >= kChunkWords) {
      multiply<F, NA>(x, kChunkWords, b);
      continue;
    }
    uint32_t padded[2][kTileTokens * kChunkWords] = {};
    for (int a = 0; a < NA; a++)
      for (int j = 0; j < p.tokens.width[a]; j++) __builtin_memcpy(padded[a] + j * kChunkWords, x[a] + j * words, words * 4);
    multiply<F, NA>({padded[0], padded[1]}, kChunkWords, b);
  }
}

template <class F, int NA> void run(const Pass<F>& p) {
  if constexpr (F::scale_block == 0) {
    load_sums<NA>(p.sums());
    multiply_lines<F, NA>(p, p.begin, p.end);
    store_sums<NA>(p.sums());
  } else {
    constexpr int64_t block = F::scale_block / F::step_k;
    alignas(64) float block_sums[2 * kTileTokens * kTileRows];
    const auto* scales = reinterpret_cast<const float*>(p.g.tile + p.g.layout->scale_offset);
    for (int64_t n = p.begin; n < p.end; n += block) {
      zero_sums<NA>();
      multiply_lines<F, NA>(p, n, n + block < p.end ? n + block : p.end);
      store_sums<NA>(block_sums);
      p.prefetch_scales(scales + n / block, 1);
      const F32 scale = set1(scales[n / block]);
      for (int i = 0; i < p.tokens.count * kTileRows; i += kLanes)
        store(p.sums() + i, fma(load(block_sums + i), scale, load(p.sums() + i)));
    }
  }
}

constexpr int kMostDots = 2 * kInputBlock / 32;
struct BlockDots {  // of a block of 128 inputs: [group][part], each like `sums`
  alignas(64) int32_t of[kMostDots][2 * kTileTokens * kTileRows];
};

// The chain of gemm_int.h over the groups of a block.
template <IntegerFormat F> void fold(const Pass<F>& p, int64_t group, int64_t groups, const BlockDots& dots) {
  const MatrixLayout& m = *p.g.layout;
  const auto* scales = reinterpret_cast<const uint16_t*>(p.g.tile + m.scale_offset) + group * kTileRows;
  p.prefetch_scales(scales, groups);
  for (int a = 0; a < 2 && p.tokens.width[a] > 0; a++) {
    const int width = p.tokens.width[a];
    const InputPlace x = input_place<F>(const_cast<uint32_t*>(p.packed(a)), m, width).at(m, group, width);
    const float* before = group == 0 ? x.scales : x.scales - 2 * width;
    for (int i = 0; i < kTileRows; i += kLanes) {
      F32 scale[kMostDots];
      for (int64_t g = 0; g < groups; g++)
        for (int part = 0; part < m.parts; part++)  // the last one is the low one
          scale[g * m.parts + part] = mul(load_fp16(scales + g * kTileRows + i), set1(part + 1 == m.parts ? 1 : 256));
      for (int j = 0; j < width; j++) {
        const int64_t at = (a * kTileTokens + j) * kTileRows + i;
        F32 sum = mul(load(p.sums() + at), mul(set1(before[j]), set1(x.scales[width + j])));
        for (int64_t n = 0; n < groups * m.parts; n++) {
          const I32 dot = add({_mm512_load_si512(dots.of[n] + at)}, set1_int(x.corrections[n * width + j]));
          sum = fma(to_float(dot), scale[n], sum);
        }
        if (group + groups == m.scale_cols) sum = mul(sum, set1(x.scales[j]));
        store(p.sums() + at, sum);
      }
    }
  }
}

template <IntegerFormat F, int NA> void run(const Pass<F>& p) {
  const MatrixLayout& m = *p.g.layout;
  const int words = m.quantization.group / F::step_k, chunk = words < kChunkWords ? words : kChunkWords;
  const int64_t block = kInputBlock / m.quantization.group, last = p.end / words;
  BlockDots dots;
  for (int64_t group = p.begin / words; group < last; group += block) {
    const int64_t groups = last - group < block ? last - group : block;
    for (int64_t n = 0; n < groups * m.parts; n++) {
      zero_sums<NA>();
      const int64_t b = (group + n / m.parts) * words, x = (group * m.parts + n) * words;
      for (int64_t w = 0; w < words; w += chunk) {
        if (n % m.parts == 0) p.prefetch_lines(b + w, chunk);
        multiply<F, NA>({p.packed(0) + (x + w) * p.tokens.width[0], p.packed(1) + (x + w) * p.tokens.width[1]}, chunk,
                        p.b + (b + w - p.begin) * kLineBytes);
      }
      store_sums<NA>(dots.of[n]);
    }
    fold(p, group, groups, dots);
  }
}

template <class F> void gemm_tiles(const GemmArgs& args) {
  if constexpr (IntegerFormat<F>) if (args.rows < kTilesFrom) return gemm_int<F>(args);
  const GemmArgs g = args;
  const int64_t lines = g.layout->lines * kWidened<F>;
  const int chunk = IntegerFormat<F> && g.layout->quantization.group == 32 ? kChunkWords / 2 : kChunkWords;
  alignas(64) uint8_t panel[kPanelLines * kLineBytes];
  for (int64_t i = 0; i < int64_t{g.rows} * kTileRows; i++) g.sums[i] = 0;
  int configured = 0;  // how many tokens the tiles are set up for
  for (int64_t begin = 0; begin < lines; begin += kPanelLines) {
    const int64_t end = begin + kPanelLines < lines ? begin + kPanelLines : lines;
    const uint8_t* b = b_lines<F>(g, begin, end, panel);
    for (int first = 0; first < g.rows; first += 2 * kTileTokens) {
      const Tokens tokens(first, g.rows);
      if (tokens.count != configured) configure(tokens, chunk);
      configured = tokens.count;
      const Pass<F> pass{g, tokens, begin, end, b};
      tokens.count > kTileTokens ? run<F, 2>(pass) : run<F, 1>(pass);
    }
  }
  asm volatile("tilerelease");
}

// The table of avx512_bf16, with tiles where a format has them.
constexpr KernelTable make_amx_table(const char* name, uint32_t needs) {
  KernelTable table = make_kernel_table(name, needs);
  const auto use = [&](Format format, void (*pack)(const PackArgs&), void (*gemm)(const GemmArgs&)) {
    table.formats[static_cast<int>(format)].pack = pack;
    table.formats[static_cast<int>(format)].gemm = gemm;
  };
  use(Format::bf16, &pack_chunks<Bf16>, &gemm_tiles<Bf16>);
  use(Format::fp8, &pack_chunks<Fp8>, &gemm_tiles<Fp8>);
  use(Format::int8, &pack_int8_chunks<Int8>, &gemm_tiles<Int8>);
  use(Format::int4, &pack_int8_chunks<Int4>, &gemm_tiles<Int4>);
  return table;
}

}  // namespace
}  // namespace hetero
