// NUMA nodes and cores, read from sysfs and cut to the CPUs this process may use. Nodes keep their kernel ids, which may
// have gaps; nodes without a usable CPU (memory only, or outside the cpuset) are left out. A machine whose kernel shows no
// nodes is one node 0. Sub-NUMA clusters are simply more nodes.
#pragma once
#include <string>
#include <vector>

namespace hetero {

struct NumaNode {
  int id;
  std::vector<int> cpus;            // usable ones, ascending
  std::vector<int> physical_cores;  // the first usable CPU of each core, ascending
};

std::vector<int> usable_cpus();  // of the calling thread
// root: where sysfs is mounted (tests pass a fixture tree). Throws if no CPU of `usable` is found under it.
std::vector<NumaNode> read_topology(const std::string& root, const std::vector<int>& usable);
std::vector<int> physical_cores(const std::vector<NumaNode>& nodes);
// "0-3,8" -> 0 1 2 3 8
std::vector<int> parse_cpu_list(const std::string& text);

}  // namespace hetero
