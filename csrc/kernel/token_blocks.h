// Rows are cut evenly into token blocks of at most `most`: 16 = 8 + 8, not 12 + 4. Packing, GEMM and SiLU agree through this.
// Comes after a vec_*.h, which says how many tokens a block can have.
#pragma once

namespace hetero {
namespace {

template <class F> constexpr int block_tokens = F::scale_block ? kFoldTokens : kTokens;

struct TokenBlocks {
  int rows, count;
  TokenBlocks(int rows, int most) : rows(rows), count((rows + most - 1) / most) {}
  int start(int b) const { return b * (rows / count) + (b < rows % count ? b : rows % count); }
  int width(int b) const { return rows / count + (b < rows % count ? 1 : 0); }
};

}  // namespace
}  // namespace hetero
