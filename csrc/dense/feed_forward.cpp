#include "dense/feed_forward.h"

#include <cmath>
#include <limits>

namespace hetero {
namespace {

constexpr float kLeast = -std::numeric_limits<float>::infinity();

// The places of the `wanted` greatest of `count` values, best first; a taken one becomes -inf. No value is NaN.
void take_best(float* values, int64_t count, int64_t wanted, int64_t* places) {
  for (int64_t k = 0; k < wanted; k++) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; i++) {
      bool taken = false;
      for (int64_t j = 0; j < k && !(values[i] > kLeast); j++) taken = taken || places[j] == i;
      if (!taken && (best < 0 || values[i] > values[best])) best = i;
    }
    places[k] = best;
    values[best] = kLeast;
  }
}

}  // namespace

void FeedForward::begin(Workspace& space, Floats x, int64_t rows, Floats normed, int64_t* ids, float* weights) const {
  const int64_t hidden = w_.gate_up.cols, intermediate = w_.down.cols, experts = w_.router.rows;
  const int64_t padded = round_up(intermediate, kTileRows);  // silu_mul takes whole tiles
  for (int64_t t = 0; t < rows; t++) space.kernels().rms_norm({x[t], w_.norm, hidden, w_.norm_eps, normed[t]});

  const Floats gate = space.hidden.shape(rows, 2 * padded), up = gate.from(padded), logits = space.projected.shape(rows, experts);
  const int64_t of_task = round_up(product_rows(2 * intermediate + experts, space.pool.threads.threads()) / 2, kTileRows);
  const int64_t mlp = ceil_div(intermediate, of_task), routing = ceil_div(experts, of_task);
  const Inputs wide{normed.data, false, normed.stride, rows}, inputs = inputs_for(space, w_.gate_up, normed, rows);
  space.pool.threads.for_each(routing + mlp, [&](int, int64_t task) {
    if (task < routing) {
      const int64_t first = task * of_task;
      return wide.multiply(space.kernels(), w_.router, first, std::min(of_task, experts - first), logits.from(first));
    }
    const int64_t first = (task - routing) * of_task, count = std::min(of_task, intermediate - first);
    inputs.multiply(space.kernels(), w_.gate_up, first, count, gate.from(first));
    inputs.multiply(space.kernels(), w_.gate_up, intermediate + first, count, up.from(first));
    for (int64_t t = 0; t < rows; t++)
      for (int64_t i = first; i < first + count; i += kTileRows)
        space.pool.kernels.silu_mul({gate[t] + i, up[t] + i, 1, gate[t] + i, kTileRows});
  });
  if (!routes()) return;
  for (int64_t t = 0; t < rows; t++) route(logits[t], ids + t * r_.topk, weights + t * r_.topk);
}

void FeedForward::route(float* logits, int64_t* ids, float* weights) const {
  const int64_t experts = w_.router.rows, of_group = experts / r_.groups;
  std::vector<float> gates(logits, logits + experts), choice(experts);
  for (int64_t e = 0; e < experts; e++) {
    gates[e] = 1 / (1 + std::exp(-gates[e]));
    choice[e] = std::isnan(gates[e]) ? kLeast : gates[e] + w_.bias[e];
  }
  if (r_.groups > 1) {
    std::vector<float> group(r_.groups), dropped(experts, kLeast), values(of_group);
    std::vector<int64_t> best(r_.topk_groups);
    for (int64_t g = 0; g < r_.groups; g++) {
      int64_t two[2];
      std::copy_n(&choice[g * of_group], of_group, values.data());
      take_best(values.data(), of_group, 2, two);
      group[g] = choice[g * of_group + two[0]] + choice[g * of_group + two[1]];
    }
    take_best(group.data(), r_.groups, r_.topk_groups, best.data());
    for (const int64_t g : best) std::copy_n(&choice[g * of_group], of_group, &dropped[g * of_group]);
    choice = dropped;
  }
  take_best(choice.data(), experts, r_.topk, ids);
  float sum = 0;
  for (int64_t k = 0; k < r_.topk; k++) sum += weights[k] = gates[ids[k]];
  const float factor = r_.normalise ? r_.scale / (sum + 1e-20f) : r_.scale;
  for (int64_t k = 0; k < r_.topk; k++) weights[k] *= factor;
}

void FeedForward::end(Workspace& space, Floats x, int64_t rows, const float* routed) const {
  const int64_t hidden = w_.down.rows, padded = round_up(w_.down.cols, kTileRows);
  const Floats product = space.hidden.shape(rows, 2 * padded);
  const Inputs inputs = inputs_for(space, w_.down, product, rows);
  const int64_t of_task = product_rows(hidden, space.pool.threads.threads());
  space.pool.threads.for_each(ceil_div(hidden, of_task), [&](int, int64_t task) {
    const int64_t first = task * of_task, count = std::min(of_task, hidden - first);
    if (routed != nullptr)
      for (int64_t t = 0; t < rows; t++)
        for (int64_t i = first; i < first + count; i++) x[t][i] += routed[t * hidden + i];
    inputs.multiply(space.kernels(), w_.down, first, count, x.from(first), true);
  });
}

}  // namespace hetero
