#include <optional>

#include "bindings/bindings.h"
#include "cpu/arena.h"
#include "format/formats.h"
#include "format/layout.h"
#include "format/pack.h"
#include "kernel/kernel_table.h"
#include "moe/expert_weights.h"

namespace hetero {
namespace {

constexpr const char* kPartNames[] = {"gate", "up", "down"};

// Where weight k of a row's 4 bytes of a line is stored, by k.
std::vector<int> code_order(const ExpertLayout& layout) {
  return with_format(layout.format, [](auto f) {
    std::vector<int> order;
    for (int k = 0; k < f.line_k; k++) order.push_back(f.place(k));
    return order;
  });
}

std::vector<int> books(const ExpertLayout& layout) {
  std::vector<int> values;
  if (const uint8_t* entries = layout.gate.quantization.books)
    for (int i = 0; i < kBooks * kBookEntries; i++) values.push_back(entries[i] - 128);
  return values;
}

int part_index(int part) {
  CHECK(part >= 0 && part < 3, "part ", part, " is not 0 (gate), 1 (up) or 2 (down)");
  return part;
}

SourceMatrix checked_source(const ExpertLayout& layout, int part, const py::array& source, const std::string& dtype,
                            const std::optional<py::array>& scales) {
  const char* name = kPartNames[part];
  const MatrixLayout& m = layout.matrix(static_cast<ExpertLayout::Part>(part));
  const Source from = source_named(dtype);
  check_array<uint8_t>(name, source, {-1, -1});
  const int64_t rows = source.shape(0), cols = source.shape(1) / source_bytes(from);
  CHECK(rows == m.rows && cols == m.cols, name, " has shape [", rows, ", ", cols, "], must be [", m.rows, ", ", m.cols, "]");
  const auto blocks = [](int64_t n) { return (n + kScaleBlock - 1) / kScaleBlock; };
  SourceMatrix matrix{source.data(), from, nullptr};
  if (scales) {
    check_array<float>((std::string(name) + " scales").c_str(), *scales, {blocks(m.rows), blocks(m.cols)});
    matrix.scales = static_cast<const float*>(scales->data());
  }
  return matrix;
}

void pack(const ExpertLayout& layout, py::array& blob, const Parts<py::array>& sources, const Parts<std::string>& dtypes,
          const Parts<std::optional<py::array>>& scales) {
  check_array<uint8_t>("blob", blob, {layout.blob_bytes});
  Parts<SourceMatrix> from;
  for (int part = 0; part < 3; part++) from[part] = checked_source(layout, part, sources[part], dtypes[part], scales[part]);
  auto* out = writable<uint8_t>("blob", blob);
  const Quantize quantize = select_kernels(nullptr).formats[static_cast<int>(layout.format)].quantize;
  py::gil_scoped_release release;
  pack_expert(layout, from, quantize, out);
}

void pack_given(const ExpertLayout& layout, py::array& blob, const Parts<py::array>& codes, const Parts<py::array>& scales) {
  check_array<uint8_t>("blob", blob, {layout.blob_bytes});
  Parts<Codes> from;
  for (int part = 0; part < 3; part++) {
    const std::string name = kPartNames[part];
    const MatrixLayout& m = layout.matrix(static_cast<ExpertLayout::Part>(part));
    check_array<uint8_t>((name + " codes").c_str(), codes[part], {m.rows, (m.cols + 7) / 8 * 4});
    check_array<int16_t>((name + " scales").c_str(), scales[part], {m.rows, m.scale_cols});
    from[part] = {static_cast<const uint8_t*>(codes[part].data()), static_cast<const uint16_t*>(scales[part].data())};
  }
  auto* out = writable<uint8_t>("blob", blob);
  py::gil_scoped_release release;
  pack_codes(layout, from, out);
}

void dequantize(const ExpertLayout& layout, const py::array& blob, int part, py::array& out) {
  const MatrixLayout& m = layout.matrix(static_cast<ExpertLayout::Part>(part_index(part)));
  check_array<uint8_t>("blob", blob, {layout.blob_bytes});
  check_array<float>("out", out, {m.rows, m.cols});
  const auto* from = static_cast<const uint8_t*>(blob.data());
  auto* to = writable<float>("out", out);
  py::gil_scoped_release release;
  dequantize_matrix(layout, static_cast<ExpertLayout::Part>(part), from, to);
}

std::vector<int> resident_ids(const ExpertWeights& weights) {
  std::vector<int> ids;
  for (int e = 0; e < weights.experts(); e++)
    if (weights.resident()[e]) ids.push_back(e);
  return ids;
}

py::array blob_view(const py::object& self, int expert) {
  const auto& weights = self.cast<const ExpertWeights&>();
  return py::array_t<uint8_t>({weights.layout().blob_bytes}, weights.blob(expert), self);
}

py::list pieces(const py::object& self, int expert) {
  py::list found;
  for (const Piece& piece : self.cast<const ExpertWeights&>().pieces(expert))
    if (piece.bytes > 0) found.append(py::make_tuple(piece.offset, py::array_t<uint8_t>({piece.bytes}, piece.memory, self)));
  return found;
}

py::list memory(const py::object& self) {
  py::list found;
  for (const Shard& shard : self.cast<const ExpertWeights&>().shards())
    if (shard.memory.bytes() > 0) found.append(py::array_t<uint8_t>({shard.memory.bytes()}, shard.memory.data(), self));
  return found;
}

void write_expert(const ExpertWeights& weights, int expert, const py::array& blob) {
  check_array<uint8_t>("blob", blob, {weights.layout().blob_bytes});
  const auto* from = static_cast<const uint8_t*>(blob.data());
  py::gil_scoped_release release;
  weights.write(expert, from);
}

void read_expert(const ExpertWeights& weights, int expert, py::array& blob) {
  check_array<uint8_t>("blob", blob, {weights.layout().blob_bytes});
  auto* to = writable<uint8_t>("blob", blob);
  py::gil_scoped_release release;
  weights.read(expert, to);
}

void map_blob(const ExpertWeights& weights, int expert, int file, int64_t offset) {
  map_file(weights.blob(expert), weights.layout().blob_bytes, file, offset);
}

}  // namespace

void bind_weights(py::module_& m) {
  m.attr("LAYOUT_VERSION") = kLayoutVersion;
  m.attr("TILE_ROWS") = kTileRows;
  m.attr("BLOB_ALIGN") = kBlobAlign;
  m.attr("FP8_BLOCK") = kScaleBlock;
  m.attr("BOOK_ENTRIES") = kBookEntries;
  m.attr("INT4_EXTREMES") = std::vector<float>(std::begin(kExtremes), std::end(kExtremes));
  m.attr("INT4_REFINEMENTS") = kRefinements;
  m.def("formats", &format_names);

  py::class_<MatrixLayout>(m, "MatrixLayout")
      .def_readonly("rows", &MatrixLayout::rows)
      .def_readonly("cols", &MatrixLayout::cols)
      .def_readonly("tiles", &MatrixLayout::tiles)
      .def_readonly("lines", &MatrixLayout::lines)
      .def_readonly("scale_cols", &MatrixLayout::scale_cols)
      .def_readonly("scale_offset", &MatrixLayout::scale_offset)
      .def_readonly("choice_offset", &MatrixLayout::choice_offset)
      .def_readonly("tile_bytes", &MatrixLayout::tile_bytes);
  py::class_<ExpertLayout>(m, "ExpertLayout")
      .def(py::init([](const std::string& method, int64_t hidden, int64_t intermediate, int group, const std::string& book) {
             return ExpertLayout(format_named(method), hidden, intermediate, group, book);
           }), py::arg("method"), py::arg("hidden"), py::arg("intermediate"), py::arg("group") = 0, py::arg("book") = "")
      .def_property_readonly("method", [](const ExpertLayout& l) { return format_name(l.format); })
      .def_readonly("book", &ExpertLayout::book)
      .def_property_readonly("group", [](const ExpertLayout& l) { return l.gate.quantization.group; })
      .def_property_readonly("books", &books, "INT4's four books of 16 entries, one after the other; empty otherwise")
      .def_readonly("hidden", &ExpertLayout::hidden)
      .def_readonly("intermediate", &ExpertLayout::intermediate)
      .def_readonly("gate", &ExpertLayout::gate)
      .def_readonly("down", &ExpertLayout::down)
      .def_readonly("down_offset", &ExpertLayout::down_offset)
      .def_readonly("scales_offset", &ExpertLayout::scales_offset)
      .def_readonly("scales_bytes", &ExpertLayout::scales_bytes)
      .def_readonly("blob_bytes", &ExpertLayout::blob_bytes)
      .def_property_readonly("code_order", &code_order, "where weight k of a row's 4 bytes of a line is stored, by k");
  m.def("pack", &pack, py::arg("layout"), py::arg("blob"), py::arg("sources"), py::arg("dtypes"), py::arg("scales"));
  m.def("pack_codes", &pack_given, py::arg("layout"), py::arg("blob"), py::arg("codes"), py::arg("scales"));
  m.def("dequantize", &dequantize, py::arg("layout"), py::arg("blob"), py::arg("part"), py::arg("out"));

  py::class_<ExpertWeights, std::shared_ptr<ExpertWeights>>(m, "ExpertWeights")
      .def(py::init([](const ExpertLayout& layout, int experts, const std::vector<int>& resident, const std::vector<int>& nodes) {
             return std::make_shared<ExpertWeights>(layout, experts, resident, nodes);
           }), py::arg("layout"), py::arg("experts"), py::arg("resident"), py::arg("nodes") = std::vector<int>())
      .def_property_readonly("resident", &resident_ids)
      .def_property_readonly("shards", [](const ExpertWeights& w) { return w.shards().size(); })
      .def("blob", &blob_view, "The memory of an expert that is not divided.")
      .def("pieces", &pieces, "[(offset in the blob, the memory)] of an expert, whether or not it is divided.")
      .def_property_readonly("memory", &memory, "All of it, one array for each shard.")
      .def("write", &write_expert, py::arg("expert"), py::arg("blob"))
      .def("read", &read_expert, py::arg("expert"), py::arg("blob"))
      .def("map", &map_blob, py::arg("expert"), py::arg("file"), py::arg("offset"),
           "Shows an open file's bytes from `offset` as the expert's blob; earlier views of it see them too.");
}

}  // namespace hetero
