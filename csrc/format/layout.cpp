#include "format/layout.h"

#include "base/check.h"
#include "format/formats.h"

namespace hetero {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t kLargestDim = 1 << 20;

int64_t checked(const char* what, int64_t dim) {
  CHECK(dim >= 1 && dim <= kLargestDim, what, " is ", dim, ", must be between 1 and ", kLargestDim);
  return dim;
}

}  // namespace

MatrixLayout::MatrixLayout(Format format, int64_t rows, int64_t cols) : rows(rows), cols(cols) {
  tiles = ceil_div(rows, kTileRows);
  with_format(format, [&](auto f) {
    lines = ceil_div(cols, f.line_k);
    steps = lines * (f.line_k / f.step_k);
    scale_cols = f.scale_block ? ceil_div(cols, f.scale_block) : 0;
  });
  scale_offset = lines * kLineBytes;
  tile_bytes = scale_offset + round_up(scale_cols * int64_t{sizeof(float)}, kLineBytes);
}

ExpertLayout::ExpertLayout(Format format, int64_t hidden, int64_t intermediate)
    : format(format),
      hidden(checked("hidden", hidden)),
      intermediate(checked("intermediate", intermediate)),
      gate(format, intermediate, hidden),
      down(format, hidden, intermediate),
      down_offset(2 * gate.tiles * gate.tile_bytes),
      blob_bytes(round_up(down_offset + down.tiles * down.tile_bytes, kBlobAlign)) {}

const char* format_name(Format format) {
  return with_format(format, [](auto f) { return f.name; });
}

std::vector<std::string> format_names() {
  std::vector<std::string> names;
  for (int i = 0; i < kFormats; i++) names.push_back(format_name(static_cast<Format>(i)));
  return names;
}

Format format_named(const std::string& name) {
  std::string known;
  for (int i = 0; i < kFormats; i++) {
    const auto format = static_cast<Format>(i);
    if (name == format_name(format)) return format;
    known += (i ? ", " : "") + std::string(format_name(format));
  }
  refuse("weight format '", name, "' is not one of ", known);
}

}  // namespace hetero
