#include "dense/attention.h"

#include <cmath>

#include "dense/attend.h"

namespace hetero {
namespace {

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

  const Floats mixed = space.mixed.shape(rows * s_.heads, s_.latent);
  const Queries queries{absorb(call, q_latent), s_.heads};
  attend(space, step, latents, queries, s_.scale, mixed);
  multiply(space, w_.o, values(call, mixed), rows, x, true);
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
    call.latents.store(step.slots[t], latent);
    if (s_.index_heads == 0) continue;
    layer_norm(key, s_.index_dim, w_.index_norm, w_.index_bias, s_.index_eps);
    step.turn(t, key);
    call.index.store(step.slots[t], key);
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

// Calls work(head, first, count) on the pool for every head's `width` columns, all at once if there are heads enough.
template <class Work> void Attention::for_each_part(ThreadPool& threads, int64_t width, Work work) const {
  const int64_t parts = ceil_div(2 * threads.threads(), s_.heads), of_part = round_up(ceil_div(width, parts), kLanes);
  const int64_t of_head = ceil_div(width, of_part);
  threads.for_each(s_.heads * of_head, [&](int, int64_t task) {
    const int64_t first = task % of_head * of_part;
    work(task / of_head, first, std::min(of_part, width - first));
  });
}

// Queries over cached keys, [rows][heads * (latent + rope)]. A task is a head, or some of the latent's columns.
Floats Attention::absorb(const AttentionCall& call, Floats q_latent) const {
  Workspace& space = call.space;
  const int64_t rows = call.step.attending(), of_head = s_.nope + s_.rope, width = s_.latent + s_.rope;
  const Floats q = space.queries.shape(rows, s_.heads * of_head), absorbed = space.absorbed.shape(rows, s_.heads * width);
  multiply(space, w_.q_b, q_latent, rows, q);
  for_each_part(space.pool.threads, s_.latent, [&](int64_t h, int64_t first, int64_t count) {
    const Floats from = q.from(h * of_head), to = absorbed.from(h * width);
    RowMatrix w_uk = w_.w_uk.from(h * s_.nope);
    w_uk.data = static_cast<const char*>(w_uk.data) + first * (w_uk.bf16 ? 2 : 4);
    space.kernels().mix({w_uk, s_.nope, count, from.data, from.stride, rows, to.data + first, to.stride});
    for (int64_t t = 0; t < rows && first == 0; t++) {
      std::copy_n(from[t] + s_.nope, s_.rope, to[t] + s_.latent);
      call.step.turn(t, to[t] + s_.latent);
    }
  });
  return absorbed;
}

// W_UV times what was mixed: [rows][heads * v]. A task is a head, or some of its values.
Floats Attention::values(const AttentionCall& call, Floats mixed) const {
  Workspace& space = call.space;
  const int64_t rows = call.step.attending(), stride = s_.heads * s_.latent;
  const Floats out = space.heads.shape(rows, s_.heads * s_.v);
  for_each_part(space.pool.threads, s_.v, [&](int64_t h, int64_t first, int64_t count) {
    float* to = out.data + h * s_.v + first;
    space.kernels().dot({w_.w_uv.from(h * s_.v + first), count, s_.latent, mixed[h], false, stride, rows, to, out.stride, false});
  });
  return out;
}

}  // namespace hetero
