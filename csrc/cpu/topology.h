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

// Threads that work together on what one node holds.
struct ThreadGroup {
  int node;               // kAnyNode: they belong to no node
  std::vector<int> cpus;  // one for each thread; kAnyCpu: it is not pinned
};
inline constexpr int kAnyNode = -1, kAnyCpu = -1, kMostThreads = 4096;

std::vector<int> usable_cpus();  // of the calling thread
// root: where sysfs is mounted (tests pass a fixture tree). Throws if no CPU of `usable` is found under it.
std::vector<NumaNode> read_topology(const std::string& root, const std::vector<int>& usable);
std::vector<NumaNode> this_machine();
std::vector<int> physical_cores(const std::vector<NumaNode>& nodes);

// One group for each of `ids`, or a single one over all nodes if there are none. `threads` are dealt out evenly, but no
// node gets more than it has physical cores, and each thread gets a core of its own; 0 = as many threads as cores. With
// more threads than cores none is pinned. A node listed twice shares its cores between two groups. Throws on an unknown
// node, on fewer threads than groups and on more than kMostThreads.
std::vector<ThreadGroup> group_threads(const std::vector<NumaNode>& nodes, const std::vector<int>& ids, int threads);

// "0-3,8" -> 0 1 2 3 8
std::vector<int> parse_cpu_list(const std::string& text);

}  // namespace hetero
