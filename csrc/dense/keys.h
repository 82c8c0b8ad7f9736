// Cached keys: slots, each a row in one format. model/key_store.py has the formats' layouts and their truth.
#pragma once
#include <cstdint>

#include "kernel/kernels.h"

namespace hetero {

constexpr int64_t kKeyGroup = 128;  // values of an FP8 row under one scale

enum class KeyType { fp32, bf16, fp8 };

struct Keys {
  void* data = nullptr;
  KeyType type = KeyType::fp32;
  int64_t width = 0;  // values of a row
  int64_t kept = 0;   // of them the last, which an FP8 row holds in bf16

  bool plain() const { return type != KeyType::fp8; }
  RowMatrix at(const int64_t* slots) const { return {data, type == KeyType::bf16, width, slots}; }  // of plain keys

  int64_t elements() const;  // of a row in memory: its values, or the bytes of FP8
  void store(int64_t slot, const float* x) const;
  void decode(const RowKernels& kernels, int64_t slot, float* x) const;  // of FP8
};

}  // namespace hetero
