// The dense part's objects keep the arrays that they were made of; what a call writes to is checked at the call.
#include <memory>
#include <optional>
#include <utility>

#include "bindings/pool_handle.h"
#include "dense/attend.h"
#include "dense/attention.h"
#include "dense/feed_forward.h"

namespace hetero {
namespace {

bool is_bf16(const char* name, const py::array& a) {
  const bool bf16 = a.dtype().equal(py::dtype::of<int16_t>());
  if (!bf16) check_array<float>(name, a, {-1, -1});
  else check_array<int16_t>(name, a, {-1, -1});
  return bf16;
}

// What an object is made of, kept for as long as it lives.
class Kept {
 public:
  Matrix matrix(const char* name, const std::optional<py::array>& a, int64_t rows, int64_t cols) {
    CHECK(a.has_value(), name, " is missing");
    const bool bf16 = is_bf16(name, *a);
    CHECK(a->shape(0) == rows && a->shape(1) == cols, name, " has shape ", shape_text(*a), ", must be [", rows, ", ", cols, "]");
    arrays_.push_back(*a);
    return {a->data(), bf16, rows, cols};
  }
  const float* vector(const char* name, const std::optional<py::array>& a, int64_t count) {
    CHECK(a.has_value(), name, " is missing");
    check_array<float>(name, *a, {count});
    arrays_.push_back(*a);
    return static_cast<const float*>(a->data());
  }

 private:
  std::vector<py::array> arrays_;
};

Floats float_rows(const char* name, py::array& a, int64_t rows, int64_t cols) {
  check_array<float>(name, a, {rows, cols});
  return {writable<float>(name, a), cols};
}

// Python's workspace: a pool's, made at the first call.
struct WorkspaceHandle {
  std::shared_ptr<PoolHandle> handle;
  std::unique_ptr<Workspace> space;

  // Calls work(workspace) without the GIL.
  template <class Work> void run(Work work) {
    const std::shared_ptr<HostPool> pool = handle->get();
    if (space == nullptr) space = std::make_unique<Workspace>(*pool);
    py::gil_scoped_release release;
    std::lock_guard turn(pool->turn);
    work(*space);
  }
};
using SharedSpace = std::shared_ptr<WorkspaceHandle>;

// `kept`: of a row's `width` values those that FP8 leaves as they are.
Keys cached_keys(const char* name, py::array& a, int64_t width, int64_t kept, const Step& step) {
  Keys keys{nullptr, KeyType::fp8, width, kept};
  if (a.dtype().equal(py::dtype::of<uint8_t>())) check_array<uint8_t>(name, a, {-1, -1});
  else keys.type = is_bf16(name, a) ? KeyType::bf16 : KeyType::fp32;
  const int64_t slot = step.rows() > 0 ? *std::max_element(step.slots.begin(), step.slots.end()) : -1;
  const bool fits = a.shape(1) == keys.elements() && slot < a.shape(0);
  CHECK(fits, name, " has shape ", shape_text(a), ", must be [more than ", slot, ", ", keys.elements(), "]");
  CHECK(a.writeable(), name, " is read-only");
  keys.data = a.mutable_data();
  return keys;
}

struct StepHandle {
  std::vector<py::array> contexts;
  Step step;

  void select(WorkspaceHandle& space, py::array q, py::array weights, py::array keys) {
    const Queries queries = queries_of(q);
    const Floats of_heads = float_rows("weights", weights, step.rows(), queries.heads);
    const Keys read = cached_keys("keys", keys, q.shape(2), 0, step);
    space.run([&](Workspace& work) { hetero::select(work, step, read, queries, of_heads); });
  }
  void attend(WorkspaceHandle& space, py::array q, py::array keys, float scale, py::array out) {
    const Queries queries = queries_of(q);
    check_array<float>("out", out, {step.rows(), queries.heads, -1});
    const int64_t latent = out.shape(2);
    CHECK(latent <= q.shape(2), "out has ", latent, " columns, more than the keys' ", q.shape(2));
    const Keys read = cached_keys("keys", keys, q.shape(2), q.shape(2) - latent, step);
    float* mixed = writable<float>("out", out);
    space.run([&](Workspace& work) { hetero::attend(work, step, read, queries, scale, {mixed, latent}); });
  }

 private:
  Queries queries_of(py::array& q) const {  // [rows][heads][keys' width]
    CHECK(step.attending() == step.rows(), step.attending(), " of ", step.rows(), " rows attend, all must");
    check_array<float>("q", q, {step.rows(), -1, -1});
    return {{writable<float>("q", q), q.shape(1) * q.shape(2)}, q.shape(1)};
  }
};

StepHandle make_step(const py::array& positions, const py::array& slots, const std::vector<std::pair<int64_t, py::array>>& runs,
                     int64_t rope, double theta, int64_t topk) {
  check_array<int64_t>("positions", positions, {-1});
  const int64_t rows = positions.shape(0);
  check_array<int64_t>("slots", slots, {rows});
  const auto* first = static_cast<const int64_t*>(positions.data());
  std::vector<py::array> contexts;
  std::vector<Run> read;
  int64_t row = 0;
  for (const auto& [count, context] : runs) {
    check_array<int64_t>("context", context, {-1});
    row += count;
    CHECK(count > 0 && row <= rows, "the runs have ", row, " rows, more than the step's ", rows);
    const int64_t last = first[row - 1], known = context.shape(0);
    CHECK(last < known, "position ", last, " is not among the ", known, " of its context");
    contexts.push_back(context);
    read.push_back({count, static_cast<const int64_t*>(context.data())});
  }
  const auto* slot = static_cast<const int64_t*>(slots.data());
  return {std::move(contexts), Step({first, first + rows}, {slot, slot + rows}, read, rope, theta, topk)};
}

class AttentionHandle {
 public:
  AttentionHandle(SharedSpace space, const py::dict& sizes, const py::dict& arrays) : space_(std::move(space)) {
    const auto size = [&](const char* name) { return sizes[name].cast<int64_t>(); };
    const auto number = [&](const char* name) { return sizes[name].cast<float>(); };
    const auto array = [&](const char* name) { return arrays[name].cast<std::optional<py::array>>(); };
    const auto matrix = [&](const char* name, int64_t rows, int64_t cols) { return kept_.matrix(name, array(name), rows, cols); };
    const auto vector = [&](const char* name, int64_t count) { return kept_.vector(name, array(name), count); };
    hidden_ = size("hidden");
    shape_ = {size("heads"), size("nope"), size("rope"), size("v"), size("latent"), size("q_lora"), size("index_heads"),
              size("index_dim"), number("norm_eps"), number("latent_eps"), number("index_eps"), number("scale")};
    const AttentionShape& s = shape_;
    const int64_t index_heads = s.index_heads, keys = s.latent + s.rope + s.index_dim;
    AttentionWeights w{};
    w.input_norm = vector("input_norm", hidden_), w.q_norm = vector("q_norm", s.q_lora), w.kv_norm = vector("kv_norm", s.latent);
    w.down = matrix("down", keys + s.q_lora + index_heads, hidden_);
    w.q_b = matrix("q_b", s.heads * (s.nope + s.rope), s.q_lora);
    w.w_uk = matrix("w_uk", s.heads * s.nope, s.latent), w.w_uv = matrix("w_uv", s.heads * s.v, s.latent);
    w.o = matrix("o", hidden_, s.heads * s.v);
    if (index_heads > 0) {
      w.index_norm = vector("index_norm", s.index_dim), w.index_bias = vector("index_bias", s.index_dim);
      w.index_q = matrix("index_q", index_heads * s.index_dim, s.q_lora);
    }
    attention_ = std::make_unique<Attention>(s, w);
  }

  void forward(StepHandle& handle, py::array x, py::array latents, std::optional<py::array> index) {
    Step& step = handle.step;
    CHECK(step.rope == shape_.rope, "the step turns ", step.rope, " values, the layer ", shape_.rope);
    CHECK(index.has_value() == (shape_.index_heads > 0), "an indexer's keys go with an indexer");
    const Floats stream = float_rows("x", x, step.rows(), hidden_);
    const Keys cached = cached_keys("latents", latents, shape_.latent + shape_.rope, shape_.rope, step);
    const Keys of_index = index ? cached_keys("index", *index, shape_.index_dim, 0, step) : Keys{};
    space_->run([&](Workspace& space) { attention_->forward({space, step, stream, cached, of_index}); });
  }

 private:
  SharedSpace space_;
  Kept kept_;
  int64_t hidden_ = 0;
  AttentionShape shape_{};
  std::unique_ptr<Attention> attention_;
};

class FeedForwardHandle {
 public:
  FeedForwardHandle(SharedSpace space, py::array norm, float eps, py::array gate_up, py::array down)
      : space_(std::move(space)), hidden_(norm.shape(0)) {
    const int64_t intermediate = down.ndim() == 2 ? down.shape(1) : 0;
    weights_.norm = kept_.vector("norm", norm, hidden_), weights_.norm_eps = eps;
    weights_.gate_up = kept_.matrix("gate_up", gate_up, 2 * intermediate, hidden_);
    weights_.down = kept_.matrix("down", down, hidden_, intermediate);
  }
  void set_router(py::array router, py::array bias, int64_t topk, std::pair<int64_t, int64_t> groups, bool normalise,
                  float scale) {
    const int64_t experts = bias.shape(0);
    CHECK(groups.first > 0 && experts % groups.first == 0, experts, " experts do not divide into ", groups.first, " groups");
    const int64_t eligible = experts / groups.first * groups.second;
    CHECK(topk > 0 && topk <= eligible, "top ", topk, " of ", eligible, " eligible experts");
    weights_.router = kept_.matrix("router", router, experts, hidden_);
    weights_.bias = kept_.vector("bias", bias, experts);
    router_ = {topk, groups.first, groups.second, normalise, scale};
  }

  void begin(py::array x, py::array normed, std::optional<py::array> ids, std::optional<py::array> weights) {
    const int64_t rows = x.shape(0);
    const FeedForward layer(weights_, router_);
    CHECK(layer.routes() == (ids.has_value() && weights.has_value()), "a router's ids and weights go with a router");
    const Floats in = float_rows("x", x, rows, hidden_), out = float_rows("normed", normed, rows, hidden_);
    if (ids) check_array<int64_t>("ids", *ids, {rows, router_.topk});
    if (weights) check_array<float>("weights", *weights, {rows, router_.topk});
    int64_t* to_ids = ids ? writable<int64_t>("ids", *ids) : nullptr;
    float* to_weights = ids ? writable<float>("weights", *weights) : nullptr;
    space_->run([&](Workspace& space) { layer.begin(space, in, rows, out, to_ids, to_weights); });
    begun_ = rows;
  }
  void end(py::array x, std::optional<py::array> routed) {
    const int64_t rows = x.shape(0);
    CHECK(begun_ == rows, "end() of ", rows, " rows, begin() had ", begun_);
    const Floats out = float_rows("x", x, rows, hidden_);
    if (routed) check_array<float>("routed", *routed, {rows, hidden_});
    const float* sum = routed ? static_cast<const float*>(routed->data()) : nullptr;
    space_->run([&](Workspace& space) { FeedForward(weights_, router_).end(space, out, rows, sum); });
  }

 private:
  SharedSpace space_;
  Kept kept_;
  int64_t hidden_, begun_ = 0;
  FeedForwardWeights weights_{};
  RouterShape router_{};
};

class ProductHandle {
 public:
  ProductHandle(SharedSpace space, py::array w) : space_(std::move(space)) { w_ = kept_.matrix("w", w, w.shape(0), w.shape(1)); }
  void forward(py::array x, py::array y) {
    const int64_t rows = x.shape(0);
    const Floats in = float_rows("x", x, rows, w_.cols), out = float_rows("y", y, rows, w_.rows);
    space_->run([&](Workspace& space) { multiply(space, w_, in, rows, out); });
  }

 private:
  SharedSpace space_;
  Kept kept_;
  Matrix w_;
};

class NormHandle {
 public:
  NormHandle(SharedSpace space, py::array weight, float eps) : space_(std::move(space)), eps_(eps), width_(weight.shape(0)) {
    weight_ = kept_.vector("weight", weight, width_);
  }
  void forward(py::array x, py::array y) {
    const int64_t rows = x.shape(0);
    const Floats in = float_rows("x", x, rows, width_), out = float_rows("y", y, rows, width_);
    space_->run([&](Workspace& space) {
      for (int64_t t = 0; t < rows; t++) space.kernels().rms_norm({in[t], weight_, width_, eps_, out[t]});
    });
  }

 private:
  SharedSpace space_;
  Kept kept_;
  float eps_;
  int64_t width_;
  const float* weight_;
};

}  // namespace

void bind_dense(py::module_& m) {
  m.attr("KEY_GROUP") = kKeyGroup;
  py::class_<WorkspaceHandle, SharedSpace>(m, "DenseWorkspace")
      .def(py::init([](std::shared_ptr<PoolHandle> pool) { return std::make_shared<WorkspaceHandle>(std::move(pool)); }),
           py::arg("pool"));
  py::class_<StepHandle>(m, "DenseStep")
      .def(py::init(&make_step), py::arg("positions"), py::arg("slots"), py::arg("runs"), py::arg("rope"), py::arg("theta"),
           py::arg("topk"))
      .def("select", &StepHandle::select, py::arg("workspace"), py::arg("q"), py::arg("weights"), py::arg("keys"))
      .def("attend", &StepHandle::attend, py::arg("workspace"), py::arg("q"), py::arg("keys"), py::arg("scale"), py::arg("out"));
  py::class_<AttentionHandle>(m, "DenseAttention")
      .def(py::init<SharedSpace, const py::dict&, const py::dict&>(), py::arg("workspace"), py::arg("sizes"), py::arg("arrays"))
      .def("forward", &AttentionHandle::forward, py::arg("step"), py::arg("x"), py::arg("latents"), py::arg("index"));
  py::class_<FeedForwardHandle>(m, "DenseFeedForward")
      .def(py::init<SharedSpace, py::array, float, py::array, py::array>(), py::arg("workspace"), py::arg("norm"), py::arg("eps"),
           py::arg("gate_up"), py::arg("down"))
      .def("set_router", &FeedForwardHandle::set_router, py::arg("router"), py::arg("bias"), py::arg("topk"), py::arg("groups"),
           py::arg("normalise"), py::arg("scale"))
      .def("begin", &FeedForwardHandle::begin, py::arg("x"), py::arg("normed"), py::arg("ids"), py::arg("weights"))
      .def("end", &FeedForwardHandle::end, py::arg("x"), py::arg("routed"));
  py::class_<ProductHandle>(m, "DenseProduct")
      .def(py::init<SharedSpace, py::array>(), py::arg("workspace"), py::arg("w"))
      .def("forward", &ProductHandle::forward, py::arg("x"), py::arg("y"));
  py::class_<NormHandle>(m, "DenseNorm")
      .def(py::init<SharedSpace, py::array, float>(), py::arg("workspace"), py::arg("weight"), py::arg("eps"))
      .def("forward", &NormHandle::forward, py::arg("x"), py::arg("y"));
}

}  // namespace hetero
