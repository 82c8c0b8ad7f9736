// What this machine can do at most, and what the pool costs: the denominators of the benchmarks. Nothing serves with these.
//
// A roof is measured by the instruction that does the work, in assembly: gcc 12 spills the accumulators of a loop of VNNI
// intrinsics and then measures the spills. Each loop has enough independent accumulators to hide the instruction's latency
// on two pipes (vdpbf16ps needs 16; 24 are used). Operands are zero. The assembly needs no compiler flags, so this file is
// built for the baseline; a loop may run only where `instructions()` names it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/arena.h"
#include "cpu/job_queue.h"
#include "cpu/thread_pool.h"

namespace hetero {

struct Instruction {
  const char* name;
  int64_t ops;               // multiplies and adds of one turn of the loop
  void (*loop)(int64_t turns);
  bool (*present)();
};

// The instructions whose peak can be measured here, widest first.
std::vector<const Instruction*> instructions();

class Roofs {
 public:
  // threads: 0 = every physical core. bytes: memory to read, far above the caches; 0 = no reading.
  Roofs(int threads, int64_t bytes);

  int threads() const { return pool_.threads(); }
  int64_t bytes() const { return memory_.bytes(); }
  double read();                           // bytes per second of one pass over the memory; throws without memory
  double peak(const std::string& name);    // operations per second over some milliseconds; throws on an absent name

 private:
  ThreadPool pool_;
  Arena memory_;
};

struct ForkJoin {
  int tasks;
  double body, gap;  // seconds: a task's busy wait, and the caller's before each call
};

// Seconds of each of `calls` calls of pool.for_each.
std::vector<double> time_fork_join(ThreadPool& pool, const ForkJoin& call, int calls);
struct HandOver {
  double there, back;  // seconds from submit to the job's first instruction, and to the return of wait
};
// Of each of `calls` empty jobs, the submitter busy for `gap` seconds before each.
std::vector<HandOver> time_hand_over(JobQueue& queue, double gap, int calls);

}  // namespace hetero
