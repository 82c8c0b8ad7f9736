// The few calls of the CUDA runtime that host experts need, found in the running process, so that neither building nor
// running without a GPU needs CUDA.
#pragma once
#include <string>

namespace hetero {

class CudaRuntime {
 public:
  using HostFunction = void (*)(void*);

  // library: one to load; empty = the runtime that is loaded already (torch's), else libcudart of the loader's paths.
  // Throws std::runtime_error that names what was looked for. The library stays loaded.
  explicit CudaRuntime(const std::string& library);

  // Runs function(argument) on a thread of CUDA's when the stream gets there; it must not call CUDA. Not run at all if the
  // device has failed. Throws std::runtime_error if CUDA refuses.
  void launch(void* stream, HostFunction function, void* argument) const;
  void check(void* stream) const;  // throws std::runtime_error if the stream's device has failed

 private:
  [[noreturn]] void fail(const char* what, int error) const;

  int (*launch_host_func_)(void*, HostFunction, void*);
  int (*stream_query_)(void*);
  int (*last_error_)();  // and forgets it
  const char* (*error_name_)(int);
};

}  // namespace hetero
