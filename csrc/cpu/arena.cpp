#include "cpu/arena.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <utility>

#include "base/check.h"

namespace hetero {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int kBits = 64, kMostNodes = 1024;

bool place(void* data, int64_t bytes, const std::vector<int>& nodes) {
  if (nodes.empty()) return true;
  for (int node : nodes) CHECK(node >= 0 && node < kMostNodes, "NUMA node ", node, " is outside 0..", kMostNodes - 1);
  const int highest = *std::max_element(nodes.begin(), nodes.end());
  std::vector<unsigned long> mask(highest / kBits + 1);
  for (int node : nodes) mask[node / kBits] |= 1UL << (node % kBits);
  const int policy = nodes.size() == 1 ? MPOL_BIND : MPOL_INTERLEAVE;
  return syscall(SYS_mbind, data, bytes, policy, mask.data(), mask.size() * kBits + 1, 0) == 0;
}

}  // namespace

Arena::Arena(int64_t bytes, const std::vector<int>& nodes) : bytes_(bytes) {
  mapped_ = bytes + kHugePage;
  void* mapping = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<uint8_t*>(mapping);
  const auto address = reinterpret_cast<uintptr_t>(mapping);
  data_ = mapping_ + (kHugePage - address % kHugePage) % kHugePage;
  if (bytes >= kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);
  placed_ = place(data_, bytes, nodes);
}

Arena::~Arena() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_);
}

void Arena::swap(Arena& other) noexcept {
  std::swap(mapping_, other.mapping_);
  std::swap(data_, other.data_);
  std::swap(mapped_, other.mapped_);
  std::swap(bytes_, other.bytes_);
  std::swap(placed_, other.placed_);
}

void map_file(uint8_t* at, int64_t bytes, int file, int64_t offset) {
  const int64_t page = sysconf(_SC_PAGESIZE), address = reinterpret_cast<intptr_t>(at);
  CHECK(address % page == 0 && bytes % page == 0 && offset % page == 0, "cannot map ", bytes, " bytes at offset ", offset,
        ": not whole pages of ", page, " bytes");
  struct stat facts;
  CHECK(fstat(file, &facts) == 0, "cannot map file ", file, ": ", std::strerror(errno));
  CHECK(offset >= 0 && offset + bytes <= facts.st_size, "bytes ", offset, " to ", offset + bytes, " leave the file, which has ",
        facts.st_size);
  constexpr int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
  CHECK(mmap(at, bytes, PROT_READ | PROT_WRITE, flags, file, offset) == at, "cannot map the file: ", std::strerror(errno));
}

}  // namespace hetero
