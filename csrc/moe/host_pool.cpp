#include "moe/host_pool.h"

#include "kernel/kernel_table.h"

namespace hetero {

HostPool::HostPool(int count, const char* isa, const std::vector<int>& nodes)
    : kernels(select_kernels(isa)),
      thread_groups(group_threads(this_machine(), nodes, count)),
      threads(thread_groups),
      hidden(nodes),
      workers(threads.threads()) {}

}  // namespace hetero
