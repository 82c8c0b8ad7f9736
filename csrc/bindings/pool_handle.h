#pragma once
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "moe/host_pool.h"

namespace hetero {

// Python's HostPool: the C++ one until close().
class PoolHandle {
 public:
  PoolHandle(int threads, const std::optional<std::string>& isa, const std::vector<int>& nodes)
      : pool_(std::make_shared<HostPool>(threads, isa ? isa->c_str() : nullptr, nodes)) {}
  std::shared_ptr<HostPool> get() const {
    CHECK(pool_ != nullptr, "this host pool is closed");
    return pool_;
  }
  void close() {
    auto pool = std::exchange(pool_, nullptr);  // with the GIL, which guards pool_
    py::gil_scoped_release release;             // the queue finishes its jobs first
    pool.reset();
  }

 private:
  std::shared_ptr<HostPool> pool_;
};

}  // namespace hetero
