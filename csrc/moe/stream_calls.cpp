#include "moe/stream_calls.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/check.h"

namespace hetero {
namespace {

constexpr auto kLook = std::chrono::milliseconds(20);  // between looks at the stream, which drops its functions if it fails

}  // namespace

void StreamCalls::Slot::run(Job& job) {
  auto& slot = static_cast<Slot&>(job);
  try {
    slot.layer->forward(slot.call);
  } catch (...) {
    const int64_t values = slot.call.routing.tokens * slot.layer->weights().layout().hidden;
    std::fill_n(slot.call.y, values, std::numeric_limits<float>::quiet_NaN());
    throw;
  }
}

void StreamCalls::on_submit(void* argument) noexcept {
  auto& slot = *static_cast<Slot*>(argument);
  slot.layer->pool().queue.submit(slot);
}

void StreamCalls::on_wait(void* argument) noexcept {
  auto& slot = *static_cast<Slot*>(argument);
  slot.wait();
  slot.passed.end();
}

StreamCalls::~StreamCalls() {
  try {
    close();
  } catch (const std::runtime_error&) {  // the stream has failed; one of its functions may still look at a slot and its layer
    slots_.release();
  }
}

void StreamCalls::launch_wait(Slot& slot) {
  runtime_.launch(stream_, on_wait, &slot);
  slot.awaited = true;
}

void StreamCalls::drain(Slot& slot) {
  if (!slot.awaited) launch_wait(slot);
  while (!slot.passed.wait(kLook)) runtime_.check(stream_);
}

int64_t StreamCalls::take() {
  Slot& next = slot(taken_);
  drain(next);
  check();
  next.layer.reset();
  next.ticket = taken_;
  return taken_++;
}

void StreamCalls::submit(int64_t ticket, MoeLayer layer, const MoeCall& call) {
  Slot& taken = slot(ticket);
  CHECK(ticket >= 0 && taken.ticket == ticket && !taken.layer, "call ", ticket, " was submitted before, or its slot went to a later call");
  taken.layer = std::move(layer);
  taken.call = call;
  taken.passed.begin();
  try {
    runtime_.launch(stream_, on_submit, &taken);
  } catch (...) {
    taken.passed.end();
    taken.layer.reset();
    throw;
  }
  taken.awaited = false;
}

void StreamCalls::wait(int64_t ticket) {
  Slot& submitted = slot(ticket);
  CHECK(ticket >= 0 && submitted.ticket == ticket && !submitted.awaited, "call ", ticket, " has been waited for, or its slot went to a later "
        "call; each call is waited for once, before ", kSlots, " more are started");
  launch_wait(submitted);
}

void StreamCalls::check() {
  const auto failed = [](const Slot& slot) { return slot.passed.ended() && slot.error != nullptr; };
  if (std::none_of(slots_->begin(), slots_->end(), failed)) return;
  for (Slot& slot : *slots_) drain(slot);
  std::exception_ptr first;
  for (int64_t ticket = taken_; ticket < taken_ + kSlots; ticket++)
    if (auto error = std::exchange(slot(ticket).error, nullptr); !first) first = std::move(error);
  std::rethrow_exception(first);
}

void StreamCalls::close() {
  for (Slot& slot : *slots_) drain(slot);
  for (Slot& slot : *slots_) {
    slot.layer.reset();
    slot.error = nullptr;
  }
}

}  // namespace hetero
