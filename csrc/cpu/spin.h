// Waiting in two parts: spin for a bounded time, in which an answer costs less than a microsecond, then sleep on a futex,
// which costs nothing while it lasts.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <chrono>

#include "cpu/futex.h"

namespace hetero {

constexpr auto kSpin = std::chrono::microseconds(100);  // several fork-joins' gap, far below a scheduler tick

// Whether done() came true within the limit.
template <class Done> bool spin_until(Done done, std::chrono::microseconds limit = kSpin) {
  constexpr int kPausesPerLook = 64;
  const auto end = std::chrono::steady_clock::now() + limit;
  do {
    for (int i = 0; i < kPausesPerLook; i++) {
      if (done()) return true;
      _mm_pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// Something that one thread starts and another ends, again and again; at first it is not going on. end() touches the object
// with one exchange; after that a waiter may reuse or destroy it (the wake that may follow only names its address).
class Pending {
 public:
  void begin() noexcept { state_.store(kPending); }
  void end() noexcept {
    if (state_.exchange(kEnded) == kAwaited) futex_wake_all(state_);
  }
  bool ended() const noexcept { return state_.load() == kEnded; }

  // Returns when it has ended, or after `limit`, which a wake without cause may cut short. False: not ended.
  bool wait(std::chrono::milliseconds limit) noexcept {
    if (spin_until([&] { return ended(); })) return true;
    int pending = kPending;
    if (state_.compare_exchange_strong(pending, kAwaited) || pending == kAwaited) futex_wait(state_, kAwaited, limit);
    return ended();
  }
  void wait() noexcept {
    while (!wait(std::chrono::hours(1))) {
    }
  }

 private:
  enum { kEnded, kPending, kAwaited };
  std::atomic<int> state_{kEnded};
};

}  // namespace hetero
