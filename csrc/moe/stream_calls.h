// Calls of host experts in the order of one CUDA stream. The caller enqueues and never waits for the device:
//
//   take()          a slot, whose buffers the caller owns from here on
//   (caller)        copies of x, ids, weights from the device into the slot's buffers, on the stream
//   submit(ticket)  on the stream: hands the slot's job to the pool's queue thread
//   (caller)        more work for the device
//   wait(ticket)    on the stream: holds the stream until the job has ended
//   (caller)        copy of y from the slot's buffer to the device, on the stream
//
// A slot's buffers may be written again when its wait has been passed on the stream and the copy of y lies before the write.
// The first half is what take() waits for; the second is the order of the stream, since all copies of a slot are on it. So
// the caller can be kSlots calls ahead of the stream; then take() holds it back. A call that was never waited for is waited
// for by the take() that wants its slot, and its own wait(ticket) then throws.
//
// The stream's functions run on CUDA's threads, where those of all streams may take turns: they call no CUDA, allocate and
// throw nothing, and "submit" never blocks, so a "wait" always has its job on the way. A job that throws fills y with NaN
// and keeps the error in its slot; check() and take() throw it. One thread at a time uses the object.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <optional>

#include "cpu/cuda_runtime.h"
#include "cpu/job_queue.h"
#include "moe/moe_layer.h"

namespace hetero {

class StreamCalls {
 public:
  static constexpr int kSlots = 4;

  StreamCalls(CudaRuntime runtime, void* stream) : runtime_(runtime), stream_(stream) {}
  ~StreamCalls();  // as close(), but does not throw
  StreamCalls(const StreamCalls&) = delete;

  int64_t take();  // -> ticket of slot ticket % kSlots
  void submit(int64_t ticket, MoeLayer layer, const MoeCall& call);
  void wait(int64_t ticket);
  // Throws what the earliest failed call threw, after all calls have ended; the others' errors are forgotten with it, for
  // they belong to the same step. Does not wait if none has failed.
  void check();
  // Waits for all calls and lets go of their layers. Throws std::runtime_error if the device has failed.
  void close();

 private:
  struct Slot : Job {
    Slot() : Job(&run) {}
    static void run(Job& job);

    std::optional<MoeLayer> layer;
    MoeCall call{};
    Pending passed;  // from the launch of "submit" until the stream is past "wait"
    int64_t ticket = -1;
    bool awaited = true;  // "wait" was launched, or there is nothing to wait for
  };

  static void on_submit(void* slot) noexcept;
  static void on_wait(void* slot) noexcept;
  void launch_wait(Slot& slot);
  void drain(Slot& slot);
  Slot& slot(int64_t ticket) { return (*slots_)[static_cast<uint64_t>(ticket) % kSlots]; }

  CudaRuntime runtime_;
  void* stream_;
  int64_t taken_ = 0;
  std::unique_ptr<std::array<Slot, kSlots>> slots_ = std::make_unique<std::array<Slot, kSlots>>();
};

}  // namespace hetero
