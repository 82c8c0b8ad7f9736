// The model's dense part on CPU cores, for steps of few rows, and the attention of longer ones: what its layers share. A
// matrix is used as it lies in memory, in fp32 or bf16; activations, sums and the residual stream are fp32. A workspace
// serves one model and one thread.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/round.h"
#include "format/format.h"
#include "moe/host_pool.h"

namespace hetero {

struct Matrix {  // [rows][cols]; someone else's memory
  const void* data = nullptr;
  bool bf16 = false;
  int64_t rows = 0, cols = 0;

  RowMatrix from(int64_t row) const {
    return {static_cast<const char*>(data) + row * cols * (bf16 ? 2 : 4), bf16, cols, nullptr};
  }
};

// [rows][stride] floats of a buffer.
struct Floats {
  float* data;
  int64_t stride;
  float* operator[](int64_t row) const { return data + row * stride; }
  Floats from(int64_t column) const { return {data + column, stride}; }
};

// A buffer that a call shapes before it uses it; its contents are whatever was there.
class FloatBuffer {
 public:
  Floats shape(int64_t rows, int64_t stride) {
    memory_.reserve(rows * stride);
    return {memory_.data(), stride};
  }
  float* data() { return memory_.data(); }

 private:
  ScratchBuffer<float> memory_;
};

struct alignas(128) WorkerScores : FloatBuffer {};  // of one task

struct Workspace {
  explicit Workspace(HostPool& pool) : pool(pool), workers(pool.threads.threads()) {}
  const RowKernels& kernels() const { return pool.kernels.rows; }

  HostPool& pool;
  FloatBuffer normed, projected, queries, absorbed, mixed, heads, index_queries, index_scores, decoded, hidden;
  std::vector<WorkerScores> workers;

  uint16_t* rounded(int64_t count) {  // room for the inputs of one product
    rounded_.reserve(count);
    return rounded_.data();
  }

 private:
  ScratchBuffer<uint16_t> rounded_;
};

constexpr int64_t kProductRows = 8;  // rows of a matrix that a thread takes at least

// Rows of W for each task, so that every thread gets some tasks.
inline int64_t product_rows(int64_t rows, int64_t threads) {
  return round_up(std::max<int64_t>(rows / (threads * 4), 1), kProductRows);
}

// Inputs [tokens][cols] in a matrix's type.
struct Inputs {
  const void* data;
  bool bf16;
  int64_t stride, tokens;

  // y[t] = rows [begin, begin + count) of W times input t, or that much more if `add`.
  void multiply(const RowKernels& kernels, const Matrix& w, int64_t begin, int64_t count, Floats y, bool add = false) const {
    kernels.dot({w.from(begin), count, w.cols, data, bf16, stride, tokens, y.data, y.stride, add});
  }
};

inline Inputs inputs_for(Workspace& space, const Matrix& w, Floats x, int64_t tokens) {
  if (!w.bf16) return {x.data, false, x.stride, tokens};
  uint16_t* rounded = space.rounded(tokens * w.cols);
  for (int64_t t = 0; t < tokens; t++) space.kernels().round(x[t], w.cols, rounded + t * w.cols);
  return {rounded, true, w.cols, tokens};
}

// y[t] = W x[t], or that much more if `add`.
inline void multiply(Workspace& space, const Matrix& w, Floats x, int64_t tokens, Floats y, bool add = false) {
  const Inputs inputs = inputs_for(space, w, x, tokens);
  const int64_t rows = product_rows(w.rows, space.pool.threads.threads());
  space.pool.threads.for_each(ceil_div(w.rows, rows), [&](int, int64_t task) {
    const int64_t begin = task * rows;
    inputs.multiply(space.kernels(), w, begin, std::min(rows, w.rows - begin), y.from(begin), add);
  });
}

}  // namespace hetero
