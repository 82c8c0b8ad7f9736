// What all layers of the host tier share: the threads, the kernels they run, their scratch, and the queue thread. Scratch
// grows to the largest call and is then reused; a call holds `turn` while it uses it.
#pragma once
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/arena.h"
#include "cpu/job_queue.h"
#include "cpu/thread_pool.h"
#include "cpu/topology.h"
#include "kernel/kernels.h"
#include "moe/token_groups.h"

namespace hetero {

template <class T> class ScratchBuffer {
 public:
  explicit ScratchBuffer(std::vector<int> nodes = {}) : nodes_(std::move(nodes)) {}
  void reserve(int64_t count) {  // contents are lost when it grows
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (bytes > memory_.bytes()) memory_ = Arena(bytes + bytes / 2, nodes_);
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }

 private:
  std::vector<int> nodes_;  // see Arena
  Arena memory_;
};

struct alignas(128) WorkerScratch {  // first written by its worker, which puts it on the worker's node
  ScratchBuffer<uint32_t> activations;  // packed rows of one panel ...
  int64_t packed_panel = -1;            // ... namely this one of the current call
  ScratchBuffer<float> sums;            // of two tiles and one panel
  ScratchBuffer<float> products;        // silu(gate) * up of one panel, until enough columns are there to be packed
};

struct HostPool {
  // threads: 0 = every physical core. isa: a name, or null for the best. nodes: see group_threads.
  HostPool(int threads, const char* isa, const std::vector<int>& nodes);

  const KernelTable& kernels;
  const std::vector<ThreadGroup> thread_groups;
  ThreadPool threads;
  std::mutex turn;
  TokenGroups groups;
  ScratchBuffer<uint32_t> hidden;  // packed activations of every panel: [sorted pair][words]; all nodes read all of it
  std::vector<WorkerScratch> workers;
  JobQueue queue;  // last: it drains first, and its jobs use the rest
};

}  // namespace hetero
