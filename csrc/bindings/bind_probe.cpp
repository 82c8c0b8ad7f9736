// `_C.probe`: what this machine can do at most, and what a fork-join costs. For the benchmarks.
#include <memory>

#include "bindings/bindings.h"
#include "cpu/probe.h"
#include "cpu/topology.h"

namespace hetero {
namespace {

std::vector<double> fork_join(int threads, int tasks, double body, double gap, int calls) {
  py::gil_scoped_release release;
  ThreadPool pool(group_threads(this_machine(), {}, threads));
  time_fork_join(pool, {tasks, body, gap}, calls / 10 + 1);  // warms up
  return time_fork_join(pool, {tasks, body, gap}, calls);
}

std::pair<std::vector<double>, std::vector<double>> hand_over(double gap, int calls) {
  py::gil_scoped_release release;
  JobQueue queue;
  time_hand_over(queue, gap, calls / 10 + 1);
  std::pair<std::vector<double>, std::vector<double>> seconds;
  for (const HandOver& s : time_hand_over(queue, gap, calls)) {
    seconds.first.push_back(s.there);
    seconds.second.push_back(s.back);
  }
  return seconds;
}

}  // namespace

void bind_probe(py::module_& m) {
  py::module_ p = m.def_submodule("probe");
  p.def("instructions", [] {
    std::vector<std::string> names;
    for (const Instruction* instruction : instructions()) names.emplace_back(instruction->name);
    return names;
  }, "Instructions whose peak can be measured here, widest first.");
  py::class_<Roofs>(p, "Roofs")
      .def(py::init<int, int64_t>(), py::arg("threads") = 0, py::arg("nbytes") = 0, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("threads", &Roofs::threads)
      .def_property_readonly("nbytes", &Roofs::bytes)
      .def("read", &Roofs::read, py::call_guard<py::gil_scoped_release>(), "Bytes per second of one pass over the memory.")
      .def("peak", &Roofs::peak, py::arg("instruction"), py::call_guard<py::gil_scoped_release>(),
           "Multiplies and adds per second, all threads.");
  p.def("fork_join", &fork_join, py::arg("threads"), py::arg("tasks"), py::arg("body"), py::arg("gap"), py::arg("calls"),
        "Seconds of each call of a new pool: tasks that are busy for `body` seconds, `gap` seconds after the last call.");
  p.def("hand_over", &hand_over, py::arg("gap"), py::arg("calls"),
        "Seconds from submit to the start of an empty job, and to the return of wait: two lists.");
}

}  // namespace hetero
