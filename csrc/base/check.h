// CHECK(condition, parts...): a false condition throws std::invalid_argument with the parts joined into one sentence,
// which Python sees as ValueError. Never used inside kernel/isa (std::string has external linkage).
#pragma once
#include <sstream>
#include <stdexcept>

namespace hetero {

template <class... Parts> [[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::invalid_argument(sentence.str());
}

}  // namespace hetero

#define CHECK(condition, ...) \
  do { \
    if (!(condition)) [[unlikely]] ::hetero::refuse(__VA_ARGS__); \
  } while (0)
