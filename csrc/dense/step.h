// The rows of a step: where their keys go, what they see, how they are turned, and the positions that the latest indexer
// chose for them.
#pragma once
#include <cstdint>
#include <vector>

#include "base/check.h"

namespace hetero {

struct Run {  // rows of one sequence, its last; `context`: the cache slots of its positions, from 0 on
  int64_t rows;
  const int64_t* context;
};

class Step {
 public:
  // positions, slots: of each row. Of rows beyond the runs' only the keys are cached.
  Step(std::vector<int64_t> positions, std::vector<int64_t> slots, const std::vector<Run>& runs, int64_t rope,
       double theta, int64_t topk);

  int64_t rows() const { return static_cast<int64_t>(slots.size()); }
  int64_t attending() const { return attending_; }  // the runs' rows, the first
  bool is_long(int64_t row) const { return seen[row] > topk; }  // an indexer chooses for it
  bool any_long() const { return any_long_; }
  int64_t attended(int64_t row) const { return is_long(row) ? topk : seen[row]; }
  const int64_t* attended_slots(int64_t row) const { return is_long(row) ? chosen.data() + row * topk : contexts[row]; }

  void check_chosen() const {
    CHECK(!any_long_ || !chosen.empty(), "a row sees more than ", topk, " positions, and no indexer has chosen");
  }

  // Rotates neighbouring pairs of x [rope] by the row's angles; after make_rotation().
  void turn(int64_t row, float* x) const;
  void make_rotation();

  const int64_t rope, topk;
  const std::vector<int64_t> positions, slots;
  std::vector<const int64_t*> contexts;
  std::vector<int64_t> seen;     // positions that each row sees
  std::vector<int64_t> chosen;   // [rows][topk] slots, of long rows; empty until an indexer chooses

 private:
  std::vector<float> rotation_;  // [rows][rope]: cosine and sine of each pair; empty until it is made
  const double theta_;
  int64_t attending_ = 0;
  bool any_long_ = false;
};

}  // namespace hetero
