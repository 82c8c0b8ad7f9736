// The loop nest of gemm.h for integer formats: unsigned weights times int8 inputs, exact int32 sums, folded in fp32.
//
// In the order of K, for each (row, token), one fp32 chain:
//   at each block of 128 inputs   sum *= scale of the previous block / scale of this one     (inputs' scales)
//   at each group of weights      sum += float(dots) * scale of the group
//   at the end                    sum *= scale of the last block
// so a block costs one multiplication, where a second level of sums would cost registers or memory traffic. dots starts at
// -128 * sum of the inputs (weights are stored + 128); with inputs in two parts (256 * high + low) the group's lines are
// walked twice and the first sum is shifted. Integer sums are exact, so few tokens share several chains of dots. |dots| <= 128 * 128 * 32640 < 2^30. Everything else is as in gemm.h: every
// blocking gives the same bits.
#pragma once
#include "kernel/gemm.h"
#include "kernel/packed_inputs.h"

namespace hetero {
namespace {

constexpr int kDotPieceK = 2048;  // a multiple of kInputBlock

template <class F> struct DotLine;  // a line as operands of dot(), one per step; `Choice` is made once per group
template <> struct DotLine<Int8> {
  struct Choice {};
  static Choice choose(const uint8_t*, const uint16_t*) { return {}; }
  Bytes w[1];
  void read(const uint8_t* line, const Choice&) { w[0] = load_bytes(line); }
};
template <> struct DotLine<Int4> {
  using Choice = BookChoice;
  static Choice choose(const uint8_t* books, const uint16_t* scales) { return choose_books(books, scales); }
  Bytes w[2];
  void read(const uint8_t* line, const Choice& choice) { look_up(line, choice, w[0], w[1]); }
};

struct DotPiece {  // NT tiles x MT tokens x a piece of K
  const uint8_t* w;
  int64_t tile_bytes;
  const uint16_t* scales;  // of the piece's first group
  const uint8_t* books;
  InputPlace x;            // of the piece's first group and block
  const float* before;     // scales of the inputs' block before the piece; at K = 0 those of the first
  const float* last;       // scales of the inputs' last block if the piece ends there, else null
  float* sums;
  int64_t tile_sums;
  int64_t groups;
  int group_lines, block_groups, parts;
  const uint8_t* ahead;    // what to prefetch: a token block's share of the weights that come next ...
  int64_t ahead_step;      // ... in bytes per line read
};

template <class F, int NT, int MT> struct DotKernel {
  static constexpr int kSteps = F::line_k / F::step_k, kUnrolled = 4;  // lines; a group has a multiple of them
  static constexpr int kChains = NT * MT >= 8 ? 1 : NT * MT >= 3 ? 2 : 4;
  using Sums = F32[NT][MT];
  using Dots = I32[kChains][NT][MT];
  using Choices = typename DotLine<F>::Choice[NT];

  static inline __attribute__((always_inline)) void walk(const DotPiece& a, int64_t group, const uint32_t*& x,
                                                         const Choices& choice, Dots& acc) {
    const int64_t first = group * a.group_lines;
    const uint8_t *w = a.w + first * kLineBytes, *ahead = a.ahead + first * a.ahead_step;
    for (int n = 0; n < a.group_lines; n += kUnrolled)
#pragma GCC unroll 4
      for (int u = 0; u < kUnrolled; u++, w += kLineBytes, ahead += a.ahead_step, x += kSteps * MT) {
        DotLine<F> line[NT];
#pragma GCC unroll 2
        for (int i = 0; i < NT; i++) {
          prefetch(ahead + i * a.tile_bytes);
          line[i].read(w + i * a.tile_bytes, choice[i]);
        }
#pragma GCC unroll 2
        for (int s = 0; s < kSteps; s++)
#pragma GCC unroll 16
          for (int m = 0; m < MT; m++)
#pragma GCC unroll 2
            for (int i = 0; i < NT; i++) {
            I32& sum = acc[(u * kSteps + s) % kChains][i][m];
            sum = dot(sum, line[i].w[s], x[s * MT + m]);
          }
      }
  }

  static inline __attribute__((always_inline)) void start(Dots& acc, const int32_t* corrections) {
    each([&](int i, int m) {
      acc[0][i][m] = set1_int(corrections[m]);
#pragma GCC unroll 4
      for (int c = 1; c < kChains; c++) acc[c][i][m] = set1_int(0);
    });
  }

  static inline __attribute__((always_inline)) void join(Dots& acc) {
#pragma GCC unroll 4
    for (int c = 1; c < kChains; c++) each([&](int i, int m) { acc[0][i][m] = add(acc[0][i][m], acc[c][i][m]); });
  }

  static void run(const DotPiece& piece) {
    const DotPiece a = piece;  // a copy: stores through vector types may alias the caller's
    const uint16_t* scales = a.scales;
    const int64_t tile_scales = a.tile_bytes / sizeof(uint16_t);
    const uint32_t* x = a.x.steps;
    const int32_t* corrections = a.x.corrections;
    const float *before = a.before, *block = a.x.scales;
    Sums sum;
    each([&](int i, int m) { sum[i][m] = load(a.sums + i * a.tile_sums + m * 16); });
    for (int64_t g = 0; g < a.groups;) {
      each([&](int i, int m) { sum[i][m] = mul(sum[i][m], mul(set1(before[m]), set1(block[MT + m]))); });
      before = block, block += 2 * MT;
      for (const int64_t end = g + a.block_groups < a.groups ? g + a.block_groups : a.groups; g < end; g++) {
        Dots acc;
        Choices choice;
#pragma GCC unroll 2
        for (int i = 0; i < NT; i++) choice[i] = DotLine<F>::choose(a.books, scales + i * tile_scales);
        start(acc, corrections);
        walk(a, g, x, choice, acc);
        join(acc);
        for (int p = 1; p < (F::hidden_parts == 1 ? 1 : a.parts); p++) {
          Dots low;
          start(low, corrections += MT);
          walk(a, g, x, choice, low);
          join(low);
          each([&](int i, int m) { acc[0][i][m] = add(times_256(acc[0][i][m]), low[0][i][m]); });
        }
        corrections += MT;
#pragma GCC unroll 2
        for (int i = 0; i < NT; i++) {
          prefetch(reinterpret_cast<const uint8_t*>(scales + i * tile_scales) + 1024);  // too thin a stream for the hardware
          const F32 scale = load_fp16(scales + i * tile_scales);
#pragma GCC unroll 16
          for (int m = 0; m < MT; m++) sum[i][m] = fma(to_float(acc[0][i][m]), scale, sum[i][m]);
        }
        scales += kTileRows;
      }
    }
    if (a.last != nullptr) each([&](int i, int m) { sum[i][m] = mul(sum[i][m], set1(a.last[m])); });
    each([&](int i, int m) { store(a.sums + i * a.tile_sums + m * 16, sum[i][m]); });
  }

  template <class Body> static inline __attribute__((always_inline)) void each(Body body) {
#pragma GCC unroll 2
    for (int i = 0; i < NT; i++)
#pragma GCC unroll 16
      for (int m = 0; m < MT; m++) body(i, m);
  }
};

template <class F, int NT> constexpr int kMostDotTokens = NT == 1 ? kFewDotTokens : kDotTokens;
template <class F, int NT, int... M> constexpr auto dot_kernels(std::integer_sequence<int, M...>) {
  struct Table {
    void (*run[sizeof...(M)])(const DotPiece&);
  };
  return Table{{&DotKernel<F, NT, M + 1>::run...}};
}
template <class F, int NT> constexpr auto kDotKernels = dot_kernels<F, NT>(std::make_integer_sequence<int, kMostDotTokens<F, NT>>());

template <class F, int NT> void dot_tiles(const GemmArgs& g, int first, const TokenBlocks& blocks) {
  const MatrixLayout& m = *g.layout;
  const int group = m.quantization.group;
  const int64_t piece = kDotPieceK / group, most = m.scale_cols;
  const uint8_t* tile = g.tiles + first * m.tile_bytes;
  DotPiece p;
  p.tile_bytes = m.tile_bytes;
  p.books = m.quantization.books;
  p.tile_sums = int64_t{g.rows} * kTileRows;
  p.group_lines = group / F::line_k, p.block_groups = kInputBlock / group, p.parts = m.parts;
  for (int64_t n = 0; n < most; n += piece) {
    p.w = tile + n * p.group_lines * kLineBytes;
    p.scales = reinterpret_cast<const uint16_t*>(tile + m.scale_offset) + n * kTileRows;
    p.groups = most - n < piece ? most - n : piece;
    // the next piece, or past the scales the next tiles
    const int64_t bytes = p.groups * p.group_lines * kLineBytes;
    const uint8_t* next = n + p.groups < most ? p.w + bytes : tile + NT * m.tile_bytes;
    p.ahead_step = (kLineBytes + blocks.count - 1) / blocks.count;
    for (int b = 0; b < blocks.count; b++) {
      const int width = blocks.width(b);
      const InputPlace row = input_place<F>(const_cast<uint32_t*>(g.x) + blocks.start(b) * m.words, m, width);
      p.x = row.at(m, n, width);
      p.before = n == 0 ? row.scales : p.x.scales - 2 * width;
      p.last = n + p.groups == most ? row.scales + ((most - 1) / p.block_groups) * 2 * width : nullptr;
      p.sums = g.sums + (int64_t{first} * g.rows + blocks.start(b)) * kTileRows;
      p.ahead = next + b * (bytes / blocks.count);
      kDotKernels<F, NT>.run[width - 1](p);
    }
  }
}

template <IntegerFormat F> void gemm_int(const GemmArgs& args) {
  const GemmArgs g = args;
  const TokenBlocks blocks = token_blocks<F>(g.rows);
  for (int64_t i = 0; i < int64_t{g.count} * g.rows * kTileRows; i++) g.sums[i] = 0;
  if constexpr (kTiles == 2)
    if (g.count == 2 && blocks.count > 1) return dot_tiles<F, 2>(g, 0, blocks);
  for (int t = 0; t < g.count; t++) dot_tiles<F, 1>(g, t, blocks);
}

}  // namespace
}  // namespace hetero
