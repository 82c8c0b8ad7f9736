#include "format/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "base/check.h"
#include "base/bf16.h"
#include "base/fp16.h"
#include "format/column_scales.h"
#include "format/formats.h"

namespace hetero {
namespace {

using Part = ExpertLayout::Part;

struct SourceF32 {
  using Code = float;
  static float decode(Code code) { return code; }
};
struct SourceBf16 {
  using Code = uint16_t;
  static float decode(Code code) { return bf16_to_float(code); }
};
struct SourceF16 {
  using Code = uint16_t;
  static float decode(Code code) { return fp16_to_float(code); }
};
struct SourceE4m3 {
  using Code = uint8_t;
  static float decode(Code code) { return e4m3_to_float(code); }
};

template <class Visit> void with_source(Source source, Visit&& visit) {
  switch (source) {
    case Source::f32: return visit(SourceF32{});
    case Source::bf16: return visit(SourceBf16{});
    case Source::f16: return visit(SourceF16{});
    case Source::e4m3: return visit(SourceE4m3{});
  }
}

template <class S> float weight_at(const SourceMatrix& from, int64_t cols, int64_t row, int64_t col) {
  const float value = S::decode(static_cast<const typename S::Code*>(from.data)[row * cols + col]);
  if constexpr (!std::is_same_v<S, SourceE4m3>) return value;
  else return value * from.scales[row / kScaleBlock * ((cols + kScaleBlock - 1) / kScaleBlock) + col / kScaleBlock];
}

constexpr int64_t kPackLines = 64;  // lines packed at a time, so that a tile's strided writes stay in L1

template <class F, class S> class Packer {
 public:
  Packer(const ExpertLayout& layout, Part part, const SourceMatrix& from)
      : layout_(layout),
        part_(part),
        m_(layout.matrix(part)),
        from_(from),
        codes_(static_cast<const Code*>(from.data)) {}

  void pack(uint8_t* blob) const {
    for (int64_t t = 0; t < m_.tiles; t++) {
      uint8_t* tile = blob + layout_.first_tile(part_) + t * layout_.tile_stride(part_);
      const int64_t row = t * kTileRows, rows = std::min<int64_t>(kTileRows, m_.rows - row);
      if (rows < kTileRows) std::memset(tile, 0, m_.scale_offset);
      for (int64_t line = 0; line < m_.lines; line += kPackLines)
        for (int64_t r = 0; r < rows; r++) pack_row(row + r, line, std::min(m_.lines, line + kPackLines), tile + r * 4);
      std::memset(tile + m_.scale_offset, 0, m_.tile_bytes - m_.scale_offset);
      if constexpr (F::scale_block != 0)
        std::memcpy(tile + m_.scale_offset, from_.scales + row / kScaleBlock * m_.scale_cols, m_.scale_cols * sizeof(float));
    }
  }

 private:
  using Code = typename S::Code;
  static constexpr bool kKeepsCodes = F::id == Format::fp8 || (F::id == Format::bf16 && std::is_same_v<S, SourceBf16>);

  // Lines [begin, end) of one row; out is the row's place in the tile's first line.
  void pack_row(int64_t row, int64_t begin, int64_t end, uint8_t* out) const {
    const Code* from = codes_ + row * m_.cols;
    const int64_t whole = std::min(end, m_.cols / F::line_k);
    for (int64_t line = begin; line < whole; line++) pack_quad(row, from, line, F::line_k, out);
    if (whole < end) pack_quad(row, from, whole, m_.cols - whole * F::line_k, out);
  }

  void pack_quad(int64_t row, const Code* from, int64_t line, int64_t count, uint8_t* out) const {
    typename F::Code codes[F::line_k] = {};
    for (int64_t k = 0; k < count; k++) codes[F::place(k)] = convert(from[line * F::line_k + k], row, line * F::line_k + k);
    std::memcpy(out + line * kLineBytes, codes, 4);
  }

  typename F::Code convert(Code code, int64_t row, int64_t col) const {
    if constexpr (kKeepsCodes) return code;
    else return F::encode(weight_at<S>(from_, m_.cols, row, col));
  }

  const ExpertLayout& layout_;
  const Part part_;
  const MatrixLayout& m_;
  const SourceMatrix& from_;
  const Code* codes_;
};

// 16 rows of an integer format, padding included.
struct Quantized {
  std::vector<uint8_t> codes;    // [column][16]
  std::vector<uint16_t> scales;  // [group][16]
  std::vector<uint8_t> choices;  // [line][16], empty if there are none

  explicit Quantized(const MatrixLayout& m)
      : codes(m.scale_cols * m.quantization.group * kLanes),
        scales(m.scale_cols * kLanes),
        choices(m.quantization.choices ? m.lines * kLanes : 0) {}
};

// Into the tile, from row `lane` on.
template <class F> void place_rows(const MatrixLayout& m, const Quantized& q, int64_t lane, uint8_t* tile) {
  if (lane == 0) std::memset(tile, 0, m.tile_bytes);
  for (int64_t k = 0; k < m.lines * F::line_k; k++)
    for (int64_t r = 0; r < kLanes; r++)
      F::put(tile + k / F::line_k * kLineBytes + (lane + r) * 4, static_cast<int>(k % F::line_k), q.codes[k * kLanes + r]);
  auto* scales = reinterpret_cast<uint16_t*>(tile + m.scale_offset) + lane;
  for (int64_t g = 0; g < m.scale_cols; g++) std::copy_n(&q.scales[g * kLanes], kLanes, scales + g * kTileRows);
  auto* choices = reinterpret_cast<uint32_t*>(tile + m.choice_offset) + lane;
  for (size_t i = 0; i < q.choices.size(); i++) {
    const int64_t line = i / kLanes, row = i % kLanes;
    choices[line / kChoiceLines * kTileRows + row] |= uint32_t{q.choices[i]} << 2 * (line % kChoiceLines);
  }
}

// The bf16 scales of the columns of `part`, in its blob.
template <class Byte> auto column_scales(const ExpertLayout& layout, Part part, Byte* blob) {
  using Scale = std::conditional_t<std::is_const_v<Byte>, const uint16_t, uint16_t>;
  return reinterpret_cast<Scale*>(blob + layout.column_scales(part));
}

// What a stored weight of `part` is to be multiplied by: its column's scale; in `up`, over that of down's column `row`.
class Unscaling {
 public:
  Unscaling(const ExpertLayout& layout, Part part, const uint8_t* blob)
      : columns_(column_scales(layout, part, blob)),
        rows_(part == Part::kUp ? column_scales(layout, Part::kDown, blob) : nullptr) {}
  float at(int64_t row, int64_t col) const {
    const float column = bf16_to_float(columns_[col]);
    return rows_ == nullptr ? column : column / bf16_to_float(rows_[row]);
  }

 private:
  const uint16_t *columns_, *rows_;
};

template <class S> Squares squares(const MatrixLayout& m, const SourceMatrix& from, const char* format) {
  Squares sums{std::vector<double>(m.rows), std::vector<double>(m.cols)};
  for (int64_t row = 0; row < m.rows; row++) {
    double sum = 0;
    for (int64_t k = 0; k < m.cols; k++) {
      const double weight = weight_at<S>(from, m.cols, row, k);
      sums.column[k] += weight * weight;
      sum += weight * weight;
    }
    CHECK(std::isfinite(sum), "row ", row, " of a matrix holds a weight that is NaN or infinite; ", format, " cannot express it");
    sums.row[row] = sum;
  }
  return sums;
}

void store_scales(const std::vector<int>& exponents, uint16_t* scales) {
  for (const int e : exponents) *scales++ = static_cast<uint16_t>((127 + e) << 7);
}

// 16 rows as floats, [column][16] with zeros for padding, then quantised, then put in their places.
template <class F, class S> void pack_quantized(const ExpertLayout& layout, Part part, const SourceMatrix& from,
                                                Quantize quantize, uint8_t* blob) {
  const MatrixLayout& m = layout.matrix(part);
  const Unscaling scale(layout, part, blob);
  Quantized q(m);
  std::vector<float> weights(q.codes.size());
  for (int64_t first = 0; first < m.tiles * kTileRows; first += kLanes) {
    uint8_t* tile = blob + layout.first_tile(part) + first / kTileRows * layout.tile_stride(part);
    const int64_t rows = std::clamp<int64_t>(m.rows - first, 0, kLanes);
    std::fill(weights.begin(), weights.end(), 0.f);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < m.cols; k++)
        weights[k * kLanes + r] = weight_at<S>(from, m.cols, first + r, k) / scale.at(first + r, k);
    quantize({weights.data(), m.scale_cols, m.quantization.group, m.quantization.books, q.codes.data(), q.scales.data(),
              q.choices.empty() ? nullptr : q.choices.data()});
    place_rows<F>(m, q, first % kTileRows, tile);
  }
}

// That of row r's weights in a line.
const uint8_t* chosen_book(const MatrixLayout& m, const uint8_t* tile, int64_t r, int64_t line) {
  if (!m.quantization.choices) return m.quantization.books;
  uint32_t word;
  std::memcpy(&word, tile + m.choice_offset + (line / kChoiceLines * kTileRows + r) * sizeof word, sizeof word);
  return m.quantization.books + (word >> 2 * (line % kChoiceLines) & 3) * kBookEntries;
}

template <class F> void dequantize(const ExpertLayout& layout, Part part, const uint8_t* blob, float* out) {
  const MatrixLayout& m = layout.matrix(part);
  for (int64_t row = 0; row < m.rows; row++) {
    const int64_t r = row % kTileRows;
    const uint8_t* tile = blob + layout.first_tile(part) + row / kTileRows * layout.tile_stride(part);
    for (int64_t col = 0; col < m.cols; col++) {
      const uint8_t* quad = tile + col / F::line_k * kLineBytes + r * 4;
      const int k = static_cast<int>(col % F::line_k);
      float& value = out[row * m.cols + col];
      if constexpr (IntegerFormat<F>) {
        uint16_t scale;
        std::memcpy(&scale, tile + m.scale_offset + (col / m.quantization.group * kTileRows + r) * sizeof scale, sizeof scale);
        value = F::weight(quad, k, scale, chosen_book(m, tile, r, col / F::line_k)) * Unscaling(layout, part, blob).at(row, col);
      } else {
        typename F::Code code;
        std::memcpy(&code, quad + F::place(k) * sizeof code, sizeof code);
        float scale = 1;
        if constexpr (F::scale_block != 0)
          std::memcpy(&scale, tile + m.scale_offset + col / F::scale_block * sizeof scale, sizeof scale);
        value = F::decode(code) * scale;
      }
    }
  }
}

void place_codes(const ExpertLayout& layout, Part part, const Codes& from, uint8_t* blob) {
  const MatrixLayout& m = layout.matrix(part);
  const int64_t row_bytes = (m.cols + 7) / 8 * 4;
  Quantized q(m);
  for (int64_t first = 0; first < m.tiles * kTileRows; first += kLanes) {
    uint8_t* tile = blob + layout.first_tile(part) + first / kTileRows * layout.tile_stride(part);
    std::fill(q.codes.begin(), q.codes.end(), 8);  // weight 0
    std::fill(q.scales.begin(), q.scales.end(), 0);
    for (int64_t r = 0; r < std::clamp<int64_t>(m.rows - first, 0, kLanes); r++) {
      const uint8_t* row = from.codes + (first + r) * row_bytes;
      for (int64_t k = 0; k < m.cols; k++) q.codes[k * kLanes + r] = row[k / 2] >> (k % 2 * 4) & 15;
      for (int64_t g = 0; g < m.scale_cols; g++) q.scales[g * kLanes + r] = from.scales[(first + r) * m.scale_cols + g];
    }
    place_rows<Int4>(m, q, first % kTileRows, tile);
  }
}

template <class Visit> void each_part(Visit visit) {
  for (const Part part : {Part::kGate, Part::kUp, Part::kDown}) visit(part);
}

}  // namespace

Source source_named(const std::string& dtype) {
  if (dtype == "float32") return Source::f32;
  if (dtype == "bfloat16") return Source::bf16;
  if (dtype == "float16") return Source::f16;
  if (dtype == "float8_e4m3fn") return Source::e4m3;
  refuse("weights of dtype ", dtype, " cannot be packed: float32, bfloat16, float16 or float8_e4m3fn can");
}

int64_t source_bytes(Source source) { return source == Source::f32 ? 4 : source == Source::e4m3 ? 1 : 2; }

void pack_expert(const ExpertLayout& layout, const Parts<SourceMatrix>& from, Quantize quantize, uint8_t* blob) {
  for (const SourceMatrix& matrix : from)
    CHECK((matrix.dtype == Source::e4m3) == (matrix.scales != nullptr),
          "float8_e4m3fn weights need their fp32 block scales, other dtypes have none");
  std::memset(blob + layout.scales_offset, 0, layout.blob_bytes - layout.scales_offset);
  with_format(layout.format, [&](auto format) {
    using F = decltype(format);
    if constexpr (IntegerFormat<F>) {
      Parts<Squares> sums;
      each_part([&](Part part) {
        with_source(from[part].dtype, [&](auto source) { sums[part] = squares<decltype(source)>(layout.matrix(part), from[part], F::name); });
      });
      const ColumnExponents exponents = choose_exponents(sums[Part::kGate], sums[Part::kUp], sums[Part::kDown]);
      store_scales(exponents.input, column_scales(layout, Part::kGate, blob));
      store_scales(exponents.hidden, column_scales(layout, Part::kDown, blob));
    }
    each_part([&](Part part) {
      with_source(from[part].dtype, [&](auto source) {
        using S = decltype(source);
        if constexpr (IntegerFormat<F>)
          pack_quantized<F, S>(layout, part, from[part], quantize, blob);
        else if constexpr (F::scale_block != 0 && !std::is_same_v<S, SourceE4m3>)
          refuse("the ", F::name, " layout packs float8_e4m3fn weights with scales; quantise the others first (pack_experts does)");
        else
          Packer<F, S>(layout, part, from[part]).pack(blob);
      });
    });
  });
}

void pack_codes(const ExpertLayout& layout, const Parts<Codes>& from, uint8_t* blob) {
  CHECK(layout.book == "linear", "codes of ", format_name(layout.format), layout.book.empty() ? "" : " in " + layout.book,
        " cannot be packed as they are; those of INT4 under the linear books can");
  each_part([&](Part part) { place_codes(layout, part, from[part], blob); });
  std::memset(blob + layout.scales_offset, 0, layout.blob_bytes - layout.scales_offset);
  store_scales(std::vector<int>(layout.hidden), column_scales(layout, Part::kGate, blob));
  store_scales(std::vector<int>(layout.intermediate), column_scales(layout, Part::kDown, blob));
}

void dequantize_matrix(const ExpertLayout& layout, Part part, const uint8_t* blob, float* out) {
  with_format(layout.format, [&](auto f) { dequantize<decltype(f)>(layout, part, blob, out); });
}

}  // namespace hetero
