#include "format/pack.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "base/check.h"
#include "base/fp16.h"
#include "format/formats.h"

namespace hetero {
namespace {

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

constexpr int64_t kPackLines = 64;  // lines packed at a time, so that a tile's strided writes stay in L1

template <class F, class S> class Packer {
 public:
  Packer(const ExpertLayout& layout, ExpertLayout::Part part, const SourceMatrix& from)
      : layout_(layout),
        part_(part),
        m_(layout.matrix(part)),
        codes_(static_cast<const Code*>(from.data)),
        scales_(from.scales) {}

  void pack(uint8_t* blob) const {
    for (int64_t t = 0; t < m_.tiles; t++) {
      uint8_t* tile = blob + layout_.first_tile(part_) + t * layout_.tile_stride(part_);
      const int64_t row = t * kTileRows, rows = std::min<int64_t>(kTileRows, m_.rows - row);
      if (rows < kTileRows) std::memset(tile, 0, m_.scale_offset);
      for (int64_t line = 0; line < m_.lines; line += kPackLines)
        for (int64_t r = 0; r < rows; r++) pack_row(row + r, line, std::min(m_.lines, line + kPackLines), tile + r * 4);
      std::memset(tile + m_.scale_offset, 0, m_.tile_bytes - m_.scale_offset);
      if constexpr (F::scale_block != 0)
        std::memcpy(tile + m_.scale_offset, scales_ + row / kScaleBlock * scale_cols_, scale_cols_ * sizeof(float));
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
    if constexpr (kKeepsCodes) {
      return code;
    } else {
      float value = S::decode(code);
      if constexpr (std::is_same_v<S, SourceE4m3>) value *= scales_[row / kScaleBlock * scale_cols_ + col / kScaleBlock];
      return F::encode(value);
    }
  }

  const ExpertLayout& layout_;
  const ExpertLayout::Part part_;
  const MatrixLayout& m_;
  const Code* codes_;
  const float* scales_;
  const int64_t scale_cols_ = (m_.cols + kScaleBlock - 1) / kScaleBlock;
};

// 16 rows of an integer format's tile, from row `lane` on. codes: [column][16], padding included; scales: [group][16].
template <class F> void place_rows(const MatrixLayout& m, const uint8_t* codes, const uint16_t* scales, int64_t lane, uint8_t* tile) {
  if (lane == 0) std::memset(tile, 0, m.tile_bytes);
  for (int64_t k = 0; k < m.lines * F::line_k; k++)
    for (int64_t r = 0; r < kLanes; r++)
      F::put(tile + k / F::line_k * kLineBytes + (lane + r) * 4, static_cast<int>(k % F::line_k), codes[k * kLanes + r]);
  auto* to = reinterpret_cast<uint16_t*>(tile + m.scale_offset) + lane;
  for (int64_t g = 0; g < m.scale_cols; g++) std::copy_n(scales + g * kLanes, kLanes, to + g * kTileRows);
}

// 16 rows as floats, [column][16] with zeros for padding, then quantised, then put in their places.
template <class F, class S> void pack_quantized(const ExpertLayout& layout, ExpertLayout::Part part, const SourceMatrix& from,
                                                Quantize quantize, uint8_t* blob) {
  const MatrixLayout& m = layout.matrix(part);
  const int64_t padded = m.scale_cols * m.quantization.group, scale_cols = (m.cols + kScaleBlock - 1) / kScaleBlock;
  const auto* source = static_cast<const typename S::Code*>(from.data);
  std::vector<float> weights(padded * kLanes);
  std::vector<uint8_t> codes(padded * kLanes);
  std::vector<uint16_t> scales(m.scale_cols * kLanes);
  for (int64_t first = 0; first < m.tiles * kTileRows; first += kLanes) {
    uint8_t* tile = blob + layout.first_tile(part) + first / kTileRows * layout.tile_stride(part);
    const int64_t rows = std::clamp<int64_t>(m.rows - first, 0, kLanes);
    std::fill(weights.begin(), weights.end(), 0.f);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = first + r;
      float poison = 0;
      for (int64_t k = 0; k < m.cols; k++) {
        float value = S::decode(source[row * m.cols + k]);
        if constexpr (std::is_same_v<S, SourceE4m3>) value *= from.scales[row / kScaleBlock * scale_cols + k / kScaleBlock];
        weights[k * kLanes + r] = value;
        poison += value * 0;
      }
      CHECK(poison == 0, "row ", row, " of a matrix holds a weight that is NaN or infinite; ", F::name, " cannot express it");
    }
    quantize({weights.data(), m.scale_cols, m.quantization.group, m.quantization.books, codes.data(), scales.data()});
    place_rows<F>(m, codes.data(), scales.data(), first % kTileRows, tile);
  }
}

template <class F> void dequantize(const ExpertLayout& layout, ExpertLayout::Part part, const uint8_t* blob, float* out) {
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
        value = F::weight(quad, k, scale, m.quantization.books);
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

}  // namespace

Source source_named(const std::string& dtype) {
  if (dtype == "float32") return Source::f32;
  if (dtype == "bfloat16") return Source::bf16;
  if (dtype == "float16") return Source::f16;
  if (dtype == "float8_e4m3fn") return Source::e4m3;
  refuse("weights of dtype ", dtype, " cannot be packed: float32, bfloat16, float16 or float8_e4m3fn can");
}

int64_t source_bytes(Source source) { return source == Source::f32 ? 4 : source == Source::e4m3 ? 1 : 2; }

void pack_matrix(const ExpertLayout& layout, ExpertLayout::Part part, const SourceMatrix& from, Quantize quantize, uint8_t* blob) {
  CHECK((from.dtype == Source::e4m3) == (from.scales != nullptr),
        "float8_e4m3fn weights need their fp32 block scales, other dtypes have none");
  with_format(layout.format, [&](auto format) {
    with_source(from.dtype, [&](auto source) {
      using F = decltype(format);
      using S = decltype(source);
      if constexpr (IntegerFormat<F>)
        pack_quantized<F, S>(layout, part, from, quantize, blob);
      else if constexpr (F::scale_block != 0 && !std::is_same_v<S, SourceE4m3>)
        refuse("the ", F::name, " layout packs float8_e4m3fn weights with scales; quantise the others first (pack_experts does)");
      else
        Packer<F, S>(layout, part, from).pack(blob);
    });
  });
}

void pack_codes(const ExpertLayout& layout, ExpertLayout::Part part, const uint8_t* codes, const uint16_t* scales, uint8_t* blob) {
  CHECK(layout.book == "linear", "codes of ", format_name(layout.format), layout.book.empty() ? "" : " in " + layout.book,
        " cannot be packed as they are; those of INT4 under the linear books can");
  const MatrixLayout& m = layout.matrix(part);
  const int64_t row_bytes = (m.cols + 7) / 8 * 4;
  std::vector<uint8_t> columns(m.lines * Int4::line_k * kLanes);
  std::vector<uint16_t> group_scales(m.scale_cols * kLanes);
  for (int64_t first = 0; first < m.tiles * kTileRows; first += kLanes) {
    uint8_t* tile = blob + layout.first_tile(part) + first / kTileRows * layout.tile_stride(part);
    std::fill(columns.begin(), columns.end(), 8);  // weight 0
    std::fill(group_scales.begin(), group_scales.end(), 0);
    for (int64_t r = 0; r < std::clamp<int64_t>(m.rows - first, 0, kLanes); r++) {
      const uint8_t* row = codes + (first + r) * row_bytes;
      for (int64_t k = 0; k < m.cols; k++) columns[k * kLanes + r] = row[k / 2] >> (k % 2 * 4) & 15;
      for (int64_t g = 0; g < m.scale_cols; g++) group_scales[g * kLanes + r] = scales[(first + r) * m.scale_cols + g];
    }
    place_rows<Int4>(m, columns.data(), group_scales.data(), first % kTileRows, tile);
  }
}

void dequantize_matrix(const ExpertLayout& layout, ExpertLayout::Part part, const uint8_t* blob, float* out) {
  with_format(layout.format, [&](auto f) { dequantize<decltype(f)>(layout, part, blob, out); });
}

}  // namespace hetero
