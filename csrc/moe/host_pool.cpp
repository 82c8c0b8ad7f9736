#include "moe/host_pool.h"

#include "cpu/topology.h"
#include "kernel/kernel_table.h"

namespace hetero {
namespace {

std::vector<int> machine_cores() { return physical_cores(read_topology("/sys", usable_cpus())); }

}  // namespace

HostPool::HostPool(int count, const char* isa)
    : kernels(select_kernels(isa)),
      threads(count ? count : static_cast<int>(machine_cores().size()), machine_cores()),
      workers(threads.threads()) {}

}  // namespace hetero
