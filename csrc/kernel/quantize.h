// Weights -> codes and scales of the integer formats, 16 rows at a time (one per lane), group by group. Products and sums are
// rounded one by one in the order of columns, never fused, so that every ISA and weights/quantize.py give the same bits.
//
// INT8: scale = fp16(absmax / 127), code = round(w / scale).
// INT4: let the group's weight of greatest magnitude fall on each of kExtremes. Each line (8 columns) then takes the book in
// which the entries b nearest to its scaled weights v are nearest, the least b.b - 2 v.b. With all lines' b a scale s leaves
// the error |w - s b|^2, least at s = (w.b) / (b.b), where it is |w|^2 - (w.b)^2 / (b.b): the greatest (w.b)^2 / (b.b) wins,
// and repeating with its own s refines it. The scale is then rounded to fp16, and lines choose books and codes once more.
#pragma once
#include "format/int4.h"
#include "format/int8.h"
#include "kernel/kernels.h"

namespace hetero {
namespace {

struct BookSteps {  // of a book: entry 0, then what each of 15 thresholds adds
  F32 first, above[kBookEntries - 1], step[kBookEntries - 1];
};

inline void read_book(const uint8_t* book, BookSteps& s) {
  const auto entry = [&](int i) { return static_cast<float>(book[i] - 128); };
  s.first = set1(entry(0));
  for (int i = 0; i < kBookEntries - 1; i++) {
    s.above[i] = set1((entry(i) + entry(i + 1)) * 0.5f);
    s.step[i] = set1(entry(i + 1) - entry(i));
  }
}

using BookList = BookSteps[kBooks];

// Entries nearest to w * inverse over a line: their sums of products, and the book they are in, where lanes differ.
struct LineFit {
  F32 wb, bb, book;
};

inline LineFit fit_line(const float* w, const BookList& books, int count, F32 inverse) {
  LineFit best;
  F32 least;
  for (int b = 0; b < count; b++) {
    LineFit fit{set1(0), set1(0), set1(static_cast<float>(b))};
    for (int k = 0; k < Int4::line_k; k++) {
      const F32 weight = load(w + k * 16), v = mul(weight, inverse);
      F32 entry = books[b].first;
#pragma GCC unroll 15
      for (int i = 0; i < kBookEntries - 1; i++) entry = add_where_greater(entry, v, books[b].above[i], books[b].step[i]);
      fit.wb = add(fit.wb, mul(weight, entry));
      fit.bb = add(fit.bb, mul(entry, entry));
    }
    const F32 loss = sub(fit.bb, mul(set1(2), mul(inverse, fit.wb)));
    if (b == 0) {
      best = fit, least = loss;
      continue;
    }
    best.wb = where_greater(least, loss, fit.wb, best.wb);
    best.bb = where_greater(least, loss, fit.bb, best.bb);
    best.book = where_greater(least, loss, fit.book, best.book);
    least = where_greater(least, loss, loss, least);
  }
  return best;
}

struct GroupFit {  // the best choice so far, by lane
  F32 score, scale;
};

inline void try_scale(const float* w, int group, const BookList& books, int count, F32 inverse, GroupFit& best) {
  F32 wb = set1(0), bb = set1(0);
  for (int k = 0; k < group; k += Int4::line_k) {
    const LineFit line = fit_line(w + k * 16, books, count, inverse);
    wb = add(wb, line.wb), bb = add(bb, line.bb);
  }
  const F32 score = div(mul(wb, wb), bb);
  best.scale = where_greater(score, best.score, div(wb, bb), best.scale);
  best.score = where_greater(score, best.score, score, best.score);
}

// The codes of a line and, unless null, its choices of a book.
inline void encode_line(const float* w, const BookList& books, int count, F32 inverse, uint8_t* codes, uint8_t* choices) {
  const F32 book = fit_line(w, books, count, inverse).book;
  F32 above[kBookEntries - 1];
  for (int i = 0; i < kBookEntries - 1; i++) {
    above[i] = books[0].above[i];
    for (int b = 1; b < count; b++)
      above[i] = where_greater(book, set1(static_cast<float>(b) - 0.5f), books[b].above[i], above[i]);
  }
  for (int k = 0; k < Int4::line_k; k++) {
    const F32 v = mul(load(w + k * 16), inverse);
    F32 code = set1(0);
    for (int i = 0; i < kBookEntries - 1; i++) code = add_where_greater(code, v, above[i], set1(1));
    store_bytes(codes + k * 16, round(code));
  }
  if (choices != nullptr) store_bytes(choices, round(book));
}

// The nearest fp16, finite.
inline uint16_t finite_fp16(float value) {
  return float_to_fp16(value < -65504.f ? -65504.f : value > 65504.f ? 65504.f : value);
}

template <IntegerFormat F> void quantize(const QuantizeArgs& args);

template <> inline void quantize<Int8>(const QuantizeArgs& args) {
  const QuantizeArgs a = args;
  const float* w = a.weights;
  for (int64_t g = 0; g < a.groups; g++) {
    F32 most = set1(0);
    for (int k = 0; k < a.group; k++) most = max(abs(load(w + k * 16)), most);
    alignas(64) float scales[16];
    store(scales, div(most, set1(127)));
    for (int r = 0; r < 16; r++) {
      const uint16_t half = finite_fp16(scales[r]);
      a.scales[g * 16 + r] = half;
      scales[r] = half == 0 ? 1.f : fp16_to_float(half);  // codes of a group of zeros are zero
    }
    const F32 scale = load(scales);
    for (int k = 0; k < a.group; k++, w += 16) {
      const F32 code = min(max(div(load(w), scale), set1(-127)), set1(127));
      store_bytes(a.codes + g * a.group * 16 + k * 16, add(round(code), set1_int(128)));
    }
  }
}

template <> inline void quantize<Int4>(const QuantizeArgs& args) {
  const QuantizeArgs a = args;
  const int count = a.choices == nullptr ? 1 : kBooks;
  BookList books;
  for (int b = 0; b < count; b++) read_book(a.books + b * kBookEntries, books[b]);
  const F32 greatest_entry = set1(static_cast<float>(128 - a.books[0]));
  const float* w = a.weights;
  for (int64_t g = 0; g < a.groups; g++, w += a.group * 16) {
    F32 extreme = set1(0);
    for (int k = 0; k < a.group; k++) extreme = where_greater(abs(load(w + k * 16)), abs(extreme), load(w + k * 16), extreme);
    GroupFit best = {set1(0), set1(0)};
    for (const float position : kExtremes)
      try_scale(w, a.group, books, count, div(mul(greatest_entry, set1(position)), extreme), best);
    for (int i = 0; i < kRefinements; i++) try_scale(w, a.group, books, count, div(set1(1), best.scale), best);

    alignas(64) float scales[16];
    store(scales, best.scale);
    for (int r = 0; r < 16; r++) {
      a.scales[g * 16 + r] = finite_fp16(scales[r]);
      scales[r] = fp16_to_float(a.scales[g * 16 + r]);
    }
    const F32 inverse = div(set1(1), load(scales));
    for (int k = 0; k < a.group; k += Int4::line_k) {
      const int64_t column = g * a.group + k;
      uint8_t* choices = a.choices == nullptr ? nullptr : a.choices + column / Int4::line_k * 16;
      encode_line(w + k * 16, books, count, inverse, a.codes + column * 16, choices);
    }
  }
}

}  // namespace
}  // namespace hetero
