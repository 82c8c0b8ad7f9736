// A CUDA runtime without a device, for tests: a stream is a thread that does what was enqueued, in order, after random
// delays. Host functions run on the streams' threads, all streams' one at a time if asked, as CUDA may do it, and abort the
// process if they call the runtime. Device memory is host memory.
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

namespace {

constexpr int kNotReady = 600;

thread_local bool in_host_function = false;
std::mutex one_at_a_time;

void forbid_host_functions(const char* name) {
  if (!in_host_function) return;
  std::fprintf(stderr, "a host function called %s\n", name);
  std::abort();
}

class Stream {
 public:
  Stream(uint64_t seed, int most_delay, bool one_by_one)
      : random_(seed), most_delay_(most_delay), one_by_one_(one_by_one), thread_([this] { loop(); }) {}
  ~Stream() {
    {
      std::lock_guard lock(mutex_);
      ended_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }

  void enqueue(std::function<void()> operation) {
    std::lock_guard lock(mutex_);
    operations_.push_back(std::move(operation));
    changed_.notify_all();
  }
  void enqueue_host(void (*function)(void*), void* argument) {
    enqueue([this, function, argument] {
      std::unique_lock turn(one_at_a_time, std::defer_lock);
      if (one_by_one_) turn.lock();
      in_host_function = true;
      function(argument);
      in_host_function = false;
    });
  }
  void hold(bool held) {
    std::lock_guard lock(mutex_);
    held_ = held;
    changed_.notify_all();
  }
  void fail(int error) {
    std::lock_guard lock(mutex_);
    error_ = error;
    changed_.notify_all();
  }
  int error() {
    std::lock_guard lock(mutex_);
    return error_;
  }
  int query() {
    std::lock_guard lock(mutex_);
    return error_ ? error_ : operations_.empty() && !busy_ ? 0 : kNotReady;
  }
  int synchronize() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return error_ || (operations_.empty() && !busy_); });
    return error_;
  }

 private:
  void loop() {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return ended_ || (!operations_.empty() && !held_); });
      if (operations_.empty()) return;
      auto operation = std::move(operations_.front());
      operations_.pop_front();
      busy_ = true;
      const bool dropped = error_ != 0;
      lock.unlock();
      delay();
      if (!dropped) operation();
      lock.lock();
      busy_ = false;
      changed_.notify_all();
    }
  }
  void delay() {
    if (most_delay_ == 0) return;
    const uint64_t draw = random_();
    const auto time = std::chrono::microseconds(draw / 4 % most_delay_);
    if (draw % 4 == 0) std::this_thread::sleep_for(time);
    if (draw % 4 == 1)
      for (const auto end = std::chrono::steady_clock::now() + time; std::chrono::steady_clock::now() < end;) std::this_thread::yield();
  }

  std::mt19937_64 random_;
  int most_delay_;
  bool one_by_one_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> operations_;
  bool held_ = false, busy_ = false, ended_ = false;
  int error_ = 0;
  std::thread thread_;
};

}  // namespace

extern "C" {

// Of the calling thread, until it is asked for: a copy refuses to start while there is one, as torch's launches do.
thread_local int last_error = 0;
int cudaGetLastError() { return std::exchange(last_error, 0); }

Stream* standin_create(uint64_t seed, int most_delay, int one_by_one) { return new Stream(seed, most_delay, one_by_one != 0); }
void standin_destroy(Stream* stream) { delete stream; }
void standin_hold(Stream* stream, int held) { stream->hold(held != 0); }
void standin_fail(Stream* stream, int error) { stream->fail(error); }

int cudaLaunchHostFunc(Stream* stream, void (*function)(void*), void* argument) {
  forbid_host_functions("cudaLaunchHostFunc");
  if (stream->error()) return last_error = stream->error();
  stream->enqueue_host(function, argument);
  return 0;
}

int cudaMemcpyAsync(void* target, const void* source, size_t bytes, int, Stream* stream) {
  forbid_host_functions("cudaMemcpyAsync");
  if (last_error != 0) return last_error;
  if (stream->error()) return last_error = stream->error();
  stream->enqueue([=] { std::memcpy(target, source, bytes); });
  return 0;
}

int cudaStreamQuery(Stream* stream) {
  forbid_host_functions("cudaStreamQuery");
  const int error = stream->query();
  return error == 0 ? 0 : last_error = error;
}

int cudaStreamSynchronize(Stream* stream) {
  forbid_host_functions("cudaStreamSynchronize");
  return stream->synchronize();
}

const char* cudaGetErrorName(int error) { return error == 719 ? "cudaErrorLaunchFailure" : "cudaErrorUnknown"; }
}
