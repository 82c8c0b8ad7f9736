// `_C.planted`: bugs on purpose, only in a build with a sanitizer, so that a test can see that it finds them.
#include <cstdlib>
#include <limits>
#include <thread>

#include "bindings/bindings.h"

namespace hetero {
namespace {

int unguarded = 0;  // written by two threads

int race() {
  const auto count = [] {
    for (int i = 0; i < 1000; i++) unguarded++;
  };
  std::thread other(count);
  count();
  other.join();
  return unguarded;
}

int beyond_the_heap(int index) {
  int* volatile values = static_cast<int*>(std::calloc(4, sizeof(int)));  // volatile: the compiler must not see the size
  const int value = values[index];
  std::free(values);
  return value;
}

int overflow(int step) { return std::numeric_limits<int>::max() + step; }

}  // namespace

void bind_planted(py::module_& m) {
  py::module_ p = m.def_submodule("planted");
  p.def("race", &race, py::call_guard<py::gil_scoped_release>());
  p.def("beyond_the_heap", &beyond_the_heap);
  p.def("overflow", &overflow);
}

}  // namespace hetero
