#include "cpu/job_queue.h"

#include <utility>

#include "cpu/topology.h"

namespace hetero {

JobQueue::JobQueue() : may_spin_(usable_cpus().size() > 1), thread_([this] { loop(); }) {}

JobQueue::~JobQueue() {
  stop_ = true;
  if (asleep_.exchange(0) == 1) futex_wake_all(asleep_);
  thread_.join();
}

void JobQueue::submit(Job& job) noexcept {
  job.pending_.begin();
  job.next_ = submitted_.load();
  while (!submitted_.compare_exchange_weak(job.next_, &job)) {
  }
  if (asleep_.exchange(0) == 1) futex_wake_all(asleep_);
}

void JobQueue::await_jobs() noexcept {
  const auto called = [&] { return submitted_.load() != nullptr || stop_.load(); };
  while (!(may_spin_ ? spin_until(called) : called())) {
    asleep_ = 1;
    if (!called()) futex_wait(asleep_, 1);
    asleep_ = 0;
  }
}

void JobQueue::loop() noexcept {
  for (;;) {
    await_jobs();
    Job* next = nullptr;  // turned round: the oldest first
    for (Job* job = submitted_.exchange(nullptr); job != nullptr;) {
      Job* older = std::exchange(job->next_, next);
      next = std::exchange(job, older);
    }
    if (next == nullptr) return;
    while (next != nullptr) {
      Job& job = *std::exchange(next, next->next_);
      try {
        job.run_(job);
      } catch (...) {
        job.error = std::current_exception();
      }
      job.pending_.end();
    }
  }
}

}  // namespace hetero
