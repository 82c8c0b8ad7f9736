// INT4 (W4A8): w = (book[scale & 3][code] - 128) * scale, one signed fp16 scale per row and `group` columns. Tile
// [K/8][32][4], low nibbles the first four columns, high nibbles the next, then the scales [K/group][32].
//
// There are four books of 16 entries, and the two lowest bits of a group's scale say which one it uses: a choice of shape
// that costs no bits, since a scale needs no 10 bits of mantissa. On Gaussian weights in groups of 32 (error of a weight):
// one book 0.0727, four 0.0677. Look-up is vpermb in one 64-byte register, the choice being index bits 4 and 5.
// An imported checkpoint keeps its scales bit for bit under the linear books, all four of which are -8..7.
// Entries are stored + 128, as the unsigned operand of vpdpbusd; see int8.h.
#pragma once
#include "base/fp16.h"
#include "format/format.h"

namespace hetero {
namespace {

constexpr int kBooks = 4, kBookEntries = 16;

struct alignas(64) Books {
  uint8_t entry[kBooks * kBookEntries];
  constexpr explicit Books(const int (&values)[kBooks * kBookEntries]) : entry() {
    for (int i = 0; i < kBooks * kBookEntries; i++) entry[i] = static_cast<uint8_t>(values[i] + 128);
  }
};

// Fitted to Gaussian groups of 32 by alternating between choosing (book, scale) for each group and refitting the books.
constexpr Books kGaussianBooks({
    -127, -102, -78, -61, -46, -33, -21, -10, 2, 13, 25, 37, 50, 65, 81, 104,  //
    -127, -105, -87, -70, -54, -39, -25, -10, 4, 17, 31, 45, 59, 74, 91, 112,  //
    -127, -89, -62, -48, -36, -25, -16, -7, 2, 10, 19, 28, 39, 52, 67, 94,     //
    -127, -84, -69, -54, -41, -29, -18, -7, 2, 11, 21, 32, 44, 57, 76, 95,     //
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
  static constexpr int line_k = 8, step_k = 4, group = 32, hidden_parts = 1;
  static constexpr int place(int k) { return k; }  // in nibbles: byte k % 4, high if k >= 4
  static constexpr float weight(const uint8_t* quad, int k, uint16_t scale, const uint8_t* books) {
    const int code = quad[k % 4] >> (k / 4 * 4) & 15;
    return static_cast<float>(books[(scale & 3) * kBookEntries + code] - 128) * fp16_to_float(scale);
  }
  static constexpr void put(uint8_t* quad, int k, uint8_t code) {  // into zeros
    quad[k % 4] = static_cast<uint8_t>(quad[k % 4] | code << (k / 4 * 4));
  }
};

}  // namespace
}  // namespace hetero
