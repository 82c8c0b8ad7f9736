// sums[tile][row][16] = W[tile] . x[row]: the loop nest, once, over the vector interface of whichever vec_*.h came before.
//
// A micro-kernel holds (tiles x tokens) sums in registers and walks K. One token block (few rows): every weight is read from
// memory once, tile after tile, a single sequential stream (two tiles at a time cost 4-6 % of bandwidth; a format with two
// dependent dots per line takes two all the same, since one chain is too slow for it). Several token blocks: K is cut into
// pieces of kPieceK, so that a piece of weights stays in L2 while all token blocks pass over it, and the sums wait in memory.
//
// One chain per sum in the order of K; with scales, a chain per scale block, folded by one FMA at the block's end. Pieces
// begin on block boundaries. So every blocking gives the same bits, and a row's result does not depend on its batch mates.
#pragma once
#include <utility>

#include "format/bf16.h"
#include "format/fp32.h"
#include "format/fp8.h"
#include "kernel/kernels.h"
#include "kernel/token_blocks.h"

namespace hetero {
namespace {

constexpr int kPieceK = 1024;  // a multiple of every scale block

// A format's line as operands of dot(), one per activation step.
template <class F> struct Line;
template <> struct Line<Fp32> {
  F32 w[1];
  void read(const uint8_t* line) { w[0] = load_line(line); }
};
template <> struct Line<Bf16> {
  Pair w[1];
  void read(const uint8_t* line) { w[0] = load_pair(line); }
};
template <> struct Line<Fp8> {
  Pair w[2];
  void read(const uint8_t* line) { load_e4m3(line, w[0], w[1]); }
};

struct Piece {  // NT tiles x MT tokens x a piece of K
  const uint8_t* w;
  int64_t tile_bytes;
  const uint8_t* scales;   // of the piece's first block
  const uint32_t* x;       // of the piece's first step
  float* sums;
  int64_t tile_sums;       // floats between the sums of two tiles
  int64_t lines;
  int64_t ahead;           // bytes to prefetch ahead, 0 where an earlier token block already did
};

template <class F, int NT, int MT> struct MicroKernel {
  static constexpr int kSteps = F::line_k / F::step_k;

  using Sums = F32[NT][MT];

  static inline __attribute__((always_inline)) void walk(const Piece& a, int64_t begin, int64_t end, Sums& acc) {
    const uint8_t* w = a.w + begin * kLineBytes;
    const uint32_t* x = a.x + begin * kSteps * MT;
    for (int64_t n = begin; n < end; n++, w += kLineBytes, x += kSteps * MT) {
      Line<F> line[NT];
#pragma GCC unroll 2
      for (int i = 0; i < NT; i++) {
        prefetch(w + i * a.tile_bytes + a.ahead);
        line[i].read(w + i * a.tile_bytes);
      }
#pragma GCC unroll 2
      for (int s = 0; s < kSteps; s++)
#pragma GCC unroll 16
        for (int m = 0; m < MT; m++)
#pragma GCC unroll 2
          for (int i = 0; i < NT; i++) acc[i][m] = dot(acc[i][m], line[i].w[s], x[s * MT + m]);
    }
  }

  static void run(const Piece& piece) {
    const Piece a = piece;  // a copy: stores through vector types may alias the caller's
    Sums acc;
    if constexpr (F::scale_block == 0) {
      each_sum([&](int i, int m) { acc[i][m] = load(a.sums + i * a.tile_sums + m * 16); });
      walk(a, 0, a.lines, acc);
      each_sum([&](int i, int m) { store(a.sums + i * a.tile_sums + m * 16, acc[i][m]); });
    } else {
      constexpr int64_t block = F::scale_block / F::line_k;
      for (int64_t n = 0, b = 0; n < a.lines; n += block, b++) {
        each_sum([&](int i, int m) { acc[i][m] = set1(0); });
        walk(a, n, n + block < a.lines ? n + block : a.lines, acc);
        each_sum([&](int i, int m) {
          const F32 scale = set1(reinterpret_cast<const float*>(a.scales + i * a.tile_bytes)[b]);
          float* sum = a.sums + i * a.tile_sums + m * 16;
          store(sum, fma(acc[i][m], scale, load(sum)));
        });
      }
    }
  }

  template <class Body> static inline __attribute__((always_inline)) void each_sum(Body body) {
#pragma GCC unroll 2
    for (int i = 0; i < NT; i++)
#pragma GCC unroll 16
      for (int m = 0; m < MT; m++) body(i, m);
  }
};

using Kernel = void (*)(const Piece&);

template <class F, int NT> struct Kernels {  // by number of tokens, from 1
  Kernel run[block_tokens<F>];
  constexpr Kernels() : Kernels(std::make_integer_sequence<int, block_tokens<F>>()) {}
  template <int... M> constexpr explicit Kernels(std::integer_sequence<int, M...>) : run{&MicroKernel<F, NT, M + 1>::run...} {}
};
template <class F, int NT> constexpr Kernels<F, NT> kKernels;

template <class F, int NT> void gemm_tiles(const GemmArgs& g, int first, const TokenBlocks& blocks) {
  constexpr int64_t piece = kPieceK / F::line_k;
  constexpr int64_t steps = F::line_k / F::step_k;
  static_assert(F::scale_block == 0 || kPieceK % F::scale_block == 0, "a piece must begin on a scale block");
  const uint8_t* tile = g.tiles + first * g.layout->tile_bytes;
  for (int64_t n = 0; n < g.layout->lines; n += piece) {
    for (int b = 0; b < blocks.count; b++) {
      Piece p;
      p.w = tile + n * kLineBytes;
      p.tile_bytes = g.layout->tile_bytes;
      if constexpr (F::scale_block != 0) p.scales = tile + g.layout->scale_offset + n * F::line_k / F::scale_block * sizeof(float);
      p.x = g.x + blocks.start(b) * g.layout->lines * steps + n * steps * blocks.width(b);
      p.sums = g.sums + (int64_t{first} * g.rows + blocks.start(b)) * kTileRows;
      p.tile_sums = int64_t{g.rows} * kTileRows;
      p.lines = g.layout->lines - n < piece ? g.layout->lines - n : piece;
      p.ahead = b == 0 ? piece * kLineBytes : 0;
      kKernels<F, NT>.run[blocks.width(b) - 1](p);
    }
  }
}

template <class F> void gemm(const GemmArgs& args) {
  const GemmArgs g = args;
  const TokenBlocks blocks = token_blocks<F>(g.rows);
  for (int64_t i = 0; i < int64_t{g.count} * g.rows * kTileRows; i++) g.sums[i] = 0;
  if constexpr (kTiles == 2) {
    const bool one_stream = blocks.count == 1 && F::line_k == F::step_k;
    if (g.count == 2 && !one_stream) return gemm_tiles<F, 2>(g, 0, blocks);
  }
  for (int t = 0; t < g.count; t++) gemm_tiles<F, 1>(g, t, blocks);
}

}  // namespace
}  // namespace hetero
