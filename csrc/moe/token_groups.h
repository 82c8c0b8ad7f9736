// Which rows each expert computes: a counting sort of the (token, slot) pairs of one call by expert. Within an expert the
// pairs keep the order of tokens, then slots, so the order in which a token's experts are added up (ascending expert, then
// slot) depends on nothing but the token's own row. An expert's rows are cut into panels small enough for scratch.
#pragma once
#include <cstdint>
#include <vector>

namespace hetero {

struct Routing {  // of one call: [tokens, slots]
  const void* ids;  // int32, or int64 if wide; -1 = not on this tier
  bool wide;
  const float* weights;
  int64_t tokens, slots;

  int64_t id(int64_t at) const { return wide ? static_cast<const int64_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at]; }
};

struct Panel {
  int expert;
  int first, rows;  // into the sorted pairs
};

class TokenGroups {
 public:
  static constexpr int kPanelRows = 128;

  // resident[e]: whether expert e may be asked for. Throws naming token, id and limit otherwise. Allocates only to grow.
  void sort(const Routing& routing, const std::vector<bool>& resident);

  const std::vector<Panel>& panels() const { return panels_; }  // by expert, ascending
  int64_t rows() const { return static_cast<int64_t>(tokens_.size()); }
  const int32_t* tokens(const Panel& panel) const { return tokens_.data() + panel.first; }
  const float* weights(const Panel& panel) const { return weights_.data() + panel.first; }

 private:
  std::vector<int> next_;  // per expert: where its next pair goes
  std::vector<int32_t> tokens_;
  std::vector<float> weights_;
  std::vector<Panel> panels_;
};

}  // namespace hetero
