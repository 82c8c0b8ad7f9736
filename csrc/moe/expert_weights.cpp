#include "moe/expert_weights.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/round.h"
#include "cpu/topology.h"

namespace hetero {
namespace {

using Layout = ExpertLayout;

std::vector<int> all_nodes() {
  std::vector<int> ids;
  for (const NumaNode& node : this_machine()) ids.push_back(node.id);
  return ids.size() > 1 ? ids : std::vector<int>();
}

}  // namespace

TileRange TileRange::part(int64_t i, int64_t n, int64_t unit) const {
  const int64_t units = (size() + unit - 1) / unit;
  return {begin + std::min(units * i / n * unit, size()), begin + std::min(units * (i + 1) / n * unit, size())};
}

ExpertWeights::ExpertWeights(const ExpertLayout& layout, int experts, const std::vector<int>& resident,
                             const std::vector<int>& nodes)
    : layout_(layout) {
  CHECK(experts >= 1, "a layer has at least one expert, not ", experts);
  slot_.assign(experts, -1);
  resident_.assign(experts, false);
  int slots = 0;
  for (int expert : resident) {
    CHECK(expert >= 0 && expert < experts, "resident expert ", expert, " is outside 0..", experts - 1);
    CHECK(!resident_[expert], "expert ", expert, " is listed as resident twice");
    slot_[expert] = slots++;
    resident_[expert] = true;
  }
  const auto count = std::max<int64_t>(1, static_cast<int64_t>(nodes.size()));
  for (int64_t s = 0; s < count; s++) {
    const TileRange pairs = TileRange{0, layout.gate.tiles}.part(s, count, pairs_unit());
    const TileRange down = TileRange{0, layout.down.tiles}.part(s, count, 1);
    const int64_t down_offset = pairs.size() * layout.tile_stride(Layout::kGate);
    const int64_t scales_offset = down_offset + down.size() * layout.tile_stride(Layout::kDown);
    const int64_t bytes = round_up(scales_offset + layout.scales_bytes, kBlobAlign);
    shards_.push_back({pairs, down, down_offset, scales_offset, bytes,
                       Arena(slots * bytes, nodes.empty() ? all_nodes() : std::vector{nodes[s]})});
  }
}

void ExpertWeights::check_resident(int expert) const {
  CHECK(expert >= 0 && expert < experts() && resident_[expert], "expert ", expert, " of ", experts(), " is not resident here");
}

std::vector<Piece> ExpertWeights::pieces(int expert) const {
  check_resident(expert);
  if (shards_.size() == 1) return {{start(shards_.front(), expert), 0, layout_.blob_bytes}};
  const int64_t pair = layout_.tile_stride(Layout::kGate), down = layout_.tile_stride(Layout::kDown);
  std::vector<Piece> found;
  for (const Shard& shard : shards_) {
    uint8_t* memory = start(shard, expert);
    found.push_back({memory, shard.pairs.begin * pair, shard.down_offset});
    found.push_back({memory + shard.down_offset, layout_.down_offset + shard.down.begin * down, shard.down.size() * down});
    found.push_back({memory + shard.scales_offset, layout_.scales_offset, layout_.scales_bytes});
  }
  return found;
}

void ExpertWeights::write(int expert, const uint8_t* blob) const {
  for (const Piece& piece : pieces(expert)) std::memcpy(piece.memory, blob + piece.offset, piece.bytes);
}

void ExpertWeights::read(int expert, uint8_t* blob) const {
  std::memset(blob + layout_.blob_bytes - kBlobAlign, 0, kBlobAlign);  // the padding lies there
  for (const Piece& piece : pieces(expert)) std::memcpy(blob + piece.offset, piece.memory, piece.bytes);
}

uint8_t* ExpertWeights::blob(int expert) const {
  check_resident(expert);
  CHECK(shards_.size() == 1, "an expert divided over ", shards_.size(), " NUMA nodes is no single piece of memory");
  return start(shards_.front(), expert);
}

}  // namespace hetero
