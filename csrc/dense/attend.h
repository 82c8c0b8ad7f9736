// What rows see of the cached keys: an indexer's choice among them, and attention over them.
#pragma once
#include "dense/keys.h"
#include "dense/step.h"
#include "dense/workspace.h"

namespace hetero {

struct Queries {  // [rows][heads][keys' width]
  Floats of;
  int64_t heads;
};

// Sets step.chosen of the long rows: the positions with the highest sum over heads of weight * relu(query . key), of equal
// ones the first. weights [rows][heads].
void select(Workspace& space, Step& step, const Keys& keys, const Queries& queries, Floats weights);

// out [rows * heads][latent]: for each row and head the first columns of the keys that the row attends to, mixed by
// softmax(scale * query . key).
void attend(Workspace& space, const Step& step, const Keys& keys, const Queries& queries, float scale, Floats out);

}  // namespace hetero
