#include "cpu/job_queue.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace hetero {

JobQueue::~JobQueue() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  thread_.join();
}

int64_t JobQueue::submit(Job job, void* arg) {
  std::lock_guard lock(mutex_);
  const auto slot = std::find_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.ticket < 0; });
  CHECK(slot != slots_.end(), kSlots, " submitted jobs have not been waited for; wait for one before submitting another");
  *slot = {job, arg, nullptr, submitted_, false};
  order_[submitted_ % kSlots] = static_cast<int>(slot - slots_.begin());
  work_.notify_one();
  return submitted_++;
}

void JobQueue::wait(int64_t ticket) {
  std::unique_lock lock(mutex_);
  const auto slot = std::find_if(slots_.begin(), slots_.end(), [&](const Slot& s) { return s.ticket == ticket; });
  CHECK(ticket >= 0 && slot != slots_.end(), "ticket ", ticket, " was never given out or has been waited for");
  done_.wait(lock, [&] { return slot->done; });
  slot->ticket = -1;
  if (auto error = std::exchange(slot->error, nullptr)) std::rethrow_exception(error);
}

void JobQueue::loop() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stop_ || started_ < submitted_; });
    if (started_ == submitted_) return;
    Slot& slot = slots_[order_[started_++ % kSlots]];
    lock.unlock();
    std::exception_ptr error;
    try {
      slot.job(slot.arg);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    slot.error = std::move(error);
    slot.done = true;
    done_.notify_all();
  }
}

}  // namespace hetero
