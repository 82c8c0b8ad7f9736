// Column scales of integer formats. One column of large weights sets the scale of its whole group in every row, and all
// others there lose precision: with 0.5 % of the columns 20 times as large, INT8's error more than doubles. So what is
// stored is W[:, k] / 2^e[k], and the inputs are multiplied by 2^e[k] as they are packed: exactly, and beside the GEMM.
//
//   e[k]   of gate and up, which read the same x: round(log2(rms of column k of both / the median column's) / 2)
//   d[j]   of down, whose input j is made of row j of gate and of up: round(log2(q[j] / median q) / 2), q[j] = rms of
//          down's column j / (rms of gate's row j * rms of up's), so that large hidden values are balanced with small
//          columns. Up's row j is stored times 2^d[j]: nothing is left to do in a call.
//
// The halves leave the other half of a difference to the inputs, since they share scales too (blocks of 128, int8).
// Exponents are -6..6, those of a column of zeros 0; d is brought nearer to 0 where up's scales would leave fp16's normal
// numbers. An rms is compared by its sum of squares: products are exact in double, sums go row by row or column by column.
// weights/integers.py has the same in torch, bit for bit.
#pragma once
#include <cstdint>
#include <vector>

namespace hetero {

struct Squares {  // sums over a matrix's rows and columns
  std::vector<double> row, column;
};

struct ColumnExponents {  // e, d
  std::vector<int> input, hidden;
};

ColumnExponents choose_exponents(const Squares& gate, const Squares& up, const Squares& down);

}  // namespace hetero
