#include "dense/attend.h"

#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "base/bits.h"

namespace hetero {
namespace {

constexpr int64_t kScored = 512;  // positions that a task scores
constexpr int64_t kRanked = 64;   // rows whose scores are held at once
constexpr int64_t kTogether = 4;  // rows of a sequence that a task scores
constexpr int64_t kDecoded = 8192, kDecodedByTask = 64;  // keys, of rows that attend together

// A score's place among kBuckets, the higher the higher: its sign, exponent and first three digits.
constexpr int64_t kBuckets = 1 << 12;
int64_t bucket_of(float score) {
  const uint32_t bits = as_bits(score + 0.f);  // -0 is 0
  return (bits >> 31 ? ~bits : bits | 1u << 31) >> 20;
}

// The `wanted` positions of the highest scores, of equal ones the first, as slots; `rank` is room for `count` floats. Only
// the bucket with the least of them is ranked.
void best_slots(const float* scores, int64_t count, int64_t wanted, const int64_t* context, float* rank, int64_t* out) {
  std::array<int32_t, kBuckets> sizes{};
  for (int64_t i = 0; i < count; i++) sizes[bucket_of(scores[i])]++;
  int64_t bucket = kBuckets - 1, ties = wanted;
  for (; sizes[bucket] < ties; bucket--) ties -= sizes[bucket];
  float* end = std::copy_if(scores, scores + count, rank, [&](float score) { return bucket_of(score) == bucket; });
  std::nth_element(rank, rank + ties - 1, end, std::greater<>());
  const float least = rank[ties - 1];
  ties -= std::count_if(rank, end, [&](float score) { return score > least; });
  for (int64_t i = 0; i < count; i++)
    if (scores[i] > least || (scores[i] == least && ties-- > 0)) *out++ = context[i];
}

// Rows [first, last) of one sequence.
struct Neighbours {
  int64_t first, last;
};

std::vector<Neighbours> neighbours(const Step& step, int64_t first, int64_t last) {
  std::vector<Neighbours> found;
  for (int64_t t = first; t < last; t++) {
    const bool goes_on = t > first && step.contexts[t] == step.contexts[t - 1];
    if (goes_on && t - found.back().first < kTogether) found.back().last++;
    else found.push_back({t, t + 1});
  }
  return found;
}

// Decodes the keys that rows from `first` on attend to, each sequence's once, as many as there is room for. Row first + i
// finds its own from row begins[i] of space.decoded on. Returns the row after the last.
int64_t decode_attended(Workspace& space, const Step& step, const Keys& keys, int64_t first, std::vector<int64_t>& begins) {
  std::vector<int64_t> slots;
  int64_t row = first;
  begins.clear();
  for (; row < step.attending(); row++) {
    const int64_t* wanted = step.attended_slots(row);
    const auto begun = static_cast<int64_t>(slots.size()), count = step.attended(row);
    if (row > first && wanted == step.attended_slots(row - 1)) {
      begins.push_back(begins.back());  // it sees more of the same
    } else {
      if (row > first && begun + count > kDecoded) break;
      begins.push_back(begun);
    }
    slots.insert(slots.end(), wanted + (begun - begins.back()), wanted + count);
  }
  const auto count = static_cast<int64_t>(slots.size());
  const Floats decoded = space.decoded.shape(count, keys.width);
  space.pool.threads.for_each(ceil_div(count, kDecodedByTask), [&](int, int64_t task) {
    const int64_t end = std::min((task + 1) * kDecodedByTask, count);
    for (int64_t i = task * kDecodedByTask; i < end; i++) keys.decode(space.kernels(), slots[i], decoded[i]);
  });
  return row;
}

struct Attending {
  Workspace& space;
  const Step& step;
  const Queries& queries;
  int64_t width;
  float scale;
  Floats out;

  // Of rows [first, last), whose keys are keys_of(row).
  template <class KeysOf> void attend(int64_t first, int64_t last, KeysOf keys_of) const {
    const RowKernels& kernels = space.kernels();
    const int64_t wanted = 2 * space.pool.threads.threads(), latent = out.stride;
    const int64_t parts = std::min(queries.heads, ceil_div(wanted, last - first)), of_part = ceil_div(queries.heads, parts);
    space.pool.threads.for_each((last - first) * parts, [&](int worker, int64_t task) {
      const int64_t row = first + task / parts, head = task % parts * of_part, heads = std::min(of_part, queries.heads - head);
      if (heads <= 0) return;
      const int64_t seen = step.attended(row);
      const RowMatrix keys = keys_of(row);
      const Floats scores = space.workers[worker].shape(heads, round_up(seen, kLanes));
      const float* q = queries.of[row] + head * width;
      kernels.dot({keys, seen, width, q, false, width, heads, scores.data, scores.stride, false});
      for (int64_t h = 0; h < heads; h++) kernels.softmax(scores[h], seen, scale);
      float* mixed = out[row * queries.heads + head];
      kernels.mix({keys, seen, latent, scores.data, scores.stride, heads, mixed, latent});
    });
  }
};

}  // namespace

void select(Workspace& space, Step& step, const Keys& keys, const Queries& queries, Floats weights) {
  const int64_t heads = queries.heads, width = keys.width;
  step.chosen.resize(step.attending() * step.topk);
  for (int64_t first = 0; first < step.attending(); first += kRanked) {
    const int64_t rows = std::min(kRanked, step.attending() - first);
    const std::vector<Neighbours> sequences = neighbours(step, first, first + rows);
    const int64_t most = *std::max_element(&step.seen[first], &step.seen[first] + rows), parts = ceil_div(most, kScored);
    const Floats scores = space.index_scores.shape(2 * rows, most);  // and room to rank them
    space.pool.threads.for_each(static_cast<int64_t>(sequences.size()) * parts, [&](int worker, int64_t task) {
      const Neighbours of = sequences[task / parts];
      const int64_t begin = task % parts * kScored, block = std::min(kScored, step.seen[of.last - 1] - begin);
      if (!step.is_long(of.last - 1) || block <= 0) return;
      const Floats dots = space.workers[worker].shape(heads + (keys.plain() ? 0 : width), kScored), decoded{dots[heads], width};
      RowMatrix scored = keys.at(step.contexts[of.first] + begin);
      if (!keys.plain()) {
        for (int64_t i = 0; i < block; i++) keys.decode(space.kernels(), scored.at[i], decoded[i]);
        scored = {decoded.data, false, width, nullptr};
      }
      for (int64_t t = of.first; t < of.last; t++) {
        const int64_t count = std::min(block, step.seen[t] - begin);
        if (!step.is_long(t) || count <= 0) continue;
        space.kernels().dot({scored, count, width, queries.of[t], false, width, heads, dots.data, dots.stride, false});
        float* sums = scores[t - first] + begin;
        std::fill_n(sums, count, 0.f);
        for (int64_t h = 0; h < heads; h++) {
          const float weight = weights[t][h], *dot = dots[h];
          for (int64_t i = 0; i < count; i++) sums[i] += weight * (dot[i] > 0 ? dot[i] : 0);
        }
        for (int64_t i = 0; i < count; i++)
          if (std::isnan(sums[i])) sums[i] = -std::numeric_limits<float>::infinity();
      }
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
  const Attending call{space, step, queries, keys.width, scale, out};
  if (keys.plain()) {
    call.attend(0, step.attending(), [&](int64_t row) { return keys.at(step.attended_slots(row)); });
    return;
  }
  std::vector<int64_t> begins;
  for (int64_t first = 0, last; first < step.attending(); first = last) {
    last = decode_attended(space, step, keys, first, begins);
    const auto decoded = [&](int64_t row) {
      return RowMatrix{space.decoded.data() + begins[row - first] * keys.width, false, keys.width, nullptr};
    };
    call.attend(first, last, decoded);
  }
}

}  // namespace hetero
