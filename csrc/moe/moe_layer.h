// The routed experts of one MoE layer on the host:
//
//   y[t] = sum over (e, w) routed to t of  w * down_e( silu(gate_e x_t) * up_e x_t )          fp32 sums
//
// Two fork-joins. Job 1, over (panel of an expert's rows, a few tile pairs): gate and up, SiLU and product -> hidden, packed
// (and quantised) there and then for job 2. Job 2, over a few tiles of y: a worker owns these columns for all tokens
// and adds every expert's part in ascending order of expert, so y needs no reduction and no row depends on its batch mates
// or on the number of threads. Both jobs stream an expert's tiles in the order of memory, and both have the same number of
// tasks for each shard of the weights, one shard after the other: a pool with a group of threads for each shard's node then
// begins with tasks whose weights are near. A panel's hidden rows are written and read by all.
//
// x is converted to the format's activation type, times the expert's column scales, inside job 1, once per worker and panel.
#pragma once
#include <cstdint>
#include <memory>

#include "moe/expert_weights.h"
#include "moe/host_pool.h"
#include "moe/token_groups.h"

namespace hetero {

struct MoeCall {
  const void* x;  // [tokens, hidden] float, or bf16
  bool x_is_bf16;
  Routing routing;
  float* y;       // [tokens, hidden], overwritten
};

class MoeLayer {
 public:
  MoeLayer(std::shared_ptr<HostPool> pool, std::shared_ptr<const ExpertWeights> weights)
      : pool_(std::move(pool)), weights_(std::move(weights)) {}

  const ExpertWeights& weights() const { return *weights_; }
  HostPool& pool() const { return *pool_; }
  void forward(const MoeCall& call) const;  // throws std::invalid_argument on a bad id, before y is touched

 private:
  void gate_up(const MoeCall& call, const FormatKernels& kernels) const;
  void down(const MoeCall& call, const FormatKernels& kernels) const;

  std::shared_ptr<HostPool> pool_;
  std::shared_ptr<const ExpertWeights> weights_;
};

}  // namespace hetero
