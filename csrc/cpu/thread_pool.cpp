#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <system_error>
#include <utility>

#include "base/check.h"
#include "cpu/spin.h"
#include "cpu/topology.h"

namespace hetero {
namespace {

constexpr int kMostThreads = 4096;

void pin_to(int cpu) {  // best effort: a CPU that has left the cpuset leaves the worker unpinned
  const int cpus = cpu + 1;
  cpu_set_t* set = CPU_ALLOC(cpus);
  const size_t bytes = CPU_ALLOC_SIZE(cpus);
  CPU_ZERO_S(bytes, set);
  CPU_SET_S(cpu, bytes, set);
  pthread_setaffinity_np(pthread_self(), bytes, set);
  CPU_FREE(set);
}

int checked_threads(int threads) {
  CHECK(threads >= 1 && threads <= kMostThreads, "a thread pool needs 1 to ", kMostThreads, " threads, not ", threads);
  return threads;
}

}  // namespace

ThreadPool::ThreadPool(int threads, const std::vector<int>& cores)
    : shares_(checked_threads(threads)), may_spin_(threads <= static_cast<int>(usable_cpus().size())) {
  const bool pinned = threads <= static_cast<int>(cores.size());
  for (int worker = 1; worker < threads; worker++) {
    const int cpu = pinned ? cores[worker] : -1;
    try {
      workers_.emplace_back([this, worker, cpu] {
        if (cpu >= 0) pin_to(cpu);
        worker_loop(worker);
      });
    } catch (const std::system_error&) {  // a limit on processes or memory
      end_workers();
      refuse("only ", worker, " of ", threads, " threads could be started; use fewer, or raise the limit on processes");
    }
  }
}

ThreadPool::~ThreadPool() { end_workers(); }

void ThreadPool::end_workers() {
  stop_ = true;
  generation_.fetch_add(1);
  futex_wake_all(generation_);
  for (std::thread& worker : workers_) worker.join();
}

template <class Done> bool ThreadPool::spin_until(Done done) const { return may_spin_ ? hetero::spin_until(done) : done(); }

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
  const int64_t n = threads();
  for (int64_t i = 0; i < n; i++) {
    shares_[i].next.store(tasks * i / n, std::memory_order_relaxed);
    shares_[i].end = tasks * (i + 1) / n;
  }
}

int64_t ThreadPool::take(int worker) {
  for (int i = 0, n = threads(); i < n; i++) {
    Share& share = shares_[(worker + i) % n];
    if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
    const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
    if (task < share.end) return task;
  }
  return -1;
}

}  // namespace hetero
