#include "moe/moe_layer.h"

#include <algorithm>

namespace hetero {
namespace {

using Layout = ExpertLayout;


constexpr int64_t kPairsPerTask = 16;   // gate/up tile pairs: long runs, since each begins with misses
constexpr int64_t kFewTiles = 16;       // down tiles of a task while reading weights dominates
constexpr int64_t kManyTiles = 16;      // ... while re-reading hidden rows would
constexpr int64_t kManyRowsPerExpert = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tasks of `wanted` units, or smaller ones where a small model would leave threads without any.
int64_t task_size(int64_t units, int64_t wanted, int64_t threads) { return std::clamp<int64_t>(units / threads, 1, wanted); }

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
  const int64_t block = layout.hidden_block / kTileRows;  // tile pairs that are packed together
  const int64_t per_task = block * task_size(ceil_div(m.tiles, block) * panels.size(), ceil_div(kPairsPerTask, block), pool_->threads.threads());
  const int64_t per_panel = ceil_div(m.tiles, per_task);

  pool_->threads.for_each(per_panel * panels.size(), [&](int worker, int64_t task) {
    const int64_t p = task / per_panel, first = task % per_panel * per_task;
    const Panel& panel = panels[p];
    WorkerScratch& scratch = pool_->workers[worker];
    uint32_t* x = scratch.activations.data();
    if (scratch.packed_panel != p)
      kernels.pack({call.x, call.x_is_bf16, groups.tokens(panel), panel.rows, m.cols, 0, m.cols, &m, x});
    scratch.packed_panel = p;

    float *gate = scratch.sums.data(), *up = gate + panel.rows * kTileRows;
    float* products = scratch.products.data();
    uint32_t* hidden = pool_->hidden.data() + panel.first * layout.down.words;
    const uint8_t* blob = weights_->blob(panel.expert);
    for (int64_t t = first, last = std::min(first + per_task, m.tiles); t < last; t++) {
      const uint8_t* tile = blob + t * layout.tile_stride(Layout::kGate);
      const uint8_t* next = t + 1 < m.tiles ? tile + layout.tile_stride(Layout::kGate)
                            : p + 1 < static_cast<int64_t>(panels.size()) ? weights_->blob(panels[p + 1].expert) : nullptr;
      kernels.gemm({tile, &m, x, panel.rows, gate, nullptr});
      kernels.gemm({tile + m.tile_bytes, &m, x, panel.rows, up, next});
      pool_->kernels.silu_mul({gate, up, panel.rows, products + t % block * kTileRows, layout.hidden_block});
      if ((t + 1) % block != 0 && t + 1 != last) continue;
      const int64_t begin = t / block * layout.hidden_block, end = std::min(begin + layout.hidden_block, m.rows);
      kernels.pack({products, false, nullptr, panel.rows, layout.hidden_block, begin, end, &layout.down, hidden});
    }
  });
}

void MoeLayer::down(const MoeCall& call, const FormatKernels& kernels) const {
  const Layout& layout = weights_->layout();
  const MatrixLayout& m = layout.down;
  const TokenGroups& groups = pool_->groups;
  const auto& panels = groups.panels();
  const bool many_rows = groups.rows() > kManyRowsPerExpert * static_cast<int64_t>(panels.size());
  const int64_t per_task = task_size(m.tiles, many_rows ? kManyTiles : kFewTiles, pool_->threads.threads());

  pool_->threads.for_each(ceil_div(m.tiles, per_task), [&](int worker, int64_t task) {
    const int64_t first = task * per_task, last = std::min(first + per_task, m.tiles);
    const int64_t column = first * kTileRows, columns = std::min(last * kTileRows, m.rows) - column;
    for (int64_t t = 0; t < call.routing.tokens; t++) std::fill_n(call.y + t * m.rows + column, columns, 0.f);

    float* sums = pool_->workers[worker].sums.data();
    for (size_t p = 0; p < panels.size(); p++) {
      const Panel& panel = panels[p];
      const auto first_tile = [&](size_t of) {
        return weights_->blob(panels[of].expert) + layout.first_tile(Layout::kDown) + first * m.tile_bytes;
      };
      const uint8_t* tiles = first_tile(p) - first * m.tile_bytes;
      const uint32_t* x = pool_->hidden.data() + panel.first * m.words;
      for (int64_t t = first; t < last; t++) {
        const uint8_t* next = t + 1 < last ? tiles + (t + 1) * m.tile_bytes : p + 1 < panels.size() ? first_tile(p + 1) : nullptr;
        kernels.gemm({tiles + t * m.tile_bytes, &m, x, panel.rows, sums, next});
        const int cols = static_cast<int>(std::min<int64_t>(kTileRows, m.rows - t * kTileRows));
        pool_->kernels.add_rows({sums, panel.rows, groups.tokens(panel), groups.weights(panel), call.y + t * kTileRows, m.rows, cols});
      }
    }
  });
}

}  // namespace hetero
