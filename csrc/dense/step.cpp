#include "dense/step.h"

#include <cmath>
#include <utility>

namespace hetero {

Step::Step(std::vector<int64_t> positions, std::vector<int64_t> slots, const std::vector<Run>& runs, int64_t rope, double theta,
           int64_t topk)
    : rope(rope),
      topk(topk),
      positions(std::move(positions)),
      slots(std::move(slots)),
      contexts(rows(), nullptr),
      seen(rows(), 0),
      theta_(theta) {
  for (const Run& run : runs)
    for (int64_t i = 0; i < run.rows; i++, attending_++) {
      contexts[attending_] = run.context;
      seen[attending_] = this->positions[attending_] + 1;
      any_long_ = any_long_ || is_long(attending_);
    }
}

void Step::make_rotation() {
  if (!rotation_.empty()) return;
  rotation_.resize(rows() * rope);
  for (int64_t j = 0; j < rope; j += 2) {
    const double frequency = std::pow(theta_, -static_cast<double>(j) / static_cast<double>(rope));
    for (int64_t t = 0; t < rows(); t++) {
      const double angle = static_cast<double>(positions[t]) * frequency;
      rotation_[t * rope + j] = static_cast<float>(std::cos(angle));
      rotation_[t * rope + j + 1] = static_cast<float>(std::sin(angle));
    }
  }
}

void Step::turn(int64_t row, float* x) const {
  const float* r = rotation_.data() + row * rope;
  for (int64_t j = 0; j < rope; j += 2) {
    const float a = x[j], b = x[j + 1];
    x[j] = a * r[j] - b * r[j + 1];
    x[j + 1] = a * r[j + 1] + b * r[j];
  }
}

}  // namespace hetero
