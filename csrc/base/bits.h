// Reinterpreting 32 bits as a float and back. Internal linkage: this header is compiled into objects of every ISA, and a
// shared copy could be the AVX-512 one. __builtin_bit_cast instead of std::bit_cast for the same reason.
#pragma once
#include <cstdint>

namespace hetero {
namespace {

[[maybe_unused]] constexpr float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
[[maybe_unused]] constexpr uint32_t as_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

}  // namespace
}  // namespace hetero
