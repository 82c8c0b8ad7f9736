// One thread that runs jobs in the order they were submitted, so that host experts work while the submitter does something
// else. A job belongs to its submitter, who keeps it until it has ended and may then submit it again; the queue only links
// jobs together. So submitting has no limit, never allocates, blocks or throws, and is fit for a CUDA host function.
//
// The thread and whoever waits spin for a bounded time and then sleep. The destructor runs what was submitted.
#pragma once
#include <atomic>
#include <exception>
#include <thread>

#include "cpu/spin.h"

namespace hetero {

class Job {
 public:
  using Run = void (*)(Job&);  // may throw

  explicit Job(Run run) : run_(run) {}
  Job(const Job&) = delete;

  bool ended() const noexcept { return pending_.ended(); }  // also before it is first submitted
  void wait() noexcept { pending_.wait(); }
  std::exception_ptr error;  // what the run threw; whoever has waited reads and clears it

 private:
  friend class JobQueue;
  Run run_;
  Job* next_ = nullptr;
  Pending pending_;
};

class JobQueue {
 public:
  JobQueue();
  ~JobQueue();
  JobQueue(const JobQueue&) = delete;

  void submit(Job& job) noexcept;  // one that has ended

 private:
  void loop() noexcept;
  void await_jobs() noexcept;

  bool may_spin_;
  alignas(128) std::atomic<Job*> submitted_{nullptr};  // the newest, linked to those before it
  std::atomic<bool> stop_{false};
  std::atomic<int> asleep_{0};
  std::thread thread_;  // last: it uses the rest
};

}  // namespace hetero
