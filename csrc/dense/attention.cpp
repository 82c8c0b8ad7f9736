#include "dense/attention.h"

#include <cmath>

#include "base/bf16.h"
#include "dense/attend.h"

namespace hetero {
namespace {

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
  ThreadPool& threads = space.pool.threads;
  const int64_t rows = step.attending(), width = s_.nope + s_.rope;
  step.make_rotation();
  const Floats projected = project(call, rows > 0 ? w_.down.rows : keys_width());
  write(call, projected);
  if (rows == 0) return;

  const Floats q_latent = projected.from(keys_width());
  for (int64_t t = 0; t < rows; t++) space.kernels().rms_norm({q_latent[t], w_.q_norm, s_.q_lora, s_.latent_eps, q_latent[t]});
  const Floats q = space.queries.shape(rows, s_.heads * width);
  multiply(space, w_.q_b, q_latent, rows, q);
  if (s_.index_heads > 0 && step.any_long()) choose(call, q_latent, q_latent.from(s_.q_lora));
  step.check_chosen();

  const Floats heads = space.heads.shape(rows, s_.heads * s_.v);
  const int64_t parts = std::min<int64_t>(s_.heads, ceil_div(2 * threads.threads(), rows)), of_part = ceil_div(s_.heads, parts);
  threads.for_each(rows * parts, [&](int worker, int64_t task) {
    const int64_t row = task / parts, first = task % parts * of_part, count = std::min(of_part, s_.heads - first);
    if (count > 0) mix(call, space.workers[worker], row, first, count, q[row] + first * width, heads[row] + first * s_.v);
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

// Some heads of a row: q [heads][nope + rope] -> out [heads][v].
void Attention::mix(const AttentionCall& call, WorkerRows& scratch, int64_t row, int64_t first, int64_t heads, const float* q,
                    float* out) const {
  const RowKernels& kernels = call.space.kernels();
  const int64_t width = s_.latent + s_.rope;
  const Floats absorbed = scratch.queries.shape(heads, width), mixed = scratch.mixed.shape(heads, s_.latent);
  for (int64_t h = 0; h < heads; h++, q += s_.nope + s_.rope) {
    kernels.mix({w_.w_uk.from((first + h) * s_.nope), s_.nope, s_.latent, q, 0, 1, absorbed[h], 0});
    std::copy_n(q + s_.nope, s_.rope, absorbed[h] + s_.latent);
    call.step.turn(row, absorbed[h] + s_.latent);
  }
  attend_row(kernels, call.step, call.latents, scratch.scores, s_.scale, row, heads, absorbed.data, mixed);
  for (int64_t h = 0; h < heads; h++)
    kernels.dot({w_.w_uv.from((first + h) * s_.v), s_.v, s_.latent, mixed[h], false, 0, 1, out + h * s_.v, 0, false});
}

}  // namespace hetero
