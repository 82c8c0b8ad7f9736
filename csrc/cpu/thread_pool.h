// Fork-join: for_each(tasks, body) calls body(worker, task) once per task, on several threads, and returns when all are
// done. Worker 0 is the caller and is never pinned; the others are pinned to one physical core each, if there are enough.
//
// Each group of workers has an equal, contiguous part of the tasks, and each worker an equal share of its group's part,
// which it takes in order; whoever has finished takes single tasks from the others' shares, its own group's first. So with a
// group for each NUMA node, and the tasks in the order of nodes, a node's threads work on what their node holds.
//
// The caller waits only for workers that have entered the call: one that still sleeps, or that another process keeps off its
// core, finds the gate closed and its share done. So small calls do not pay for waking threads, and more threads than CPUs
// cost little.
//
// Workers watch a generation counter. They spin on it for a bounded time and then sleep on a futex, so an idle pool costs
// nothing; the caller joins the same way. With more threads than CPUs nobody spins. No call allocates. The first exception
// is rethrown to the caller, after every entered worker has left. Calls from several threads take turns; a body must not call
// its own pool.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/spin.h"
#include "cpu/topology.h"

namespace hetero {

class ThreadPool {
 public:
  // Workers are numbered group by group; each group has at least one. The first group's first CPU is left to the caller.
  explicit ThreadPool(const std::vector<ThreadGroup>& groups, std::chrono::microseconds spin = kSpin);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(shares_.size()); }

  template <class Body> void for_each(int64_t tasks, Body&& body) {
    if (tasks == 0) return;
    std::lock_guard turn(turn_);
    auto work = [&](int worker) {
      for (int64_t task; (task = take(worker)) >= 0;) body(worker, task);
    };
    split(tasks);
    fork_join(tasks, [](void* arg, int worker) { (*static_cast<decltype(work)*>(arg))(worker); }, &work);
  }

 private:
  using Call = void (*)(void*, int);
  struct Group {
    int number = 0, first = 0, size = 0;  // its place among the groups, its first worker, its workers
  };
  struct alignas(128) Share {  // of one worker
    std::atomic<int64_t> next{0};
    int64_t end = 0;
    Group group;
  };
  static constexpr int kOpen = 1 << 30;  // in gate_, above the number of workers inside

  void split(int64_t tasks);
  int64_t take(int worker);  // -1: nothing left
  void fork_join(int64_t tasks, Call call, void* arg);
  void worker_loop(int worker);
  void start_worker(int worker, int cpu);
  void end_workers();
  bool enter();
  void leave();
  void run_guarded(int worker) noexcept;
  template <class Done> bool spin_until(Done done) const;

  std::vector<Share> shares_;
  std::vector<std::thread> workers_;
  const int groups_;
  std::mutex turn_;
  const std::chrono::microseconds spin_;
  std::atomic<bool> stop_{false};
  Call call_ = nullptr;  // this and what it works on change only while the gate is closed and nobody is inside
  void* arg_ = nullptr;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  alignas(128) std::atomic<int> generation_{0};
  std::atomic<int> sleepers_{0};
  alignas(128) std::atomic<int> gate_{0};
  std::atomic<bool> caller_sleeps_{false};
};

}  // namespace hetero
