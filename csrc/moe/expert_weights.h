// The packed experts of one layer that live in host memory, divided by output rows over NUMA nodes: each node's shard holds
// the same ranges of tiles of every resident expert. A range ends where a job's smallest piece of work ends, so a piece reads
// one node's memory, no sum crosses shards, and results do not depend on their number. Whoever writes an expert while a call
// reads it gets what he asked for: the caller keeps the two apart.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/arena.h"
#include "format/layout.h"

namespace hetero {

struct TileRange {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
  // Part i of n parts that differ by one `unit` of tiles at most.
  TileRange part(int64_t i, int64_t n, int64_t unit) const;
};

// An expert's bytes here: its pairs of gate and up tiles, its down tiles and all column scales, as in the blob, up to a
// multiple of 4096 bytes. An only shard is the blob.
struct Shard {
  TileRange pairs, down;
  int64_t down_offset, scales_offset, bytes;  // of one expert
  Arena memory;
};

// Bytes of an expert as they lie here, and where in its blob they belong.
struct Piece {
  uint8_t* memory;
  int64_t offset, bytes;
};

class ExpertWeights {
 public:
  // resident: ids in [0, experts), each once. nodes: one shard on each; none = one shard, its pages dealt out to all nodes.
  ExpertWeights(const ExpertLayout& layout, int experts, const std::vector<int>& resident, const std::vector<int>& nodes);

  const ExpertLayout& layout() const { return layout_; }
  int experts() const { return static_cast<int>(slot_.size()); }
  const std::vector<bool>& resident() const { return resident_; }
  const std::vector<Shard>& shards() const { return shards_; }
  int64_t pairs_unit() const { return layout_.hidden_block / kTileRows; }  // pairs of tiles that stay together

  // Tiles of a resident expert, in the shard that holds them.
  const uint8_t* pair(const Shard& shard, int expert, int64_t t) const {
    return start(shard, expert) + (t - shard.pairs.begin) * layout_.tile_stride(ExpertLayout::kGate);
  }
  const uint8_t* down(const Shard& shard, int expert, int64_t t) const {
    return start(shard, expert) + shard.down_offset + (t - shard.down.begin) * layout_.tile_stride(ExpertLayout::kDown);
  }

  // Of the inputs of gate and up, bf16; null where columns have no scales.
  const uint16_t* column_scales(const Shard& shard, int expert) const {
    return layout_.scales_bytes == 0 ? nullptr : reinterpret_cast<const uint16_t*>(start(shard, expert) + shard.scales_offset);
  }

  // What makes up the blob: a single piece if the expert is not divided. Throws if it is not resident, as what follows does.
  std::vector<Piece> pieces(int expert) const;

  // Copies a whole expert.
  void write(int expert, const uint8_t* blob) const;
  void read(int expert, uint8_t* blob) const;
  uint8_t* blob(int expert) const;  // the memory itself; throws if it is divided

 private:
  uint8_t* start(const Shard& shard, int expert) const { return shard.memory.data() + slot_[expert] * shard.bytes; }
  void check_resident(int expert) const;

  ExpertLayout layout_;
  std::vector<int> slot_;  // -1 = not resident
  std::vector<bool> resident_;
  std::vector<Shard> shards_;
};

}  // namespace hetero
