#include "dense/attention.h"

#include <cmath>

#include "base/bf16.h"
#include "dense/attend.h"

namespace hetero {
namespace {

constexpr int64_t kMixed = 8;  // rows of a task at most

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

}  // namespace

void Attention::forward(const AttentionCall& call) const {
  auto& [space, step, x, latents, index] = call;
  const int64_t rows = step.attending();
  step.make_rotation();
  const Floats projected = project(call, rows > 0 ? w_.down.rows : keys_width());
  write(call, projected);
  if (rows == 0) return;

  const Floats q_latent = projected.from(keys_width());
  for (int64_t t = 0; t < rows; t++) space.kernels().rms_norm({q_latent[t], w_.q_norm, s_.q_lora, s_.latent_eps, q_latent[t]});
  if (s_.index_heads > 0 && step.any_long()) choose(call, q_latent, q_latent.from(s_.q_lora));
  step.check_chosen();

  const Floats heads = space.heads.shape(rows, s_.heads * s_.v);
  mix(call, absorb(call, q_latent), heads);
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

void Attention::choose(const AttentionCall& call, Floats q_latent, Floats head_weights) const {
  Workspace& space = call.space;
  Step& step = call.step;
  const int64_t rows = step.attending();
  const Floats q = space.index_queries.shape(rows, s_.index_heads * s_.index_dim);
  multiply(space, w_.index_q, q_latent, rows, q);
  const float scale = 1 / std::sqrt(static_cast<float>(s_.index_dim * s_.index_heads));
  for (int64_t t = 0; t < rows; t++)
    for (int64_t h = 0; h < s_.index_heads; h++) {
      step.turn(t, q[t] + h * s_.index_dim);
      head_weights[t][h] *= scale;
    }
  select(space, step, call.index, {q, s_.index_heads}, head_weights);
}

// Queries over cached keys, [rows][heads * (latent + rope)].
Floats Attention::absorb(const AttentionCall& call, Floats q_latent) const {
  Workspace& space = call.space;
  const int64_t rows = call.step.attending(), of_head = s_.nope + s_.rope, width = s_.latent + s_.rope;
  const Floats absorbed = space.queries.shape(rows, s_.heads * width);
  const Inputs inputs = inputs_for(space, w_.q_b, q_latent, rows);
  space.pool.threads.for_each(s_.heads, [&](int worker, int64_t h) {
    const Floats q = space.workers[worker].queries.shape(rows, of_head), out = absorbed.from(h * width);
    inputs.multiply(space.kernels(), w_.q_b, h * of_head, of_head, q);
    space.kernels().mix({w_.w_uk.from(h * s_.nope), s_.nope, s_.latent, q.data, q.stride, rows, out.data, out.stride});
    for (int64_t t = 0; t < rows; t++) {
      std::copy_n(q[t] + s_.nope, s_.rope, out[t] + s_.latent);
      call.step.turn(t, out[t] + s_.latent);
    }
  });
  return absorbed;
}

// out [rows][heads * v]. A task is some rows, or some heads of one.
void Attention::mix(const AttentionCall& call, Floats queries, Floats out) const {
  Workspace& space = call.space;
  const int64_t rows = call.step.attending(), wanted = 2 * space.pool.threads.threads(), width = s_.latent + s_.rope;
  const int64_t of_task = std::clamp<int64_t>(rows / wanted, 1, kMixed), blocks = ceil_div(rows, of_task);
  const int64_t parts = std::min(s_.heads, ceil_div(wanted, blocks)), of_part = ceil_div(s_.heads, parts);
  space.pool.threads.for_each(blocks * parts, [&](int worker, int64_t task) {
    WorkerRows& scratch = space.workers[worker];
    const int64_t begin = task / parts * of_task, end = std::min(begin + of_task, rows);
    const int64_t first = task % parts * of_part, heads = std::min(of_part, s_.heads - first);
    if (heads <= 0) return;
    const Floats mixed = scratch.mixed.shape((end - begin) * heads, s_.latent);
    for (int64_t t = begin; t < end; t++)
      attend_row(space.kernels(), call.step, call.latents, scratch.scores, s_.scale, t, heads, queries[t] + first * width,
                 {mixed[(t - begin) * heads], s_.latent});
    for (int64_t h = 0; h < heads; h++) {
      const RowMatrix values = w_.w_uv.from((first + h) * s_.v);
      float* to = out[begin] + (first + h) * s_.v;
      space.kernels().dot({values, s_.v, s_.latent, mixed[h], false, heads * s_.latent, end - begin, to, out.stride, false});
    }
  });
}

}  // namespace hetero
