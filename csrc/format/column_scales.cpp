#include "format/column_scales.h"

#include <algorithm>
#include <cmath>

namespace hetero {
namespace {

constexpr int kMost = 6;
// Up's rms is 2^-7 at least (groups of 32 or more: scales of 2^-14 and up, nearly always), its norm at most fp16's limit.
constexpr double kLeastMeanSquare = 0x1p-14, kMostSquares = 65504.0 * 65504.0;

// round(log2(squares[k] / median) / 4), 0 for zeros.
std::vector<int> balance(const std::vector<double>& squares) {
  std::vector<double> sorted = squares;
  const auto middle = sorted.begin() + (sorted.size() - 1) / 2;
  std::nth_element(sorted.begin(), middle, sorted.end());
  std::vector<int> exponents(squares.size(), 0);
  for (size_t k = 0; k < squares.size(); k++) {
    if (squares[k] == 0 || *middle == 0) continue;
    int above;  // floor(log2(ratio)) + 1
    std::frexp(squares[k] / *middle, &above);
    exponents[k] = std::clamp((above + 1) >> 2, -kMost, kMost);
  }
  return exponents;
}

}  // namespace

ColumnExponents choose_exponents(const Squares& gate, const Squares& up, const Squares& down) {
  std::vector<double> input = gate.column, hidden = down.column;
  for (size_t k = 0; k < input.size(); k++) input[k] += up.column[k];
  for (size_t j = 0; j < hidden.size(); j++) {
    const double rows = gate.row[j] * up.row[j];
    hidden[j] = rows == 0 ? 0 : hidden[j] / rows;
  }
  ColumnExponents exponents{balance(input), balance(hidden)};
  const double least = kLeastMeanSquare * static_cast<double>(input.size());
  for (size_t j = 0; j < hidden.size(); j++) {
    int& d = exponents.hidden[j];
    while (d < 0 && std::ldexp(up.row[j], 2 * d) < least) d++;
    while (d > 0 && std::ldexp(up.row[j], 2 * d) > kMostSquares) d--;
  }
  return exponents;
}

}  // namespace hetero
