#include "moe/host_pool.h"

#include "kernel/kernel_table.h"

namespace hetero {

HostPool::HostPool(int count, const char* isa, const std::vector<int>& nodes)
    : kernels(select_kernels(isa)),
      placement(group_threads(this_machine(), nodes, count)),
      threads(placement),
      hidden(nodes),
      workers(threads.threads()) {}

}  // namespace hetero
