#include "moe/token_groups.h"

#include <limits>

#include "base/check.h"

namespace hetero {

void TokenGroups::sort(const Routing& routing, const std::vector<bool>& resident) {
  const auto experts = static_cast<int64_t>(resident.size());
  const int64_t pairs = routing.tokens * routing.slots;
  CHECK(pairs <= std::numeric_limits<int>::max(), routing.tokens, " tokens x ", routing.slots, " experts: too many for one call");

  next_.assign(experts, 0);
  for (int64_t i = 0; i < pairs; i++) {
    const int64_t id = routing.id(i);
    if (id == -1) continue;
    const int64_t token = i / routing.slots;
    CHECK(id >= 0 && id < experts, "token ", token, " asks for expert ", id, "; ids are -1 (not here) to ", experts - 1);
    CHECK(resident[id], "token ", token, " asks for expert ", id, " of ", experts, ", which is not resident on this tier");
    next_[id]++;
  }

  panels_.clear();
  int total = 0;
  for (int64_t e = 0; e < experts; e++) {
    const int rows = next_[e], count = (rows + kPanelRows - 1) / kPanelRows;
    next_[e] = total;
    for (int p = 0; p < count; p++) {
      const int begin = static_cast<int>(int64_t{rows} * p / count), end = static_cast<int>(int64_t{rows} * (p + 1) / count);
      panels_.push_back({static_cast<int>(e), total + begin, end - begin});
    }
    total += rows;
  }

  tokens_.resize(total);
  weights_.resize(total);
  for (int64_t i = 0; i < pairs; i++) {
    const int64_t id = routing.id(i);
    if (id == -1) continue;
    const int at = next_[id]++;
    tokens_[at] = static_cast<int32_t>(i / routing.slots);
    weights_[at] = routing.weights[i];
  }
}

}  // namespace hetero
