#include "cpu/topology.h"

#include <sched.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "base/check.h"

namespace hetero {
namespace {

namespace fs = std::filesystem;

std::string first_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

bool is_number(const std::string& text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
}

// node ids that have a directory, ascending
std::vector<int> node_ids(const fs::path& directory) {
  std::vector<int> ids;
  if (!fs::is_directory(directory)) return ids;
  for (const auto& entry : fs::directory_iterator(directory)) {
    const std::string name = entry.path().filename();
    if (name.starts_with("node") && is_number(name.substr(4))) ids.push_back(std::stoi(name.substr(4)));
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

// The lowest usable CPU that shares cpu's core.
int core_of(const fs::path& cpus, int cpu, const std::set<int>& usable) {
  const fs::path topology = cpus / ("cpu" + std::to_string(cpu)) / "topology";
  std::string siblings = first_line(topology / "thread_siblings_list");
  if (siblings.empty()) siblings = first_line(topology / "core_cpus_list");
  for (int sibling : parse_cpu_list(siblings))
    if (usable.contains(sibling)) return std::min(sibling, cpu);
  return cpu;
}

NumaNode make_node(int id, const std::vector<int>& cpus, const fs::path& cpu_dir, const std::set<int>& usable) {
  NumaNode node{id, {}, {}};
  std::set<int> cores;
  for (int cpu : cpus) {
    if (!usable.contains(cpu)) continue;
    node.cpus.push_back(cpu);
    cores.insert(core_of(cpu_dir, cpu, usable));
  }
  node.physical_cores.assign(cores.begin(), cores.end());
  return node;
}

}  // namespace

std::vector<int> parse_cpu_list(const std::string& text) {
  std::vector<int> cpus;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    const size_t dash = part.find('-');
    const std::string low = part.substr(0, dash), high = dash == std::string::npos ? low : part.substr(dash + 1);
    CHECK(is_number(low) && is_number(high), "'", text, "' is not a list of CPUs like 0-3,8");
    for (int cpu = std::stoi(low); cpu <= std::stoi(high); cpu++) cpus.push_back(cpu);
  }
  return cpus;
}

std::vector<int> usable_cpus() {
  std::vector<int> cpus;
  for (int most = 1024; most <= 1 << 20; most *= 2) {  // the kernel refuses a mask shorter than its own
    cpu_set_t* set = CPU_ALLOC(most);
    const size_t bytes = CPU_ALLOC_SIZE(most);
    const bool known = sched_getaffinity(0, bytes, set) == 0;
    for (int cpu = 0; known && cpu < most; cpu++)
      if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
    CPU_FREE(set);
    if (known) return cpus;
  }
  throw std::runtime_error("the kernel does not say which CPUs this process may use");
}

std::vector<NumaNode> read_topology(const std::string& root, const std::vector<int>& usable) {
  const fs::path node_dir = fs::path(root) / "devices/system/node", cpu_dir = fs::path(root) / "devices/system/cpu";
  const std::set<int> allowed(usable.begin(), usable.end());
  std::vector<NumaNode> nodes;
  for (int id : node_ids(node_dir)) {
    const std::string list = first_line(node_dir / ("node" + std::to_string(id)) / "cpulist");
    NumaNode node = make_node(id, parse_cpu_list(list), cpu_dir, allowed);
    if (!node.cpus.empty()) nodes.push_back(std::move(node));
  }
  if (nodes.empty()) {
    std::vector<int> present = parse_cpu_list(first_line(cpu_dir / "online"));
    if (present.empty()) present = usable;
    nodes.push_back(make_node(0, present, cpu_dir, allowed));
  }
  CHECK(!nodes.front().cpus.empty(), "none of the ", usable.size(), " CPUs this process may use is listed under ", root);
  return nodes;
}

std::vector<NumaNode> this_machine() { return read_topology("/sys", usable_cpus()); }

std::vector<int> physical_cores(const std::vector<NumaNode>& nodes) {
  std::vector<int> cores;
  for (const NumaNode& node : nodes) cores.insert(cores.end(), node.physical_cores.begin(), node.physical_cores.end());
  return cores;
}

std::vector<ThreadGroup> group_threads(const std::vector<NumaNode>& nodes, const std::vector<int>& ids, int threads) {
  std::map<int, std::vector<int>> cores;  // that no thread has yet, by node; the next one last
  std::vector<ThreadGroup> groups;
  for (int id : ids) {
    const auto node = std::find_if(nodes.begin(), nodes.end(), [&](const NumaNode& n) { return n.id == id; });
    CHECK(node != nodes.end(), "this process may use no CPU of NUMA node ", id);
    groups.push_back({id, {}});
    cores[id].assign(node->physical_cores.rbegin(), node->physical_cores.rend());
  }
  if (ids.empty()) {
    groups.push_back({kAnyNode, {}});
    const std::vector<int> all = physical_cores(nodes);
    cores[kAnyNode].assign(all.rbegin(), all.rend());
  }
  int count = 0;
  for (const auto& [node, unused] : cores) count += static_cast<int>(unused.size());
  if (threads == 0) threads = count;
  CHECK(threads >= 1 && threads <= kMostThreads, "a thread pool needs 1 to ", kMostThreads, " threads, not ", threads);
  CHECK(threads >= static_cast<int>(groups.size()), "the host experts need at least ", groups.size(),
        " threads, one for each NUMA node, not ", threads);
  const bool pinned = threads <= count;
  for (int i = 0; i < threads; i++) {
    ThreadGroup* next = nullptr;
    for (ThreadGroup& group : groups)
      if ((!pinned || !cores[group.node].empty()) && (!next || group.cpus.size() < next->cpus.size())) next = &group;
    next->cpus.push_back(pinned ? cores[next->node].back() : kAnyCpu);
    if (pinned) cores[next->node].pop_back();
  }
  return groups;
}

}  // namespace hetero
