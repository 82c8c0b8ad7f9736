#include "cpu/cuda_runtime.h"

#include <dlfcn.h>
#include <link.h>

#include <sstream>
#include <stdexcept>

namespace hetero {
namespace {

constexpr const char* kSonames[] = {"libcudart.so.13", "libcudart.so.12", "libcudart.so"};
constexpr const char* kEntry = "cudaLaunchHostFunc";
constexpr int kNotReady = 600;  // cudaErrorNotReady: the stream still works

template <class... Parts> [[noreturn]] void fail_with(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// The path of a loaded library called libcudart*, or nothing. Python loads its modules out of the sight of dlsym.
std::string loaded_runtime() {
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        const std::string name = info->dlpi_name;
        if (name.find("libcudart", name.rfind('/') + 1) == std::string::npos) return 0;
        *static_cast<std::string*>(found) = name;
        return 1;
      },
      &path);
  return path;
}

void* open_runtime(const std::string& library) {
  if (!library.empty()) {
    if (void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
    fail_with("the CUDA runtime cannot be loaded: ", dlerror());
  }
  if (dlsym(RTLD_DEFAULT, kEntry) != nullptr) return RTLD_DEFAULT;
  if (const std::string path = loaded_runtime(); !path.empty())
    if (void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
  std::string tried;
  for (const char* name : kSonames) {
    if (void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return handle;
    tried += std::string(tried.empty() ? "" : ", ") + name;
  }
  fail_with("no CUDA runtime: ", kEntry, " is in no loaded library, no libcudart is loaded, and none of ", tried,
            " can be; install a torch built for CUDA, or use --device cpu");
}

template <class Function> void find(void* handle, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(handle, name));
  if (function == nullptr) fail_with("the CUDA runtime has no ", name, ": ", dlerror());
}

}  // namespace

CudaRuntime::CudaRuntime(const std::string& library) {
  void* handle = open_runtime(library);
  find(handle, kEntry, launch_host_func_);
  find(handle, "cudaStreamQuery", stream_query_);
  find(handle, "cudaGetLastError", last_error_);
  find(handle, "cudaGetErrorName", error_name_);
}

void CudaRuntime::launch(void* stream, HostFunction function, void* argument) const {
  if (const int error = launch_host_func_(stream, function, argument)) {
    last_error_();
    fail(kEntry, error);
  }
}

void CudaRuntime::check(void* stream) const {
  const int error = stream_query_(stream);
  if (error != 0) last_error_();  // or the next launch of torch's on this thread would be blamed for it
  if (error != 0 && error != kNotReady) fail("the stream", error);
}

void CudaRuntime::fail(const char* what, int error) const {
  fail_with("CUDA error ", error, " (", error_name_(error), ") from ", what, ": host experts cannot go on with this stream");
}

}  // namespace hetero
