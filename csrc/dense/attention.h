// Absorbed multi-head latent attention with its indexer and the norm before it, for few rows: x += Attention(RMS(x)).
// model/attention.py and model/indexer.py say what is computed; here it is five jobs of the pool.
#pragma once
#include "dense/step.h"
#include "dense/workspace.h"

namespace hetero {

struct AttentionShape {
  int64_t heads, nope, rope, v, latent, q_lora, index_heads, index_dim;  // index_heads 0: no indexer
  float norm_eps, latent_eps, index_eps, scale;
};

struct AttentionWeights {
  const float *input_norm, *q_norm, *kv_norm, *index_norm, *index_bias;
  Matrix down;     // [latent + rope | index_dim | q_lora | index_heads][hidden]
  Matrix q_b;      // [heads * (nope + rope)][q_lora]
  Matrix w_uk;     // [heads * nope][latent]
  Matrix w_uv;     // [heads * v][latent]
  Matrix o;        // [hidden][heads * v]
  Matrix index_q;  // [index_heads * index_dim][q_lora]
};

class Attention {
 public:
  Attention(const AttentionShape& shape, const AttentionWeights& weights) : s_(shape), w_(weights) {}

  // x [rows][hidden] += attention; the rows' keys are written to the caches.
  void forward(HostPool& pool, Workspace& space, Step& step, Floats x, const Keys& latents, const Keys& index) const;
  // Only writes the keys.
  void remember(HostPool& pool, Workspace& space, const Step& step, Floats x, const Keys& latents, const Keys& index) const;

 private:
  int64_t keys_width() const { return s_.latent + s_.rope + s_.index_dim; }
  Floats project(HostPool& pool, Workspace& space, const Step& step, Floats x, int64_t rows_of_down) const;
  void write(const KernelTable& kernels, const Step& step, Floats projected, const Keys& latents, const Keys& index) const;
  void select(HostPool& pool, Workspace& space, Step& step, Floats q_latent, Floats head_weights, const Keys& index) const;
  void attend(const KernelTable& kernels, WorkerRows& scratch, const Step& step, int64_t row, int64_t first, int64_t heads,
              const float* q, const Keys& latents, float* out) const;

  const AttentionShape s_;
  const AttentionWeights w_;
};

}  // namespace hetero
