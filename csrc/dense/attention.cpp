#include "dense/attention.h"

#include <cmath>
#include <functional>
#include <limits>

#include "base/bf16.h"
#include "base/check.h"

namespace hetero {
namespace {

constexpr int64_t kScored = 512;  // positions that a task scores

void store_key(const Keys& keys, int64_t slot, const float* x) {
  if (keys.bf16) {
    uint16_t* to = static_cast<uint16_t*>(keys.data) + slot * keys.width;
    for (int64_t i = 0; i < keys.width; i++) to[i] = float_to_bf16(x[i]);
  } else {
    std::copy_n(x, keys.width, static_cast<float*>(keys.data) + slot * keys.width);
  }
}

void layer_norm(float* x, int64_t count, const float* weight, const float* bias, float eps) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < count; i++) sum += x[i];
  const double mean = sum / static_cast<double>(count);
  for (int64_t i = 0; i < count; i++) squares += (x[i] - mean) * (x[i] - mean);
  const auto inverse = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(count) + eps));
  for (int64_t i = 0; i < count; i++) x[i] = (x[i] - static_cast<float>(mean)) * inverse * weight[i] + bias[i];
}

// The `wanted` positions of the highest scores, of equal ones the first, as slots; `rank` is room for `count` floats.
void best_slots(const float* scores, int64_t count, int64_t wanted, const int64_t* context, float* rank, int64_t* out) {
  std::copy_n(scores, count, rank);
  std::nth_element(rank, rank + wanted - 1, rank + count, std::greater<>());
  const float least = rank[wanted - 1];
  int64_t ties = wanted - std::count_if(scores, scores + count, [&](float score) { return score > least; });
  for (int64_t i = 0; i < count; i++)
    if (scores[i] > least || (scores[i] == least && ties-- > 0)) *out++ = context[i];
}

}  // namespace

void Attention::forward(const AttentionCall& call) const {
  auto& [space, step, x, latents, index] = call;
  ThreadPool& threads = space.pool.threads;
  const int64_t rows = step.attending(), width = s_.nope + s_.rope;
  const Floats projected = project(call, rows > 0 ? w_.down.rows : keys_width());
  write(call, projected);
  if (rows == 0) return;

  const Floats q_latent = projected.from(keys_width());
  for (int64_t t = 0; t < rows; t++) space.kernels().rms_norm({q_latent[t], w_.q_norm, s_.q_lora, s_.latent_eps, q_latent[t]});
  const Floats q = space.queries.shape(rows, s_.heads * width);
  multiply(space, w_.q_b, q_latent, rows, q);
  if (s_.index_heads > 0 && step.any_long()) select(call, q_latent, q_latent.from(s_.q_lora));
  CHECK(!step.any_long() || !step.chosen.empty(), "a row sees more than ", step.topk, " positions, and no indexer has chosen");

  const Floats heads = space.heads.shape(rows, s_.heads * s_.v);
  const int64_t parts = std::min<int64_t>(s_.heads, ceil_div(2 * threads.threads(), rows)), of_part = ceil_div(s_.heads, parts);
  threads.for_each(rows * parts, [&](int worker, int64_t task) {
    const int64_t row = task / parts, first = task % parts * of_part, count = std::min(of_part, s_.heads - first);
    if (count > 0) attend(call, space.workers[worker], row, first, count, q[row] + first * width, heads[row] + first * s_.v);
  });
  multiply(space, w_.o, heads, rows, x, true);
}

// The first rows of `down` times RMS(x).
Floats Attention::project(const AttentionCall& call, int64_t rows_of_down) const {
  Workspace& space = call.space;
  const int64_t rows = call.step.rows(), hidden = w_.down.cols;
  const Floats normed = space.normed.shape(rows, hidden), projected = space.projected.shape(rows, w_.down.rows);
  for (int64_t t = 0; t < rows; t++) space.kernels().rms_norm({call.x[t], w_.input_norm, hidden, s_.norm_eps, normed[t]});
  multiply(space, {w_.down.data, w_.down.bf16, rows_of_down, hidden}, normed, rows, projected);
  return projected;
}

// Turns what was projected into keys, in place, and caches them.
void Attention::write(const AttentionCall& call, Floats projected) const {
  const Step& step = call.step;
  for (int64_t t = 0; t < step.rows(); t++) {
    float *latent = projected[t], *key = latent + s_.latent + s_.rope;
    call.space.kernels().rms_norm({latent, w_.kv_norm, s_.latent, s_.latent_eps, latent});
    step.turn(t, latent + s_.latent);
    store_key(call.latents, step.slots[t], latent);
    if (s_.index_heads == 0) continue;
    layer_norm(key, s_.index_dim, w_.index_norm, w_.index_bias, s_.index_eps);
    step.turn(t, key);
    store_key(call.index, step.slots[t], key);
  }
}

// Sets step.chosen of the long rows.
void Attention::select(const AttentionCall& call, Floats q_latent, Floats head_weights) const {
  Workspace& space = call.space;
  Step& step = call.step;
  const int64_t rows = step.attending(), most = *std::max_element(step.seen.begin(), step.seen.end());
  step.chosen.resize(rows * step.topk);
  const Floats q = space.index_queries.shape(rows, s_.index_heads * s_.index_dim);
  multiply(space, w_.index_q, q_latent, rows, q);
  for (int64_t t = 0; t < rows; t++)
    for (int64_t h = 0; h < s_.index_heads; h++) step.turn(t, q[t] + h * s_.index_dim);

  const float scale = 1 / std::sqrt(static_cast<float>(s_.index_dim * s_.index_heads));
  const Floats scores = space.index_scores.shape(2 * rows, most);  // and room to rank them
  const int64_t parts = ceil_div(most, kScored);
  space.pool.threads.for_each(rows * parts, [&](int worker, int64_t task) {
    const int64_t t = task / parts, begin = task % parts * kScored, count = std::min(kScored, step.seen[t] - begin);
    if (!step.is_long(t) || count <= 0) return;
    const Floats dots = space.workers[worker].scores.shape(s_.index_heads, kScored);
    const RowMatrix keys = call.index.at(step.contexts[t] + begin);
    space.kernels().dot({keys, count, s_.index_dim, q[t], false, s_.index_dim, s_.index_heads, dots.data, dots.stride, false});
    float* sums = scores[t] + begin;
    std::fill_n(sums, count, 0.f);
    for (int64_t h = 0; h < s_.index_heads; h++) {
      const float weight = head_weights[t][h] * scale, *dot = dots[h];
      for (int64_t i = 0; i < count; i++) sums[i] += weight * (dot[i] > 0 ? dot[i] : 0);
    }
    for (int64_t i = 0; i < count; i++)
      if (std::isnan(sums[i])) sums[i] = -std::numeric_limits<float>::infinity();
  });
  space.pool.threads.for_each(rows, [&](int, int64_t t) {
    if (!step.is_long(t)) return;
    best_slots(scores[t], step.seen[t], step.topk, step.contexts[t], scores[rows + t], &step.chosen[t * step.topk]);
  });
}

// Some heads of a row: q [heads][nope + rope] -> out [heads][v].
void Attention::attend(const AttentionCall& call, WorkerRows& scratch, int64_t row, int64_t first, int64_t heads, const float* q,
                       float* out) const {
  const Step& step = call.step;
  const RowKernels& kernels = call.space.kernels();
  const int64_t seen = step.attended(row), width = s_.latent + s_.rope;
  const RowMatrix keys = call.latents.at(step.attended_slots(row));
  const Floats absorbed = scratch.queries.shape(heads, width), scores = scratch.scores.shape(heads, round_up(seen, kLanes));
  const Floats mixed = scratch.mixed.shape(heads, s_.latent);
  for (int64_t h = 0; h < heads; h++, q += s_.nope + s_.rope) {
    kernels.mix({w_.w_uk.from((first + h) * s_.nope), s_.nope, s_.latent, q, 0, 1, absorbed[h], 0});
    std::copy_n(q + s_.nope, s_.rope, absorbed[h] + s_.latent);
    step.turn(row, absorbed[h] + s_.latent);
  }
  kernels.dot({keys, seen, width, absorbed.data, false, width, heads, scores.data, scores.stride, false});
  for (int64_t h = 0; h < heads; h++) kernels.softmax(scores[h], seen, s_.scale);
  kernels.mix({keys, seen, s_.latent, scores.data, scores.stride, heads, mixed.data, mixed.stride});
  for (int64_t h = 0; h < heads; h++)
    kernels.dot({w_.w_uv.from((first + h) * s_.v), s_.v, s_.latent, mixed[h], false, 0, 1, out + h * s_.v, 0, false});
}

}  // namespace hetero
