// Kernels over matrices and cached keys as they lie in memory, row by row, for few rows of activations, and for attention, on
// a CPU. Every sum is one chain of sixteen lanes in the order of its terms, then a fixed tree, then what is left over of
// sixteen: the other rows do not change a bit of it, nor does the ISA, but for two bf16 operands.
#pragma once
#include "base/bf16.h"
#include "base/fp8.h"
#include "format/format.h"
#include "kernel/exp.h"
#include "kernel/kernels.h"

namespace hetero {
namespace {

template <class T> struct RowsOf {  // rows `at`[i], or i
  const T* first;
  int64_t stride;
  const int64_t* at;
  const T* operator[](int64_t i) const { return first + (at == nullptr ? i : at[i]) * stride; }
};
template <class T> inline RowsOf<T> rows_of(const RowMatrix& m) { return {static_cast<const T*>(m.data), m.stride, m.at}; }

inline F32 load_row(const float* p) { return load(p); }
inline F32 load_row(const uint16_t* p) { return load_bf16(p); }
inline float element(const float* p) { return *p; }
inline float element(const uint16_t* p) { return bf16_to_float(*p); }

// How a row of W meets a row of x: as sixteen floats, or both as bf16 pairs.
template <class W, class X> constexpr bool kPairs = sizeof(W) == 2 && sizeof(X) == 2;
template <bool pairs, class T> inline auto load_terms(const T* p) {
  if constexpr (pairs) return load_pairs(p);
  else return load_row(p);
}
inline F32 dot(F32 acc, F32 w, F32 x) { return fma(w, x, acc); }

// R rows of the matrix times M rows of x.
template <class W, class X, int R, int M>
inline __attribute__((always_inline)) void dot_block(const DotArgs& a, const RowsOf<W>& rows, int64_t n, int64_t m) {
  constexpr bool pairs = kPairs<W, X>;
  constexpr int64_t step = pairs ? 2 * kLanes : kLanes;
  const W* w[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) w[r] = rows[n + r];
  const X* x = static_cast<const X*>(a.x) + m * a.x_stride;
  F32 sums[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) sums[r][t] = set1(0);
  const int64_t body = a.cols / step * step;
  for (int64_t k = 0; k < body; k += step) {
    decltype(load_terms<pairs>(x)) xs[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) xs[t] = load_terms<pairs>(x + t * a.x_stride + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const auto weights = load_terms<pairs>(w[r] + k);
#pragma GCC unroll 4
      for (int t = 0; t < M; t++) sums[r][t] = dot(sums[r][t], weights, xs[t]);
    }
  }
  for (int t = 0; t < M; t++)
    for (int r = 0; r < R; r++) {
      float sum = total(sums[r][t]);
      for (int64_t k = body; k < a.cols; k++) sum = __builtin_fmaf(element(w[r] + k), element(x + t * a.x_stride + k), sum);
      float* out = a.out + (m + t) * a.out_stride + n + r;
      *out = a.add ? *out + sum : sum;
    }
}

template <class W, class X, int M> inline void dot_tokens(const DotArgs& a, const RowsOf<W>& rows, int64_t m) {
  constexpr int kMost = kRowSums / M < 8 ? kRowSums / M : 8;
  int64_t n = 0;
  for (; n + kMost <= a.rows; n += kMost) dot_block<W, X, kMost, M>(a, rows, n, m);
  for (; n < a.rows; n++) dot_block<W, X, 1, M>(a, rows, n, m);
}

// Rows of the matrix stay in the nearest cache while all rows of x pass.
template <class W, class X> inline void dot_typed(const DotArgs& all) {
  constexpr int64_t kRows = 32;
  const RowsOf<W> source = rows_of<W>(all.w);
  for (int64_t n = 0; n < all.rows; n += kRows) {
    DotArgs a = all;
    const RowsOf<W> rows = source.at == nullptr ? RowsOf<W>{source[n], source.stride, nullptr}
                                                : RowsOf<W>{source.first, source.stride, source.at + n};
    a.out += n, a.rows = a.rows - n < kRows ? a.rows - n : kRows;
    int64_t m = 0;
    if constexpr (kRowSums >= 16)
      for (; m + 4 <= a.tokens; m += 4) dot_tokens<W, X, 4>(a, rows, m);
    for (; m + 2 <= a.tokens; m += 2) dot_tokens<W, X, 2>(a, rows, m);
    for (; m < a.tokens; m++) dot_tokens<W, X, 1>(a, rows, m);
  }
}
inline void dot_rows(const DotArgs& args) {
  if (!args.w.bf16) dot_typed<float, float>(args);
  else if (args.x_is_bf16) dot_typed<uint16_t, uint16_t>(args);
  else dot_typed<uint16_t, float>(args);
}

inline void round_row(const float* x, int64_t count, uint16_t* out) {
  const int64_t body = count / kLanes * kLanes;
  for (int64_t i = 0; i < body; i += kLanes) store_bf16(out + i, load(x + i));
  for (int64_t i = body; i < count; i++) out[i] = float_to_bf16(x[i]);
}

inline void widen_row(const uint8_t* codes, int64_t count, float scale, float* out) {
  const int64_t body = count / kLanes * kLanes;
  for (int64_t i = 0; i < body; i += kLanes) store(out + i, mul(load_e4m3(codes + i), set1(scale)));
  for (int64_t i = body; i < count; i++) out[i] = e4m3_to_float(codes[i]) * scale;
}

// C vectors of columns of M outputs.
template <class T, int C, int M>
inline __attribute__((always_inline)) void mix_block(const MixArgs& a, const RowsOf<T>& rows, int64_t column, int64_t m) {
  F32 sums[M][C];
#pragma GCC unroll 4
  for (int t = 0; t < M; t++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) sums[t][c] = set1(0);
  const float* weights = a.weights + m * a.weights_stride;
  for (int64_t s = 0; s < a.rows; s++) {
    const T* row = rows[s] + column;
    F32 values[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) values[c] = load_row(row + c * kLanes);
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) {
      const F32 weight = set1(weights[t * a.weights_stride + s]);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) sums[t][c] = fma(weight, values[c], sums[t][c]);
    }
  }
  for (int t = 0; t < M; t++)
    for (int c = 0; c < C; c++) store(a.out + (m + t) * a.out_stride + column + c * kLanes, sums[t][c]);
}

template <class T, int M> inline void mix_outputs(const MixArgs& a, const RowsOf<T>& rows, int64_t m) {
  constexpr int kMost = kRowSums / M < 4 ? kRowSums / M : 4;
  int64_t c = 0;
  for (; c + kMost * kLanes <= a.cols; c += kMost * kLanes) mix_block<T, kMost, M>(a, rows, c, m);
  for (; c + kLanes <= a.cols; c += kLanes) mix_block<T, 1, M>(a, rows, c, m);
  for (; c < a.cols; c++)
    for (int t = 0; t < M; t++) {
      float sum = 0;
      for (int64_t s = 0; s < a.rows; s++)
        sum = __builtin_fmaf(a.weights[(m + t) * a.weights_stride + s], element(rows[s] + c), sum);
      a.out[(m + t) * a.out_stride + c] = sum;
    }
}

template <class T> inline void mix_typed(const MixArgs& a) {
  const RowsOf<T> rows = rows_of<T>(a.w);
  int64_t m = 0;
  if constexpr (kRowSums >= 16)
    for (; m + 4 <= a.outputs; m += 4) mix_outputs<T, 4>(a, rows, m);
  for (; m + 2 <= a.outputs; m += 2) mix_outputs<T, 2>(a, rows, m);
  for (; m < a.outputs; m++) mix_outputs<T, 1>(a, rows, m);
}
inline void mix_rows(const MixArgs& args) { args.w.bf16 ? mix_typed<uint16_t>(args) : mix_typed<float>(args); }

// x[i] = e^(scale x[i] - most) / sum; room for a multiple of sixteen.
inline void softmax(float* x, int64_t count, float scale) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = count; i < padded; i++) x[i] = x[0];
  F32 largest = load(x);
  for (int64_t i = kLanes; i < padded; i += kLanes) largest = max(load(x + i), largest);
  const F32 most = set1(greatest(largest)), factor = set1(scale);
  F32 sums = set1(0);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const F32 power = exp(mul(sub(load(x + i), most), factor));
    store(x + i, power);
    if (i + kLanes <= count) sums = add(sums, power);
  }
  float sum = 0;
  for (int64_t i = count / kLanes * kLanes; i < count; i++) sum += x[i];
  const F32 inverse = set1(1 / (total(sums) + sum));
  for (int64_t i = 0; i < padded; i += kLanes) store(x + i, mul(load(x + i), inverse));
}

// out = weight * x / sqrt(mean(x^2) + eps)
inline void rms_norm(const NormArgs& args) {
  const NormArgs a = args;
  const int64_t body = a.cols / kLanes * kLanes;
  F32 squares = set1(0);
  for (int64_t i = 0; i < body; i += kLanes) squares = fma(load(a.x + i), load(a.x + i), squares);
  float sum = total(squares);
  for (int64_t i = body; i < a.cols; i++) sum = __builtin_fmaf(a.x[i], a.x[i], sum);
  const float inverse = 1 / __builtin_sqrtf(sum / static_cast<float>(a.cols) + a.eps);
  for (int64_t i = 0; i < body; i += kLanes) store(a.out + i, mul(mul(load(a.x + i), set1(inverse)), load(a.weight + i)));
  for (int64_t i = body; i < a.cols; i++) a.out[i] = a.x[i] * inverse * a.weight[i];
}

constexpr RowKernels kRowKernels = {&dot_rows, &round_row, &widen_row, &mix_rows, &softmax, &rms_norm};

}  // namespace
}  // namespace hetero
