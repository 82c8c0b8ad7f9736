#include <memory>
#include <utility>

#include "bindings/pool_handle.h"
#include "moe/moe_layer.h"
#include "moe/stream_calls.h"

namespace hetero {
namespace {

// One layer on one pool; shares the weights with Python, asks the handle for the pool at each call.
struct LayerHandle {
  std::shared_ptr<PoolHandle> pool;
  std::shared_ptr<ExpertWeights> weights;
};

struct Arrays {
  py::array x, ids, weights, y;
};

MoeCall checked_call(const ExpertWeights& weights, Arrays& a) {
  const int64_t hidden = weights.layout().hidden;
  CHECK(a.x.ndim() == 2, "x has shape ", shape_text(a.x), ", must be [tokens, ", hidden, "]");
  const bool bf16 = a.x.dtype().equal(py::dtype::of<int16_t>());
  const bool wide = a.ids.dtype().equal(py::dtype::of<int64_t>());
  const int64_t tokens = a.x.shape(0);
  bf16 ? check_array<int16_t>("x", a.x, {tokens, hidden}) : check_array<float>("x", a.x, {tokens, hidden});
  wide ? check_array<int64_t>("topk_ids", a.ids, {tokens, -1}) : check_array<int32_t>("topk_ids", a.ids, {tokens, -1});
  const int64_t slots = a.ids.shape(1);
  check_array<float>("topk_weights", a.weights, {tokens, slots});
  check_array<float>("y", a.y, {tokens, hidden});
  const Routing routing{a.ids.data(), wide, static_cast<const float*>(a.weights.data()), tokens, slots};
  return {a.x.data(), bf16, routing, writable<float>("y", a.y)};
}

void forward(const LayerHandle& layer, py::array x, py::array ids, py::array weights, py::array y) {
  Arrays arrays{std::move(x), std::move(ids), std::move(weights), std::move(y)};
  const MoeCall call = checked_call(*layer.weights, arrays);
  const MoeLayer moe(layer.pool->get(), layer.weights);
  py::gil_scoped_release release;
  moe.forward(call);
}

// Python's StreamCalls: keeps each slot's arrays until the slot's next call.
class StreamHandle {
 public:
  StreamHandle(uintptr_t stream, const std::string& library)
      : calls_(std::make_unique<StreamCalls>(CudaRuntime(library), reinterpret_cast<void*>(stream))) {}
  ~StreamHandle() {
    py::gil_scoped_release release;
    calls_.reset();
  }
  StreamHandle(const StreamHandle&) = delete;

  int64_t take() {
    py::gil_scoped_release release;
    return calls_->take();
  }
  void submit(int64_t ticket, const LayerHandle& layer, py::array x, py::array ids, py::array weights, py::array y) {
    Arrays arrays{std::move(x), std::move(ids), std::move(weights), std::move(y)};
    const MoeCall call = checked_call(*layer.weights, arrays);
    MoeLayer moe(layer.pool->get(), layer.weights);
    {
      py::gil_scoped_release release;
      calls_->submit(ticket, std::move(moe), call);
    }
    arrays_[ticket % StreamCalls::kSlots] = std::move(arrays);
  }
  void wait(int64_t ticket) {
    py::gil_scoped_release release;
    calls_->wait(ticket);
  }
  void check() {
    py::gil_scoped_release release;
    calls_->check();
  }
  void close() {
    py::gil_scoped_release release;
    calls_->close();
  }

 private:
  std::array<Arrays, StreamCalls::kSlots> arrays_;
  std::unique_ptr<StreamCalls> calls_;
};

}  // namespace

void bind_moe(py::module_& m) {
  py::class_<PoolHandle, std::shared_ptr<PoolHandle>>(m, "HostPool")
      .def(py::init<int, const std::optional<std::string>&, const std::vector<int>&>(), py::arg("threads"), py::arg("isa"),
           py::arg("nodes") = std::vector<int>())
      .def_property_readonly("threads", [](const PoolHandle& p) { return p.get()->threads.threads(); })
      .def_property_readonly("thread_groups", [](const PoolHandle& p) { return group_pairs(p.get()->thread_groups); })
      .def_property_readonly("isa", [](const PoolHandle& p) { return p.get()->kernels.name; })
      .def("close", &PoolHandle::close);
  py::class_<LayerHandle>(m, "MoeLayer")
      .def(py::init<std::shared_ptr<PoolHandle>, std::shared_ptr<ExpertWeights>>(), py::arg("pool"), py::arg("weights"))
      .def("forward", &forward, py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"), py::arg("y"));
  py::class_<StreamHandle>(m, "StreamCalls")
      .def(py::init<uintptr_t, const std::string&>(), py::arg("stream"), py::arg("library"))
      .def("take", &StreamHandle::take)
      .def("submit", &StreamHandle::submit, py::arg("ticket"), py::arg("layer"), py::arg("x"), py::arg("topk_ids"),
           py::arg("topk_weights"), py::arg("y"))
      .def("wait", &StreamHandle::wait, py::arg("ticket"))
      .def("check", &StreamHandle::check)
      .def("close", &StreamHandle::close)
      .def_property_readonly_static("SLOTS", [](const py::object&) { return StreamCalls::kSlots; });
}

}  // namespace hetero
