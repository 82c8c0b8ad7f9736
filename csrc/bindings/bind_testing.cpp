// `_C.testing`: the inner parts that tests drive directly. Not for use elsewhere.
#include <memory>

#include "base/bf16.h"
#include "base/fp16.h"
#include "base/fp8.h"
#include "bindings/bindings.h"
#include "cpu/arena.h"
#include "cpu/job_queue.h"
#include "cpu/thread_pool.h"

namespace hetero {
namespace {

// A queue of Python callables; dropping it runs what was submitted.
class PyJobQueue {
 public:
  ~PyJobQueue() {
    py::gil_scoped_release release;
    queue_.reset();
  }
  int64_t submit(py::function function) {
    jobs_.push_back(std::make_unique<PyJob>(std::move(function)));
    queue_->submit(*jobs_.back());
    return static_cast<int64_t>(jobs_.size()) - 1;
  }
  void again(int64_t job) { queue_->submit(*jobs_.at(job)); }
  void wait(int64_t number) {
    Job& job = *jobs_.at(number);  // with the GIL, which guards jobs_
    {
      py::gil_scoped_release release;
      job.wait();
    }
    if (auto error = std::exchange(job.error, nullptr)) std::rethrow_exception(error);
  }

 private:
  struct PyJob : Job {
    explicit PyJob(py::function f) : Job(&run), function(std::move(f)) {}
    static void run(Job& job) {
      py::gil_scoped_acquire gil;
      static_cast<PyJob&>(job).function();
    }
    py::function function;
  };
  std::vector<std::unique_ptr<PyJob>> jobs_;
  std::unique_ptr<JobQueue> queue_ = std::make_unique<JobQueue>();
};

void for_each(ThreadPool& pool, int64_t tasks, const py::function& body) {
  py::gil_scoped_release release;
  pool.for_each(tasks, [&](int worker, int64_t task) {
    py::gil_scoped_acquire gil;
    body(worker, task);
  });
}

// Sums 0..tasks-1 `calls` times, without Python in between.
int64_t sum_tasks(ThreadPool& pool, int64_t tasks, int calls) {
  py::gil_scoped_release release;
  std::atomic<int64_t> sum{0};
  for (int i = 0; i < calls; i++) pool.for_each(tasks, [&](int, int64_t task) { sum.fetch_add(task, std::memory_order_relaxed); });
  return sum.load();
}

}  // namespace

void bind_testing(py::module_& m) {
  py::module_ t = m.def_submodule("testing");
  t.def("bf16_to_float", py::vectorize([](uint16_t h) { return bf16_to_float(h); }));
  t.def("float_to_bf16", py::vectorize([](float f) { return float_to_bf16(f); }));
  t.def("fp16_to_float", py::vectorize([](uint16_t h) { return fp16_to_float(h); }));
  t.def("float_to_fp16", py::vectorize([](float f) { return float_to_fp16(f); }));
  t.def("e4m3_to_float", py::vectorize([](uint8_t c) { return e4m3_to_float(c); }));
  t.def("float_to_e4m3", py::vectorize([](float x) { return float_to_e4m3(x); }));
  t.def("arena", [](int64_t bytes, const std::vector<int>& nodes) {
    auto* arena = new Arena(bytes, nodes);
    const py::capsule owner(arena, [](void* p) { delete static_cast<Arena*>(p); });
    return py::array_t<uint8_t>({bytes}, arena->data(), owner);
  });
  py::class_<ThreadPool>(t, "ThreadPool")
      .def(py::init([](int threads, const std::vector<int>& nodes, int spin_us) {
             return std::make_unique<ThreadPool>(group_threads(this_machine(), nodes, threads), std::chrono::microseconds(spin_us));
           }), py::arg("threads"), py::arg("nodes") = std::vector<int>(), py::arg("spin_us") = kSpin.count())
      .def_property_readonly("threads", &ThreadPool::threads)
      .def("for_each", &for_each)
      .def("sum_tasks", &sum_tasks);
  t.def("group_threads", [](const std::string& root, const std::vector<int>& cpus, const std::vector<int>& nodes, int threads) {
    return group_pairs(group_threads(read_topology(root, cpus), nodes, threads));
  }, py::arg("root"), py::arg("cpus"), py::arg("nodes"), py::arg("threads"));
  py::class_<PyJobQueue>(t, "JobQueue")
      .def(py::init<>())
      .def("submit", &PyJobQueue::submit)
      .def("again", &PyJobQueue::again)
      .def("wait", &PyJobQueue::wait);
}

}  // namespace hetero
