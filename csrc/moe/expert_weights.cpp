#include "moe/expert_weights.h"

#include "base/check.h"

namespace hetero {

ExpertWeights::ExpertWeights(const ExpertLayout& layout, int experts, const std::vector<int>& resident,
                             const std::vector<int>& nodes)
    : layout_(layout) {
  CHECK(experts >= 1, "a layer has at least one expert, not ", experts);
  slot_.assign(experts, -1);
  resident_.assign(experts, false);
  int slots = 0;
  for (int expert : resident) {
    CHECK(expert >= 0 && expert < experts, "resident expert ", expert, " is outside 0..", experts - 1);
    CHECK(!resident_[expert], "expert ", expert, " is listed as resident twice");
    slot_[expert] = slots++;
    resident_[expert] = true;
  }
  arena_ = Arena(slots * layout.blob_bytes, nodes);
}

uint8_t* ExpertWeights::blob(int expert) const {
  CHECK(expert >= 0 && expert < experts() && resident_[expert], "expert ", expert, " of ", experts(), " is not resident here");
  return arena_.data() + slot_[expert] * layout_.blob_bytes;
}

}  // namespace hetero
