// The loop nest of gemm.h for integer formats: unsigned weights times int8 inputs, exact int32 sums, folded in fp32.
//
// In the order of K, for each (row, token), one fp32 chain:
//   at each block of 128 inputs   sum *= scale of the previous block / scale of this one     (inputs' scales)
//   at each group of weights      sum += float(dots) * scale of the group
//   at the end                    sum *= scale of the last block
// so a block costs one multiplication, where a second level of sums would cost registers or memory traffic. dots starts at
// -128 * sum of the inputs (weights are stored + 128). Inputs in two parts, 256 * high + low, are two dots and two such FMAs,
// the first with 256 * scale. Integer sums are exact, so few tokens share several chains of dots. Everything else is as in
// gemm.h: every blocking gives the same bits.
#pragma once
#include "kernel/gemm.h"
#include "kernel/packed_inputs.h"

namespace hetero {
namespace {

template <class F> struct DotLine;  // a line as operands of dot(), one per step; `Choice` is that of the lines to come
template <> struct DotLine<Int8> {
  struct Choice {};
  static Choice choose(const uint8_t*, const uint32_t*) { return {}; }
  Bytes w[1];
  void read(const uint8_t* line, Choice&) { w[0] = load_bytes(line); }
};
template <> struct DotLine<Int4> {
  using Choice = BookChoice;
  static Choice choose(const uint8_t* books, const uint32_t* choices) { return choose_books(books, choices); }
  Bytes w[2];
  void read(const uint8_t* line, Choice& choice) { look_up(line, choice, w[0], w[1]); }
};

struct DotPiece {  // NV vectors x MT tokens x a stretch of K
  const uint8_t* w;
  const uint16_t* scales;  // of the stretch's first group
  const uint8_t* books;
  const uint32_t* choices; // of the stretch's first block; null: none are made
  int64_t next_tile;       // bytes from scales and choices to those of the tile after this
  InputPlace x;            // of the stretch's first group and block
  const float* before;     // scales of the inputs' block before the stretch; at K = 0 those of the first
  const float* last;       // scales of the inputs' last block if the stretch ends there, else null
  float* sums;
  int64_t groups;
  int group_lines, block_groups, parts;
  const uint8_t* ahead;    // see Stretch
  int64_t ahead_step;
};

template <class F, int NV, int MT> struct DotKernel {
  static constexpr int kSteps = F::line_k / F::step_k, kUnrolled = 4;  // lines; a group has a multiple of them
  using Sums = F32[NV][MT];
  using Dots = I32[NV][MT];
  using Choices = typename DotLine<F>::Choice[NV];

  // Of P parts of the inputs with one group of weights, which is read once; the inputs of the parts follow one another.
  template <int P> static inline __attribute__((always_inline)) void group_dots(
      const DotPiece& a, int64_t group, const uint32_t* x, const int32_t* corrections, Choices& choice, Dots (&dots)[P]) {
    constexpr int kChains = P * NV * MT >= 8 ? 1 : P * NV * MT >= 3 ? 2 : 4;
    I32 acc[P][kChains][NV][MT];
#pragma GCC unroll 2
    for (int p = 0; p < P; p++)
      each_sum<NV, MT>([&](int i, int m) {
        acc[p][0][i][m] = set1_int(corrections[p * MT + m]);
#pragma GCC unroll 4
        for (int c = 1; c < kChains; c++) acc[p][c][i][m] = set1_int(0);
      });
    const int64_t first = group * a.group_lines, part_words = int64_t{a.group_lines} * kSteps * MT;
    const uint8_t *w = a.w + first * kLineBytes, *ahead = a.ahead + first * a.ahead_step;
    for (int n = 0; n < a.group_lines; n += kUnrolled)
#pragma GCC unroll 4
      for (int u = 0; u < kUnrolled; u++, w += kLineBytes, ahead += a.ahead_step, x += kSteps * MT) {
        DotLine<F> line[NV];
#pragma GCC unroll 2
        for (int i = 0; i < NV; i++) {
          prefetch(ahead + i * kVectorBytes);
          line[i].read(w + i * kVectorBytes, choice[i]);
        }
#pragma GCC unroll 2
        for (int s = 0; s < kSteps; s++)
#pragma GCC unroll 2
          for (int p = 0; p < P; p++)
#pragma GCC unroll 16
            for (int m = 0; m < MT; m++)
#pragma GCC unroll 2
              for (int i = 0; i < NV; i++) {
                I32& sum = acc[p][(u * kSteps + s) % kChains][i][m];
                sum = dot(sum, line[i].w[s], x[p * part_words + s * MT + m]);
              }
      }
#pragma GCC unroll 2
    for (int p = 0; p < P; p++)
      each_sum<NV, MT>([&](int i, int m) {
        dots[p][i][m] = acc[p][0][i][m];
#pragma GCC unroll 4
        for (int c = 1; c < kChains; c++) dots[p][i][m] = add(dots[p][i][m], acc[p][c][i][m]);
      });
  }

  static inline __attribute__((always_inline)) void fold(const Dots& dots, const uint16_t* scales, float unit, Sums& sum) {
#pragma GCC unroll 2
    for (int i = 0; i < NV; i++) {
      const F32 scale = mul(load_fp16(scales + i * kLanes), set1(unit));
#pragma GCC unroll 16
      for (int m = 0; m < MT; m++) sum[i][m] = fma(to_float(dots[i][m]), scale, sum[i][m]);
    }
  }

  static void run(const DotPiece& piece) {
    const DotPiece a = piece;  // a copy: stores through vector types may alias the caller's
    const uint16_t* scales = a.scales;
    const int64_t part_words = int64_t{a.group_lines} * kSteps * MT;
    const uint32_t* x = a.x.steps;
    const int32_t* corrections = a.x.corrections;
    const uint32_t* choices = a.choices;
    const float *before = a.before, *block = a.x.scales;
    Sums sum;
    each_sum<NV, MT>([&](int i, int m) { sum[i][m] = load(a.sums + i * kLanes + m * kTileRows); });
    for (int64_t g = 0; g < a.groups;) {
      each_sum<NV, MT>([&](int i, int m) { sum[i][m] = mul(sum[i][m], mul(set1(before[m]), set1(block[MT + m]))); });
      before = block, block += 2 * MT;
      Choices choice;
#pragma GCC unroll 2
      for (int i = 0; i < NV; i++) choice[i] = DotLine<F>::choose(a.books, choices == nullptr ? nullptr : choices + i * kLanes);
      if (choices != nullptr) {
        prefetch(reinterpret_cast<const uint8_t*>(choices) + a.next_tile);
        choices += kTileRows;
      }
      for (const int64_t end = g + a.block_groups < a.groups ? g + a.block_groups : a.groups; g < end; g++) {
        prefetch(reinterpret_cast<const uint8_t*>(scales) + a.next_tile);
        if (F::hidden_parts == 1 || a.parts == 1) {
          Dots dots[1];
          group_dots(a, g, x, corrections, choice, dots);
          fold(dots[0], scales, 1, sum);
        } else if constexpr (NV * MT <= 6) {
          Dots dots[2];
          group_dots(a, g, x, corrections, choice, dots);
          fold(dots[0], scales, 256, sum);
          fold(dots[1], scales, 1, sum);
        } else {
          for (int p = 0; p < 2; p++) {
            Dots dots[1];
            group_dots(a, g, x + p * part_words, corrections + p * MT, choice, dots);
            fold(dots[0], scales, p == 0 ? 256 : 1, sum);
          }
        }
        x += part_words * a.parts, corrections += MT * a.parts, scales += kTileRows;
      }
    }
    if (a.last != nullptr) each_sum<NV, MT>([&](int i, int m) { sum[i][m] = mul(sum[i][m], set1(a.last[m])); });
    each_sum<NV, MT>([&](int i, int m) { store(a.sums + i * kLanes + m * kTileRows, sum[i][m]); });
  }
};

template <class F> constexpr Kernels<F, DotKernel, DotPiece> kDotKernels;

inline const uint32_t* choices_of(const GemmArgs& g, int64_t line, int vector) {  // null: none are made
  if (!g.layout->quantization.choices) return nullptr;
  const auto* words = reinterpret_cast<const uint32_t*>(g.tile + g.layout->choice_offset);
  return words + line / kChoiceLines * kTileRows + vector * kLanes;
}

// Lines [begin, end) of INT4 as twice as many of INT8, kVectors from `first` on. begin: a multiple of 128 columns.
inline void widen(const GemmArgs& g, int first, int64_t begin, int64_t end, uint8_t* out) {
  BookChoice choice[kVectors];
  for (int64_t n = begin; n < end; n++, out += 2 * kLineBytes)
    for (int i = 0; i < kVectors; i++) {
      if (n % kChoiceLines == 0) choice[i] = choose_books(g.layout->quantization.books, choices_of(g, n, first + i));
      Bytes low, high;
      look_up(g.tile + n * kLineBytes + (first + i) * kVectorBytes, choice[i], low, high);
      store_line(out + i * kVectorBytes, low), store_line(out + kLineBytes + i * kVectorBytes, high);
    }
}

// Token blocks from which INT4 is widened once for all of them: with fewer the look-ups run beside the dots. In cache, widened
// against not: 24 tokens 0.97, 36 1.00, 64 1.06, 128 1.09.
constexpr int kWidenFrom = 6;

template <IntegerFormat F> void gemm_int(const GemmArgs& args) {
  const GemmArgs g = args;
  const MatrixLayout& m = *g.layout;
  const TokenBlocks blocks = token_blocks<F>(g.rows);
  constexpr bool kWidens = F::line_k != Int8::line_k;
  const bool widens = kWidens && blocks.count >= kWidenFrom;
  alignas(64) uint8_t widened[kWidens ? kPieceK<F> / Int8::line_k * kLineBytes : 64];
  DotPiece p;
  p.books = m.quantization.books;
  p.group_lines = m.quantization.group / (widens ? Int8::line_k : F::line_k);
  p.block_groups = kInputBlock / m.quantization.group, p.parts = m.parts;
  each_vectors(g, [&](int first, const uint8_t* next) {
    p.next_tile = next - g.tile;
    each_stretch<F>(m, g.tile + first * kVectorBytes, next + first * kVectorBytes, blocks.count, [&](int b, const Stretch& s) {
      const int width = blocks.width(b);
      const int64_t group = s.begin * F::line_k / m.quantization.group;
      p.w = g.tile + s.begin * kLineBytes + first * kVectorBytes;
      p.scales = reinterpret_cast<const uint16_t*>(g.tile + m.scale_offset) + group * kTileRows + first * kLanes;
      p.groups = s.lines * F::line_k / m.quantization.group;
      p.choices = choices_of(g, s.begin, first);
      const InputPlace row = input_place<F>(const_cast<uint32_t*>(g.x) + blocks.start(b) * m.words, m, width);
      p.x = row.at(m, group, width);
      p.before = group == 0 ? row.scales : p.x.scales - 2 * width;
      p.last = s.begin + s.lines == m.lines ? row.scales + ((m.scale_cols - 1) / p.block_groups) * 2 * width : nullptr;
      p.sums = g.sums + blocks.start(b) * kTileRows + first * kLanes;
      p.ahead = s.ahead, p.ahead_step = s.ahead_step;
      if (widens) {
        if (b == 0) widen(g, first, s.begin, s.begin + s.lines, widened);
        p.w = widened, p.ahead_step = (s.ahead_step + 1) / 2;
        return kDotKernels<Int8>.run[width - 1](p);
      }
      kDotKernels<F>.run[width - 1](p);
    });
  });
}

}  // namespace
}  // namespace hetero
