// One thread that runs jobs in the order they were submitted, so that host experts work while the submitter does something
// else. submit() returns a ticket at once; wait(ticket) blocks until that job has run, rethrows what it threw and frees its
// slot. The slots are fixed and preallocated: neither call allocates. Each ticket must be waited for once.
// A job is a function and one argument; the submitter keeps what the argument points to alive until wait() returns.
// The destructor runs what was submitted.
#pragma once
#include <array>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>

namespace hetero {

class JobQueue {
 public:
  static constexpr int kSlots = 64;
  using Job = void (*)(void*);

  JobQueue() : thread_([this] { loop(); }) {}
  ~JobQueue();
  JobQueue(const JobQueue&) = delete;

  int64_t submit(Job job, void* arg);  // -> ticket; throws if kSlots jobs have not been waited for
  void wait(int64_t ticket);

 private:
  struct Slot {
    Job job;
    void* arg;
    std::exception_ptr error;
    int64_t ticket = -1;  // -1 = free
    bool done = false;
  };
  void loop();

  std::array<Slot, kSlots> slots_;
  std::array<int, kSlots> order_;     // slots in order of submission, a ring
  int64_t submitted_ = 0, started_ = 0;
  bool stop_ = false;
  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::thread thread_;  // last: it uses the rest
};

}  // namespace hetero
