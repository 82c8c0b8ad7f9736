#include "format/layout.h"

#include "base/check.h"
#include "base/round.h"
#include "format/formats.h"

namespace hetero {
namespace {

constexpr int64_t kLargestDim = 1 << 20;

int64_t checked(const char* what, int64_t dim) {
  CHECK(dim >= 1 && dim <= kLargestDim, what, " is ", dim, ", must be between 1 and ", kLargestDim);
  return dim;
}

Quantization checked_quantization(Format format, int group, std::string& book) {
  Quantization q;
  if (format == Format::int4) {
    if (book.empty()) book = "gaussian";
    CHECK(book == "gaussian" || book == "linear", "book is '", book, "', must be gaussian or linear");
    q.choices = book == "gaussian";
    q.books = (q.choices ? kGaussianBooks : kLinearBooks).entry;
  } else {
    CHECK(book.empty(), "book is '", book, "', but ", format_name(format), " has no books");
  }
  with_format(format, [&](auto f) {
    using F = decltype(f);
    if constexpr (IntegerFormat<F>) {
      q.group = group ? group : book == "linear" ? kLinearGroup : F::group;
      CHECK(q.group == 32 || q.group == 64 || q.group == 128, "group is ", group, ", must be 32, 64 or 128 in ", F::name);
    } else {
      CHECK(group == 0, "group is ", group, ", but ", F::name, " has no groups");
    }
  });
  return q;
}

int hidden_parts(Format format) {
  return with_format(format, [](auto f) {
    if constexpr (IntegerFormat<decltype(f)>) return f.hidden_parts;
    else return 1;
  });
}

}  // namespace

MatrixLayout::MatrixLayout(Format format, int64_t rows, int64_t cols, Quantization quantization, int parts)
    : rows(rows), cols(cols), quantization(quantization), parts(parts) {
  tiles = ceil_div(rows, kTileRows);
  int64_t scale_bytes = sizeof(float);
  with_format(format, [&](auto f) {
    using F = decltype(f);
    if constexpr (IntegerFormat<F>) {
      scale_cols = ceil_div(cols, quantization.group);
      scale_bytes = kTileRows * sizeof(uint16_t);
      lines = scale_cols * quantization.group / F::line_k;
      // per group and part the steps and -128 * their sum; per block its scale and the reciprocal
      words = scale_cols * parts * (quantization.group / F::step_k + 1) + 2 * ceil_div(cols, kInputBlock);
    } else {
      scale_cols = F::scale_block ? ceil_div(cols, F::scale_block) : 0;
      lines = ceil_div(cols, F::line_k);
      words = lines * (F::line_k / F::step_k);
    }
  });
  scale_offset = lines * kLineBytes;
  choice_offset = scale_offset + round_up(scale_cols * scale_bytes, kLineBytes);
  tile_bytes = choice_offset + (quantization.choices ? ceil_div(lines, kChoiceLines) * kLineBytes : 0);
}

ExpertLayout::ExpertLayout(Format format, int64_t hidden, int64_t intermediate, int group, const std::string& book)
    : format(format),
      book(book),
      hidden(checked("hidden", hidden)),
      intermediate(checked("intermediate", intermediate)),
      gate(format, intermediate, hidden, checked_quantization(format, group, this->book), 1),
      down(format, hidden, intermediate, gate.quantization, hidden_parts(format)),
      down_offset(2 * gate.tiles * gate.tile_bytes),
      scales_offset(down_offset + down.tiles * down.tile_bytes),
      scales_bytes(gate.quantization.group ? (hidden + intermediate) * sizeof(uint16_t) : 0),
      blob_bytes(round_up(scales_offset + scales_bytes, kBlobAlign)),
      hidden_block(gate.quantization.group ? kInputBlock : kTileRows) {}

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
