#include <optional>

#include "bindings/bindings.h"
#include "cpu/arena.h"
#include "cpu/topology.h"
#include "kernel/kernel_table.h"

namespace hetero {
namespace {

py::list topology(const std::string& root, const std::optional<std::vector<int>>& cpus) {
  py::list nodes;
  for (const NumaNode& node : read_topology(root, cpus ? *cpus : usable_cpus())) {
    py::dict entry;
    entry["id"] = node.id;
    entry["cpus"] = node.cpus;
    entry["physical_cores"] = node.physical_cores;
    nodes.append(entry);
  }
  return nodes;
}

}  // namespace

void bind_cpu(py::module_& m) {
  m.def("isas", &isa_names, "Names of the kernel sets this machine can run, best first.");
  m.def("selected_isa", [] { return select_kernels(nullptr).name; },
        "The kernel set used by default: the best, or the one HETERO_GLM5_ISA names (ValueError if it is not present).");
  m.def("topology", &topology, py::arg("root") = "/sys", py::arg("cpus") = py::none(),
        "NUMA nodes with usable CPUs, ascending: dicts of id, cpus, physical_cores. cpus: the usable ones, default the cpuset.");
  m.def("binds_memory", [](int node) { return Arena(1, {node}).placed(); }, py::arg("node"),
        "Whether the kernel lets this process bind memory to that NUMA node.");
  m.def("physical_cores", [] { return physical_cores(this_machine()); },
        "One CPU number per physical core of the cpuset, node by node.");
}

}  // namespace hetero
