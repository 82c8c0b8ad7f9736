// Weights -> codes and scales of the integer formats, 16 rows at a time (one per lane), group by group. Products and sums are
// rounded one by one in the order of columns, never fused, so that every ISA and weights/quantize.py give the same bits.
//
// INT8: scale = fp16(absmax / 127), code = round(w / scale).
// INT4: for each book and each of kExtremes, let the weight of greatest magnitude fall on that entry: codes b are the nearest
// entries, and a scale s leaves the error |w - s b|^2, least at s = (w.b) / (b.b), where it is |w|^2 - (w.b)^2 / (b.b). So the
// choice with the greatest (w.b)^2 / (b.b) wins; repeating with its own s refines it. The scale is then rounded to an fp16
// whose two lowest bits name the book, and every weight takes the entry nearest to it.
#pragma once
#include "format/int4.h"
#include "format/int8.h"
#include "kernel/kernels.h"

namespace hetero {
namespace {

struct BookSteps {  // of a book, or of a book per lane: entry 0, then what each of 15 thresholds adds
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

struct GroupFit {  // the best choice so far, by lane
  F32 score, scale, book;
};

// The nearest entries b to w * inverse: takes over (w.b) / (b.b) as the scale where (w.b)^2 / (b.b) is greater.
inline void try_scale(const float* w, int group, const BookSteps& s, F32 inverse, F32 book, GroupFit& best) {
  F32 wb = set1(0), bb = set1(0);
  for (int k = 0; k < group; k++) {
    const F32 weight = load(w + k * 16), v = mul(weight, inverse);
    F32 b = s.first;
#pragma GCC unroll 15
    for (int i = 0; i < kBookEntries - 1; i++) b = add_where_greater(b, v, s.above[i], s.step[i]);
    wb = add(wb, mul(weight, b));
    bb = add(bb, mul(b, b));
  }
  const F32 score = div(mul(wb, wb), bb);
  best.scale = where_greater(score, best.score, div(wb, bb), best.scale);
  best.book = where_greater(score, best.score, book, best.book);
  best.score = where_greater(score, best.score, score, best.score);
}

inline void choose_steps(const BookSteps (&books)[kBooks], F32 choice, BookSteps& own) {
  own = books[0];
  for (int b = 1; b < kBooks; b++) {
    const F32 below = set1(static_cast<float>(b) - 0.5f);
    own.first = where_greater(choice, below, books[b].first, own.first);
    for (int i = 0; i < kBookEntries - 1; i++) {
      own.above[i] = where_greater(choice, below, books[b].above[i], own.above[i]);
      own.step[i] = where_greater(choice, below, books[b].step[i], own.step[i]);
    }
  }
}

// The fp16 nearest to `scale` whose two lowest bits are `book`; 0 stays 0, and the greatest is finite.
inline uint16_t scale_with_book(float scale, int book) {
  if (scale == 0) return 0;
  const int half = float_to_fp16(scale), magnitude = half & 0x7fff;
  const int nearest = ((magnitude - book + 2) & ~3) + book, most = 0x7bfc + book;
  return static_cast<uint16_t>((half & 0x8000) | (nearest < book ? book : nearest > most ? most : nearest));
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
      const uint16_t half = float_to_fp16(scales[r] < 65504.f ? scales[r] : 65504.f);
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
  BookSteps books[kBooks], own;
  for (int b = 0; b < kBooks; b++) read_book(a.books + b * kBookEntries, books[b]);
  const F32 greatest_entry = set1(static_cast<float>(128 - a.books[0]));
  const bool alike = __builtin_memcmp(a.books, a.books + kBookEntries, (kBooks - 1) * kBookEntries) == 0;
  const float* w = a.weights;
  for (int64_t g = 0; g < a.groups; g++, w += a.group * 16) {
    F32 extreme = set1(0);
    for (int k = 0; k < a.group; k++) extreme = where_greater(abs(load(w + k * 16)), abs(extreme), load(w + k * 16), extreme);
    GroupFit best = {set1(0), set1(0), set1(0)};
    for (int b = 0; b < (alike ? 1 : kBooks); b++)
      for (const float position : kExtremes) {
        const F32 inverse = div(mul(greatest_entry, set1(position)), extreme);
        try_scale(w, a.group, books[b], inverse, set1(static_cast<float>(b)), best);
      }
    choose_steps(books, best.book, own);
    for (int i = 0; i < kRefinements; i++) try_scale(w, a.group, own, div(set1(1), best.scale), best.book, best);

    alignas(64) float scales[16], choice[16];
    store(scales, best.scale), store(choice, best.book);
    for (int r = 0; r < 16; r++) {
      a.scales[g * 16 + r] = scale_with_book(scales[r], static_cast<int>(choice[r]));
      scales[r] = fp16_to_float(a.scales[g * 16 + r]);
    }
    const F32 inverse = div(set1(1), load(scales));
    for (int k = 0; k < a.group; k++) {
      const F32 v = mul(load(w + k * 16), inverse);
      F32 code = set1(0);
      for (int i = 0; i < kBookEntries - 1; i++) code = add_where_greater(code, v, own.above[i], set1(1));
      store_bytes(a.codes + (g * a.group + k) * 16, round(code));
    }
  }
}

}  // namespace
}  // namespace hetero
