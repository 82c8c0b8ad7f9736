// Rows are cut evenly into token blocks of at most `most`: 16 = 8 + 8, not 12 + 4. Packing and GEMM agree through this.
// Comes after a vec_*.h, which says how many tokens a block can have.
#pragma once
#include "format/format.h"

namespace hetero {
namespace {

template <class F> constexpr int block_tokens = kTokens;
template <IntegerFormat F> constexpr int block_tokens<F> = kDotTokens;

struct TokenBlocks {
  int rows, count;
  TokenBlocks(int rows, int most) : rows(rows), count((rows + most - 1) / most) {}
  int start(int b) const { return b * (rows / count) + (b < rows % count ? b : rows % count); }
  int width(int b) const { return rows / count + (b < rows % count ? 1 : 0); }
};

template <class F> TokenBlocks token_blocks(int rows) { return {rows, block_tokens<F>}; }

}  // namespace
}  // namespace hetero
