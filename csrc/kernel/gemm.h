// sums[tile][row][16] = W[tile] . x[row]: the loop nest, once, over the vector interface of whichever vec_*.h came before.
//
// A micro-kernel holds (tiles x tokens) sums in registers and walks K. One token block (few rows): every weight is read from
// memory once, two tiles side by side, prefetched a page ahead; past a tile's end that is what the caller will read next, or
// each tile would begin with misses. Several token blocks: K is cut into pieces of kPieceK, so that a piece of weights stays
// in L2 while all token blocks pass over it, each prefetching its share of what follows; the sums wait in memory.
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

template <class F> constexpr int kPieceK = IntegerFormat<F> ? 2048 : 1024;
constexpr int kAheadLines = 64;  // a page: half or twice as much cost 1-4 % of bandwidth, the old distance of a piece 8 %

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

// Lines of a tile, or of tiles side by side, that a token block walks, and what it prefetches on the way.
struct Stretch {
  int64_t begin, lines;
  const uint8_t* ahead;  // with the first line, ...
  int64_t ahead_step;    // ... moving on by this many bytes with each
};

// Calls walk(token block, stretch). Stretches begin at multiples of 128 columns.
template <class F, class Walk> void each_stretch(const MatrixLayout& m, const uint8_t* tile, const uint8_t* next, int blocks, Walk walk) {
  constexpr int64_t unit = 128 / F::line_k, piece = kPieceK<F> / F::line_k;
  if (blocks == 1) {
    const int64_t body = m.lines > kAheadLines ? (m.lines - kAheadLines) / unit * unit : 0;
    if (body > 0) walk(0, Stretch{0, body, tile + kAheadLines * kLineBytes, kLineBytes});
    return walk(0, Stretch{body, m.lines - body, next, kLineBytes});
  }
  for (int64_t begin = 0; begin < m.lines; begin += piece) {
    const int64_t end = begin + piece < m.lines ? begin + piece : m.lines, bytes = (end - begin) * kLineBytes;
    const uint8_t* ahead = end < m.lines ? tile + end * kLineBytes : next;
    for (int b = 0; b < blocks; b++) walk(b, Stretch{begin, end - begin, ahead + bytes / blocks * b, (kLineBytes + blocks - 1) / blocks});
  }
}

struct Piece {  // NT tiles x MT tokens x a stretch of K
  const uint8_t* w;
  int64_t tile_bytes;
  const uint8_t* scales;   // of the stretch's first block
  int64_t next_scales;     // bytes from there to the scales of the tiles after these
  const uint32_t* x;       // of the stretch's first step
  float* sums;
  int64_t tile_sums;       // floats between the sums of two tiles
  int64_t lines;
  const uint8_t* ahead;    // see Stretch
  int64_t ahead_step;
};

template <class F, int NT, int MT> struct MicroKernel {
  static constexpr int kSteps = F::line_k / F::step_k;
  using Sums = F32[NT][MT];

  static inline __attribute__((always_inline)) void walk(const Piece& a, int64_t begin, int64_t end, Sums& acc) {
    const uint8_t *w = a.w + begin * kLineBytes, *ahead = a.ahead + begin * a.ahead_step;
    const uint32_t* x = a.x + begin * kSteps * MT;
    for (int64_t n = begin; n < end; n++, w += kLineBytes, ahead += a.ahead_step, x += kSteps * MT) {
      Line<F> line[NT];
#pragma GCC unroll 2
      for (int i = 0; i < NT; i++) {
        prefetch(ahead + i * a.tile_bytes);
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
      const uint8_t* scales = a.scales;
      for (int64_t n = 0; n < a.lines; n += block, scales += sizeof(float)) {
        each_sum([&](int i, int m) { acc[i][m] = set1(0); });
        walk(a, n, n + block < a.lines ? n + block : a.lines, acc);
        each_sum([&](int i, int m) {
          const uint8_t* scale = scales + i * a.tile_bytes;
          if (m == 0) prefetch(scale + a.next_scales);
          float* sum = a.sums + i * a.tile_sums + m * 16;
          store(sum, fma(acc[i][m], set1(*reinterpret_cast<const float*>(scale)), load(sum)));
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

template <class F, int NT> void gemm_tiles(const GemmArgs& g, int first, const uint8_t* next, const TokenBlocks& blocks) {
  constexpr int64_t steps = F::line_k / F::step_k;
  const MatrixLayout& m = *g.layout;
  const uint8_t* tile = g.tiles + first * m.tile_bytes;
  each_stretch<F>(m, tile, next, blocks.count, [&](int b, const Stretch& s) {
    Piece p;
    p.w = tile + s.begin * kLineBytes;
    p.tile_bytes = m.tile_bytes;
    if constexpr (F::scale_block != 0) {
      p.scales = tile + m.scale_offset + s.begin * F::line_k / F::scale_block * sizeof(float);
      p.next_scales = next - tile;
    }
    p.x = g.x + (blocks.start(b) * m.lines + s.begin * blocks.width(b)) * steps;
    p.sums = g.sums + (int64_t{first} * g.rows + blocks.start(b)) * kTileRows;
    p.tile_sums = int64_t{g.rows} * kTileRows;
    p.lines = s.lines, p.ahead = s.ahead, p.ahead_step = s.ahead_step;
    kKernels<F, NT>.run[blocks.width(b) - 1](p);
  });
}

// Calls tiles<NT>(first tile, what is read after them): all at once, or one by one.
template <class Tiles> void each_tiles(const GemmArgs& g, bool side_by_side, Tiles tiles) {
  const uint8_t* after = g.tiles + g.count * g.layout->tile_bytes;
  const uint8_t* next = g.next != nullptr ? g.next : after;
  for (int64_t i = 0; i < int64_t{g.count} * g.rows * kTileRows; i++) g.sums[i] = 0;
  if constexpr (kTiles == 2)
    if (g.count == 2 && side_by_side) return tiles(std::integral_constant<int, 2>(), 0, next);
  for (int t = 0; t < g.count; t++)
    tiles(std::integral_constant<int, 1>(), t, t + 1 < g.count ? g.tiles + (t + 1) * g.layout->tile_bytes : next);
}

template <class F> void gemm(const GemmArgs& args) {
  const GemmArgs g = args;
  const TokenBlocks blocks = token_blocks<F>(g.rows);
  each_tiles(g, true, [&](auto nt, int first, const uint8_t* next) { gemm_tiles<F, nt>(g, first, next, blocks); });
}

}  // namespace
}  // namespace hetero
