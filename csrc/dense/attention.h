// Absorbed multi-head latent attention with its indexer and the norm before it, for few rows: x += Attention(RMS(x)).
// model/attention.py and model/indexer.py say what is computed.
#pragma once
#include "dense/keys.h"
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

struct AttentionCall {
  Workspace& space;
  Step& step;
  Floats x;     // [rows][hidden]
  Keys latents, index;
};

class Attention {
 public:
  Attention(const AttentionShape& shape, const AttentionWeights& weights) : s_(shape), w_(weights) {}

  // x += attention, of the rows that attend; all rows' keys are written to the caches.
  void forward(const AttentionCall& call) const;

 private:
  int64_t keys_width() const { return s_.latent + s_.rope + s_.index_dim; }
  Floats project(const AttentionCall& call, int64_t rows_of_down) const;
  void write(const AttentionCall& call, Floats projected) const;
  void choose(const AttentionCall& call, Floats q_latent, Floats head_weights) const;
  Floats absorb(const AttentionCall& call, Floats q_latent) const;
  Floats values(const AttentionCall& call, Floats mixed) const;
  template <class Work> void for_each_part(ThreadPool& threads, int64_t width, Work work) const;

  const AttentionShape s_;
  const AttentionWeights w_;
};

}  // namespace hetero
