#include "moe/moe_layer.h"

#include <algorithm>

#include "base/round.h"

namespace hetero {
namespace {

using Layout = ExpertLayout;

// Tiles of a task: long runs of one expert's memory, since each begins with misses, and down's hidden rows are read once a run.
constexpr int64_t kPairs = 16;  // gate/up tile pairs
constexpr int64_t kDownTiles = 16;
constexpr int64_t kTasksPerThread = 4;

// Units of a task: `wanted`, or fewer where threads would get less than kTasksPerThread tasks each. A job ends with its last
// task: if there are one and a half for each thread, half of the threads idle for a third of the time, and if there is one,
// all wait for whoever began late.
int64_t task_size(int64_t units, int64_t wanted, int64_t threads) {
  return std::clamp<int64_t>(units / (threads * kTasksPerThread), 1, wanted);
}

}  // namespace

void MoeLayer::forward(const MoeCall& call) const {
  if (call.routing.tokens == 0) return;
  std::lock_guard turn(pool_->turn);
  pool_->groups.sort(call.routing, weights_->resident());
  const Layout& layout = weights_->layout();
  const int64_t pairs = pool_->groups.rows(), panel_rows = std::min<int64_t>(TokenGroups::kPanelRows, pairs);
  pool_->hidden.reserve(pairs * layout.down.words);
  for (WorkerScratch& worker : pool_->workers) {
    worker.activations.reserve(panel_rows * layout.gate.words);
    worker.packed_panel = -1;
    worker.sums.reserve(2 * panel_rows * kTileRows);
    worker.products.reserve(panel_rows * layout.hidden_block);
  }
  const FormatKernels& kernels = pool_->kernels.formats[static_cast<int>(layout.format)];
  gate_up(call, kernels);
  down(call, kernels);
}

void MoeLayer::gate_up(const MoeCall& call, const FormatKernels& kernels) const {
  const Layout& layout = weights_->layout();
  const MatrixLayout& m = layout.gate;
  const TokenGroups& groups = pool_->groups;
  const auto& panels = groups.panels();
  const auto& shards = weights_->shards();
  const int64_t unit = weights_->pairs_unit(), units = ceil_div(m.tiles, unit), count = panels.size();
  const int64_t per_task = task_size(units * count, ceil_div(kPairs, unit), pool_->threads.threads());
  const int64_t parts = ceil_div(units, shards.size() * per_task);  // of a shard's tiles of a panel's expert

  pool_->threads.for_each(shards.size() * count * parts, [&](int worker, int64_t task) {
    const Shard& shard = shards[task / (count * parts)];
    const TileRange tiles = shard.pairs.part(task % parts, parts, unit);
    if (tiles.size() == 0) return;
    const int64_t p = task / parts % count;
    const Panel& panel = panels[p];
    WorkerScratch& scratch = pool_->workers[worker];
    uint32_t* x = scratch.activations.data();
    if (scratch.packed_panel != p)
      kernels.pack({call.x, call.x_is_bf16, groups.tokens(panel), panel.rows, m.cols, 0, m.cols,
                    weights_->column_scales(shard, panel.expert), &m, x});
    scratch.packed_panel = p;

    float *gate = scratch.sums.data(), *up = gate + panel.rows * kTileRows;
    float* products = scratch.products.data();
    uint32_t* hidden = pool_->hidden.data() + panel.first * layout.down.words;
    for (int64_t t = tiles.begin; t < tiles.end; t++) {
      const uint8_t* tile = weights_->pair(shard, panel.expert, t);
      const uint8_t* next = t + 1 < shard.pairs.end ? tile + layout.tile_stride(Layout::kGate)
                            : p + 1 < count         ? weights_->pair(shard, panels[p + 1].expert, shard.pairs.begin)
                                                    : nullptr;
      kernels.gemm({tile, &m, x, panel.rows, gate, nullptr});
      kernels.gemm({tile + m.tile_bytes, &m, x, panel.rows, up, next});
      pool_->kernels.silu_mul({gate, up, panel.rows, products + t % unit * kTileRows, layout.hidden_block});
      if ((t + 1) % unit != 0 && t + 1 != tiles.end) continue;
      const int64_t begin = t / unit * layout.hidden_block, end = std::min(begin + layout.hidden_block, m.rows);
      kernels.pack({products, false, nullptr, panel.rows, layout.hidden_block, begin, end, nullptr, &layout.down, hidden});
    }
  });
}

void MoeLayer::down(const MoeCall& call, const FormatKernels& kernels) const {
  const MatrixLayout& m = weights_->layout().down;
  const TokenGroups& groups = pool_->groups;
  const auto& panels = groups.panels();
  const auto& shards = weights_->shards();
  const int64_t parts = ceil_div(m.tiles, shards.size() * task_size(m.tiles, kDownTiles, pool_->threads.threads()));

  pool_->threads.for_each(shards.size() * parts, [&](int worker, int64_t task) {
    const Shard& shard = shards[task / parts];
    const TileRange tiles = shard.down.part(task % parts, parts, 1);
    if (tiles.size() == 0) return;
    const int64_t column = tiles.begin * kTileRows, columns = std::min(tiles.end * kTileRows, m.rows) - column;
    for (int64_t t = 0; t < call.routing.tokens; t++) std::fill_n(call.y + t * m.rows + column, columns, 0.f);

    float* sums = pool_->workers[worker].sums.data();
    for (size_t p = 0; p < panels.size(); p++) {
      const Panel& panel = panels[p];
      const uint32_t* x = pool_->hidden.data() + panel.first * m.words;
      for (int64_t t = tiles.begin; t < tiles.end; t++) {
        const uint8_t* next = t + 1 < tiles.end     ? weights_->down(shard, panel.expert, t + 1)
                              : p + 1 < panels.size() ? weights_->down(shard, panels[p + 1].expert, tiles.begin)
                                                      : nullptr;
        kernels.gemm({weights_->down(shard, panel.expert, t), &m, x, panel.rows, sums, next});
        const int cols = static_cast<int>(std::min<int64_t>(kTileRows, m.rows - t * kTileRows));
        pool_->kernels.add_rows({sums, panel.rows, groups.tokens(panel), groups.weights(panel), call.y + t * kTileRows, m.rows, cols});
      }
    }
  });
}

}  // namespace hetero
