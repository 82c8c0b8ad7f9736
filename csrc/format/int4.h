// INT4 (W4A8): w = (book[code] - 128) * scale, one signed fp16 scale per row and `group` columns. Tile [K/8][32][4], low
// nibbles the first four columns, high nibbles the next, then the scales [K/group][32], then the choices [K/128][32].
//
// There are four books of 16 entries, and each row's 8 columns in a line choose one: 2 bits, in the order of lines from the
// lowest bits of a uint32 on. So the few large weights of a group make only their own neighbours coarse, and a scale can
// serve 128 columns, which prefill likes: sums are folded four times less often. Error of a Gaussian weight, bits a weight:
//   group 32, one book 0.0727, 4.5; group 32, a choice per group 0.0677, 4.5 (+ 2 bits of the scale's mantissa);
//   group 128, a choice per 8 columns 0.0655, 4.375; group 64 0.0626, 4.5.
// Look-up is vpermb in one 64-byte register, the choice being index bits 4 and 5.
// An imported checkpoint keeps its codes and scales bit for bit under the linear book, -8..7, and makes no choices.
// Entries are stored + 128, as the unsigned operand of vpdpbusd; see int8.h.
#pragma once
#include "base/fp16.h"
#include "format/format.h"

namespace hetero {
namespace {

constexpr int kBooks = 4, kBookEntries = 16;
constexpr int kLinearGroup = 32;  // unless the checkpoint says otherwise

struct alignas(64) Books {
  uint8_t entry[kBooks * kBookEntries];
  constexpr explicit Books(const int (&values)[kBooks * kBookEntries]) : entry() {
    for (int i = 0; i < kBooks * kBookEntries; i++) entry[i] = static_cast<uint8_t>(values[i] + 128);
  }
};

// Fitted to Gaussian groups of 128 by alternating between choosing (scale, books) for each group and refitting the books.
constexpr Books kGaussianBooks({
    -127, -101, -79, -62, -47, -34, -21, -9, 2, 13, 25, 37, 50, 65, 82, 108,  //
    -112, -86, -64, -50, -39, -27, -17, -7, 2, 10, 20, 30, 41, 53, 68, 93,    //
    -88, -73, -54, -41, -30, -21, -13, -6, 1, 8, 16, 23, 32, 43, 55, 75,      //
    -68, -55, -44, -34, -25, -17, -11, -5, 1, 7, 13, 19, 27, 36, 46, 60,      //
});
constexpr Books kLinearBooks({
    -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7,  //
    -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7,  //
    -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7,  //
    -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7,  //
});

struct Int4 {
  static constexpr Format id = Format::int4;
  static constexpr const char* name = "INT4";
  using Code = uint8_t;
  static constexpr int line_k = 8, step_k = 4, group = 128, hidden_parts = 1;
  static constexpr int place(int k) { return k; }  // in nibbles: byte k % 4, high if k >= 4
  static constexpr float weight(const uint8_t* quad, int k, uint16_t scale, const uint8_t* book) {
    return static_cast<float>(book[quad[k % 4] >> (k / 4 * 4) & 15] - 128) * fp16_to_float(scale);
  }
  static constexpr void put(uint8_t* quad, int k, uint8_t code) {  // into zeros
    quad[k % 4] = static_cast<uint8_t>(quad[k % 4] | code << (k / 4 * 4));
  }
};

}  // namespace
}  // namespace hetero
