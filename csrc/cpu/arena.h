// Anonymous zeroed memory for weights and scratch, 2 MiB aligned and offered to the kernel for huge pages. Pages appear when
// first written. With one NUMA node given they are bound to it, with several they are interleaved over them; with none, or
// where the kernel refuses (containers often do), the default policy places them.
#pragma once
#include <cstdint>
#include <vector>

namespace hetero {

class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes, const std::vector<int>& nodes = {});  // throws std::bad_alloc
  ~Arena();
  Arena(Arena&& other) noexcept { swap(other); }
  Arena& operator=(Arena&& other) noexcept {
    swap(other);
    return *this;
  }

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  bool placed() const { return placed_; }  // whether the kernel took the nodes

 private:
  void swap(Arena& other) noexcept;

  uint8_t* mapping_ = nullptr;
  uint8_t* data_ = nullptr;
  int64_t mapped_ = 0, bytes_ = 0;
  bool placed_ = true;
};

// Shows bytes [offset, offset + bytes) of an open file in place of the memory at `at`, which stays mapped after the file is
// closed. Pages are read when first touched; a write copies the page and never reaches the file. Everything is in whole
// pages. Throws if the range leaves the file or the kernel refuses.
void map_file(uint8_t* at, int64_t bytes, int file, int64_t offset);

}  // namespace hetero
