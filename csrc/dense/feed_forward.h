// The feed-forward part around the routed experts, for few rows: norm, router, and the dense MLP or shared expert.
// model/moe.py and ops.route say what is computed.
#pragma once
#include "dense/workspace.h"

namespace hetero {

struct RouterShape {
  int64_t topk, groups, topk_groups;
  bool normalise;
  float scale;
};

struct FeedForwardWeights {
  const float* norm;
  float norm_eps;
  Matrix gate_up;     // [2 * intermediate][hidden]
  Matrix down;        // [hidden][intermediate]
  Matrix router;      // [experts][hidden]; none in a dense layer
  const float* bias;  // [experts]
};

class FeedForward {
 public:
  FeedForward(const FeedForwardWeights& weights, const RouterShape& router) : w_(weights), r_(router) {}
  bool routes() const { return w_.router.rows > 0; }
  int64_t topk() const { return r_.topk; }

  // normed [rows][hidden] = RMS(x); with a router ids and weights [rows][topk], best first; and the MLP's hidden part,
  // which end() takes from the workspace.
  void begin(Workspace& space, Floats x, int64_t rows, Floats normed, int64_t* ids, float* weights) const;
  // x += MLP(RMS(x)) + routed; routed null: nothing.
  void end(Workspace& space, Floats x, int64_t rows, const float* routed) const;

 private:
  void route(float* logits, int64_t* ids, float* weights) const;

  const FeedForwardWeights w_;
  const RouterShape r_;
};

}  // namespace hetero
