#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <system_error>
#include <utility>

#include "base/check.h"
#include "cpu/topology.h"

namespace hetero {
namespace {

void pin_to(int cpu) {  // best effort: a CPU that has left the cpuset leaves the worker unpinned
  const int cpus = cpu + 1;
  cpu_set_t* set = CPU_ALLOC(cpus);
  const size_t bytes = CPU_ALLOC_SIZE(cpus);
  CPU_ZERO_S(bytes, set);
  CPU_SET_S(cpu, bytes, set);
  pthread_setaffinity_np(pthread_self(), bytes, set);
  CPU_FREE(set);
}

size_t count_threads(const std::vector<ThreadGroup>& groups) {
  size_t threads = 0;
  for (const ThreadGroup& group : groups) {
    CHECK(!group.cpus.empty(), "each of a thread pool's ", groups.size(), " groups needs a thread");
    threads += group.cpus.size();
  }
  return threads;
}

}  // namespace

ThreadPool::ThreadPool(const std::vector<ThreadGroup>& groups, std::chrono::microseconds spin)
    : shares_(count_threads(groups)),
      groups_(static_cast<int>(groups.size())),
      spin_(shares_.size() <= usable_cpus().size() ? spin : std::chrono::microseconds(0)) {
  workers_.reserve(shares_.size());
  int worker = 0;
  for (int g = 0; g < groups_; g++) {
    const Group group{g, worker, static_cast<int>(groups[g].cpus.size())};
    for (int cpu : groups[g].cpus) {
      shares_[worker].group = group;
      if (worker > 0) start_worker(worker, cpu);
      worker++;
    }
  }
}

void ThreadPool::start_worker(int worker, int cpu) {
  try {
    workers_.emplace_back([this, worker, cpu] {
      if (cpu != kAnyCpu) pin_to(cpu);
      worker_loop(worker);
    });
  } catch (const std::system_error&) {  // a limit on processes or memory
    end_workers();
    refuse("only ", worker, " of ", threads(), " threads could be started; use fewer, or raise the limit on processes");
  }
}

ThreadPool::~ThreadPool() { end_workers(); }

void ThreadPool::end_workers() {
  stop_ = true;
  generation_.fetch_add(1);
  futex_wake_all(generation_);
  for (std::thread& worker : workers_) worker.join();
}

template <class Done> bool ThreadPool::spin_until(Done done) const {
  return spin_.count() == 0 ? done() : hetero::spin_until(done, spin_);
}

void ThreadPool::worker_loop(int worker) {
  for (int seen = 0;;) {
    const auto called = [&] { return generation_.load() != seen; };
    while (!spin_until(called)) {
      sleepers_.fetch_add(1);
      futex_wait(generation_, seen);
      sleepers_.fetch_sub(1);
    }
    if (stop_) return;
    seen = generation_.load();
    if (!enter()) continue;
    run_guarded(worker);
    leave();
  }
}

bool ThreadPool::enter() {
  for (int inside = gate_.load(); inside & kOpen;)
    if (gate_.compare_exchange_weak(inside, inside + 1)) return true;
  return false;
}

void ThreadPool::leave() {
  if (gate_.fetch_sub(1) == 1 && caller_sleeps_.load()) futex_wake_all(gate_);
}

void ThreadPool::run_guarded(int worker) noexcept {
  try {
    call_(arg_, worker);
  } catch (...) {
    if (!failed_.exchange(true)) error_ = std::current_exception();
  }
}

void ThreadPool::fork_join(int64_t tasks, Call call, void* arg) {
  call_ = call;
  arg_ = arg;
  if (tasks > 1 && threads() > 1) {
    gate_.store(kOpen);
    generation_.fetch_add(1);
    if (sleepers_.load() > 0) futex_wake_all(generation_);
  }
  run_guarded(0);
  gate_.fetch_and(~kOpen);
  const auto left = [&] { return gate_.load() == 0; };
  if (!spin_until(left)) {
    caller_sleeps_.store(true);
    for (int inside; (inside = gate_.load()) != 0;) futex_wait(gate_, inside);
    caller_sleeps_.store(false);
  }
  if (failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::split(int64_t tasks) {
  for (int worker = 0; worker < threads(); worker++) {
    Share& share = shares_[worker];
    const Group& group = share.group;
    const int64_t begin = tasks * group.number / groups_, count = tasks * (group.number + 1) / groups_ - begin;
    const int64_t i = worker - group.first;
    share.next.store(begin + count * i / group.size, std::memory_order_relaxed);
    share.end = begin + count * (i + 1) / group.size;
  }
}

int64_t ThreadPool::take(int worker) {
  const Group& group = shares_[worker].group;
  const int place = worker - group.first, others = threads() - group.size;
  const auto take_from = [](Share& share) -> int64_t {
    if (share.next.load(std::memory_order_relaxed) >= share.end) return -1;
    const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
    return task < share.end ? task : -1;
  };
  for (int i = 0; i < group.size; i++)
    if (const int64_t task = take_from(shares_[group.first + (place + i) % group.size]); task >= 0) return task;
  for (int i = 0; i < others; i++)  // from the next group on; neighbours start at different workers
    if (const int64_t task = take_from(shares_[(group.first + group.size + (place + i) % others) % threads()]); task >= 0)
      return task;
  return -1;
}

}  // namespace hetero
