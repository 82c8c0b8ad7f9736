// sums[row][32] = W x[row]: the loop nest, once, over the vector interface of whichever vec_*.h came before.
//
// A micro-kernel holds (vectors of 16 rows x tokens) sums in registers and walks K. One token block (few rows): every weight
// is read from memory once, in one sequential stream, prefetched two pages ahead; past the tile's end that is what the caller
// will read next, or each tile would begin with misses. Several token blocks: K is cut into pieces of kPieceK, so that a piece
// of weights stays in L2 while all token blocks pass over it, each prefetching its share of what follows; the sums wait in
// memory.
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
constexpr int kVectorBytes = kLineBytes / (kTileRows / kLanes);
constexpr int kAheadLines = 64;  // two pages; half as much costs up to 10 % of bandwidth, twice as much 3 %

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

// Lines of a tile that a token block walks, and what it prefetches on the way.
struct Stretch {
  int64_t begin, lines;
  const uint8_t* ahead;  // with the first line, ...
  int64_t ahead_step;    // ... moving on by this many bytes with each
};

// Calls walk(token block, stretch). Stretches begin at multiples of 128 columns.
template <class F, class Walk>
void each_stretch(const MatrixLayout& m, const uint8_t* tile, const uint8_t* next, int blocks, Walk walk) {
  constexpr int64_t unit = 128 / F::line_k, piece = kPieceK<F> / F::line_k;
  if (blocks == 1) {
    const int64_t body = m.lines > kAheadLines ? (m.lines - kAheadLines) / unit * unit : 0;
    if (body > 0) walk(0, Stretch{0, body, tile + kAheadLines * kLineBytes, kLineBytes});
    return walk(0, Stretch{body, m.lines - body, next, kLineBytes});
  }
  for (int64_t begin = 0; begin < m.lines; begin += piece) {
    const int64_t end = begin + piece < m.lines ? begin + piece : m.lines, bytes = (end - begin) * kLineBytes;
    const uint8_t* ahead = end < m.lines ? tile + end * kLineBytes : next;
    for (int b = 0; b < blocks; b++)
      walk(b, Stretch{begin, end - begin, ahead + bytes / blocks * b, (kLineBytes + blocks - 1) / blocks});
  }
}

struct Piece {  // NV vectors x MT tokens x a stretch of K
  const uint8_t* w;
  const uint8_t* scales;  // of the stretch's first block
  int64_t next_scales;    // bytes from there to those of the tile after this
  const uint32_t* x;      // of the stretch's first step
  float* sums;
  int64_t lines;
  const uint8_t* ahead;   // see Stretch
  int64_t ahead_step;
};

// Calls body(vector, token) for each sum of a micro-kernel.
template <int NV, int MT, class Body> inline __attribute__((always_inline)) void each_sum(Body body) {
#pragma GCC unroll 2
  for (int i = 0; i < NV; i++)
#pragma GCC unroll 16
    for (int m = 0; m < MT; m++) body(i, m);
}

template <class F, int NV, int MT> struct MicroKernel {
  static constexpr int kSteps = F::line_k / F::step_k;
  using Sums = F32[NV][MT];

  static inline __attribute__((always_inline)) void walk(const Piece& a, int64_t begin, int64_t end, Sums& acc) {
    const uint8_t *w = a.w + begin * kLineBytes, *ahead = a.ahead + begin * a.ahead_step;
    const uint32_t* x = a.x + begin * kSteps * MT;
    for (int64_t n = begin; n < end; n++, w += kLineBytes, ahead += a.ahead_step, x += kSteps * MT) {
      Line<F> line[NV];
#pragma GCC unroll 2
      for (int i = 0; i < NV; i++) {
        prefetch(ahead + i * kVectorBytes);
        line[i].read(w + i * kVectorBytes);
      }
#pragma GCC unroll 2
      for (int s = 0; s < kSteps; s++)
#pragma GCC unroll 16
        for (int m = 0; m < MT; m++)
#pragma GCC unroll 2
          for (int i = 0; i < NV; i++) acc[i][m] = dot(acc[i][m], line[i].w[s], x[s * MT + m]);
    }
  }

  static void run(const Piece& piece) {
    const Piece a = piece;  // a copy: stores through vector types may alias the caller's
    Sums acc;
    if constexpr (F::scale_block == 0) {
      each_sum<NV, MT>([&](int i, int m) { acc[i][m] = load(a.sums + i * kLanes + m * kTileRows); });
      walk(a, 0, a.lines, acc);
      each_sum<NV, MT>([&](int i, int m) { store(a.sums + i * kLanes + m * kTileRows, acc[i][m]); });
    } else {
      constexpr int64_t block = F::scale_block / F::line_k;
      const uint8_t* scales = a.scales;
      for (int64_t n = 0; n < a.lines; n += block, scales += sizeof(float)) {
        each_sum<NV, MT>([&](int i, int m) { acc[i][m] = set1(0); });
        walk(a, n, n + block < a.lines ? n + block : a.lines, acc);
        asm("" ::: "memory");  // or gcc carries the sums through the loop in registers, and spills them
        prefetch(scales + a.next_scales);
        const F32 scale = set1(*reinterpret_cast<const float*>(scales));
        each_sum<NV, MT>([&](int i, int m) {
          float* sum = a.sums + i * kLanes + m * kTileRows;
          store(sum, fma(acc[i][m], scale, load(sum)));
        });
      }
    }
  }
};

// Kernel<F, NV, MT>::run by number of tokens, from 1.
template <class F, template <class, int, int> class Kernel, class Argument> struct Kernels {
  void (*run[block_tokens<F>])(const Argument&);
  constexpr Kernels() : Kernels(std::make_integer_sequence<int, block_tokens<F>>()) {}
  template <int... M> constexpr explicit Kernels(std::integer_sequence<int, M...>) : run{&Kernel<F, kVectors, M + 1>::run...} {}
};
template <class F> constexpr Kernels<F, MicroKernel, Piece> kKernels;

// Zeroes the sums, then calls vectors(first vector of the tile, what is prefetched after it) for each kVectors of them.
template <class Vectors> void each_vectors(const GemmArgs& g, Vectors vectors) {
  for (int64_t i = 0; i < int64_t{g.rows} * kTileRows; i++) g.sums[i] = 0;
  for (int v = 0; v < kTileRows / kLanes; v += kVectors) vectors(v, g.next != nullptr ? g.next : g.tile + g.layout->tile_bytes);
}

template <class F> void gemm(const GemmArgs& args) {
  constexpr int64_t steps = F::line_k / F::step_k;
  const GemmArgs g = args;
  const MatrixLayout& m = *g.layout;
  const TokenBlocks blocks = token_blocks<F>(g.rows);
  each_vectors(g, [&](int first, const uint8_t* next) {
    each_stretch<F>(m, g.tile + first * kVectorBytes, next + first * kVectorBytes, blocks.count, [&](int b, const Stretch& s) {
      Piece p;
      p.w = g.tile + s.begin * kLineBytes + first * kVectorBytes;
      if constexpr (F::scale_block != 0) {
        p.scales = g.tile + m.scale_offset + s.begin * F::line_k / F::scale_block * sizeof(float);
        p.next_scales = next - g.tile;
      }
      p.x = g.x + (blocks.start(b) * m.lines + s.begin * blocks.width(b)) * steps;
      p.sums = g.sums + blocks.start(b) * kTileRows + first * kLanes;
      p.lines = s.lines, p.ahead = s.ahead, p.ahead_step = s.ahead_step;
      kKernels<F>.run[blocks.width(b) - 1](p);
    });
  });
}

}  // namespace
}  // namespace hetero
