// The extension's parts, and how tensors come in: as numpy arrays over the tensors' memory, checked here for type, shape and
// contiguity. bf16 has no numpy type and comes as int16. Nothing below bindings/ includes Python.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "cpu/topology.h"

namespace hetero {

namespace py = pybind11;

void bind_cpu(py::module_& m);
void bind_weights(py::module_& m);
void bind_moe(py::module_& m);
void bind_dense(py::module_& m);
void bind_probe(py::module_& m);
void bind_testing(py::module_& m);
void bind_planted(py::module_& m);  // in builds with a sanitizer

// (node, CPU of each thread) of each group, -1 for any.
inline std::vector<std::pair<int, std::vector<int>>> group_pairs(const std::vector<ThreadGroup>& groups) {
  std::vector<std::pair<int, std::vector<int>>> pairs;
  for (const ThreadGroup& group : groups) pairs.emplace_back(group.node, group.cpus);
  return pairs;
}

inline std::string shape_text(const py::array& a) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < a.ndim(); i++) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + "]";
}

// Throws unless `a` is C-contiguous, of that shape (-1 = any) and of element type T.
template <class T> void check_array(const char* name, const py::array& a, std::initializer_list<int64_t> shape) {
  bool fits = a.ndim() == static_cast<py::ssize_t>(shape.size());
  std::string wanted;
  py::ssize_t i = 0;
  for (int64_t n : shape) {
    fits = fits && (n < 0 || a.shape(i) == n);
    wanted += (i++ ? ", " : "") + (n < 0 ? std::string("*") : std::to_string(n));
  }
  CHECK(fits, name, " has shape ", shape_text(a), ", must be [", wanted, "]");
  CHECK(a.dtype().equal(py::dtype::of<T>()), name, " holds elements of type ",
        std::string(py::str(a.dtype())), ", must be ", std::string(py::str(py::dtype::of<T>())));
  CHECK((a.flags() & py::array::c_style) != 0, name, " is not contiguous");
}

template <class T> T* writable(const char* name, py::array& a) {
  CHECK(a.writeable(), name, " is read-only");
  return static_cast<T*>(a.mutable_data());
}

}  // namespace hetero
