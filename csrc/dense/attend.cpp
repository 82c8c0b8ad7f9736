#include "dense/attend.h"

#include <cmath>
#include <functional>
#include <limits>

namespace hetero {
namespace {

constexpr int64_t kScored = 512;  // positions that a task scores
constexpr int64_t kRanked = 64;   // rows whose scores are held at once

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

void select(Workspace& space, Step& step, const Keys& keys, const Queries& queries, Floats weights) {
  step.chosen.resize(step.attending() * step.topk);
  for (int64_t first = 0; first < step.attending(); first += kRanked) {
    const int64_t rows = std::min(kRanked, step.attending() - first);
    const int64_t most = *std::max_element(&step.seen[first], &step.seen[first] + rows), parts = ceil_div(most, kScored);
    const Floats scores = space.index_scores.shape(2 * rows, most);  // and room to rank them
    space.pool.threads.for_each(rows * parts, [&](int worker, int64_t task) {
      const int64_t t = first + task / parts, begin = task % parts * kScored, count = std::min(kScored, step.seen[t] - begin);
      if (!step.is_long(t) || count <= 0) return;
      const Floats dots = space.workers[worker].shape(queries.heads, kScored);
      const RowMatrix scored = keys.at(step.contexts[t] + begin);
      space.kernels().dot(
          {scored, count, keys.width, queries.of[t], false, keys.width, queries.heads, dots.data, dots.stride, false});
      float* sums = scores[t - first] + begin;
      std::fill_n(sums, count, 0.f);
      for (int64_t h = 0; h < queries.heads; h++) {
        const float weight = weights[t][h], *dot = dots[h];
        for (int64_t i = 0; i < count; i++) sums[i] += weight * (dot[i] > 0 ? dot[i] : 0);
      }
      for (int64_t i = 0; i < count; i++)
        if (std::isnan(sums[i])) sums[i] = -std::numeric_limits<float>::infinity();
    });
    space.pool.threads.for_each(rows, [&](int, int64_t row) {
      const int64_t t = first + row;
      if (!step.is_long(t)) return;
      best_slots(scores[row], step.seen[t], step.topk, step.contexts[t], scores[rows + row], &step.chosen[t * step.topk]);
    });
  }
}

void attend(Workspace& space, const Step& step, const Keys& keys, const Queries& queries, float scale, Floats out) {
  step.check_chosen();
  const RowKernels& kernels = space.kernels();
  const int64_t rows = step.attending(), wanted = 2 * space.pool.threads.threads(), width = keys.width, latent = out.stride;
  const int64_t parts = std::min(queries.heads, ceil_div(wanted, rows)), of_part = ceil_div(queries.heads, parts);
  space.pool.threads.for_each(rows * parts, [&](int worker, int64_t task) {
    const int64_t row = task / parts, first = task % parts * of_part, heads = std::min(of_part, queries.heads - first);
    if (heads <= 0) return;
    const int64_t seen = step.attended(row);
    const RowMatrix attended = keys.at(step.attended_slots(row));
    const Floats scores = space.workers[worker].shape(heads, round_up(seen, kLanes));
    const float* q = queries.of[row] + first * width;
    kernels.dot({attended, seen, width, q, false, width, heads, scores.data, scores.stride, false});
    for (int64_t h = 0; h < heads; h++) kernels.softmax(scores[h], seen, scale);
    float* mixed = out[row * queries.heads + first];
    kernels.mix({attended, seen, latent, scores.data, scores.stride, heads, mixed, latent});
  });
}

}  // namespace hetero
