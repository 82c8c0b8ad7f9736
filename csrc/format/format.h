// What every weight format shares: its number, and the constants of a tile.
//
// A tile is 32 output rows. It holds 128-byte lines, each 32 rows x 4 bytes of K, then its scales, padded to a line:
//   [line][row 0..31][4 bytes of K], [scale of K block 0, 1, ...]
// so a tile is one contiguous, aligned range, which vdpbf16ps, vpdpbusd and AMX's B operand read without a shuffle. It is two
// vectors wide because one chain of dots is slower than memory, and two chains from two places lose bandwidth where one
// ends: 5-15 % where tiles are short.
//
// A format is one struct (fp32.h, bf16.h, fp8.h, int8.h, int4.h) of constants and scalar truth, without SIMD:
//   id, name       number and --kt-method name
//   Code           what one weight is stored as
//   line_k         weights of one row in a line
//   step_k         activations in one 32-bit step: 1 (fp32), 2 (a bf16 pair) or 4 (int8)
//   place(k)       where weight k of a row's line_k weights sits in its 4 bytes
// With floating-point activations:
//   scale_block    side of the square block that shares one fp32 scale; 0 = no scales. Sums over K are folded with the
//                  scale once per block, at the same K on every ISA and for every blocking
//   decode(code)   the weight, before its scale
// With integer ones (IntegerFormat):
//   group          columns of a row that share an fp16 scale, by default; K is padded to whole groups
//   hidden_parts   int8 parts of an intermediate value
//   weight(...)    the weight, scale included; put(...) stores a code. INT4 looks its codes up in books of entries
#pragma once
#include <cstdint>

namespace hetero {

enum class Format : int { fp32, bf16, fp8, int8, int4 };
inline constexpr int kFormats = 5;
inline constexpr int kLanes = 16;  // rows that are quantised together: a vector of floats
inline constexpr int kTileRows = 2 * kLanes;
inline constexpr int kLineBytes = 4 * kTileRows;
inline constexpr int kScaleBlock = 128;   // side of the blocks of an FP8 checkpoint that share a scale
inline constexpr int kChoiceLines = 16;   // lines of a row whose choices of a book fill a word
inline constexpr int kInputBlock = 128;   // activations of a token that share a scale in integer formats
inline constexpr int kLayoutVersion = 3;  // of everything in format/; packed files carry it

template <class F> concept IntegerFormat = requires { F::hidden_parts; };

}  // namespace hetero
