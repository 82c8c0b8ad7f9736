// The packed experts of one layer that live in host memory: one arena, one blob per resident expert. Whoever writes a blob
// while a call reads it gets what he asked for: the caller keeps the two apart.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/arena.h"
#include "format/layout.h"

namespace hetero {

class ExpertWeights {
 public:
  // resident: ids in [0, experts), each once. nodes: NUMA nodes to spread the memory over.
  ExpertWeights(const ExpertLayout& layout, int experts, const std::vector<int>& resident, const std::vector<int>& nodes);

  const ExpertLayout& layout() const { return layout_; }
  int experts() const { return static_cast<int>(slot_.size()); }
  const std::vector<bool>& resident() const { return resident_; }
  uint8_t* blob(int expert) const;  // throws if not resident

 private:
  ExpertLayout layout_;
  std::vector<int> slot_;  // -1 = not resident
  std::vector<bool> resident_;
  Arena arena_;
};

}  // namespace hetero
