// An accelerator made of host threads, so that code for accelerators can be tested without
// one: its device guard, its memory and its kernels.
//
// No stream or thread waits for another unless the program says so, and a test controls how
// long a kernel runs. A read that comes too early returns the old value.
//
// Kernels own the memory they touch, never a tensor: see streams.h on the GIL.

#include "streams.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/SparseTensorUtils.h>
#include <ATen/ops/_coalesced_native.h>
#include <ATen/ops/_indices_native.h>
#include <ATen/ops/_nnz_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_native.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors_native.h>
#include <ATen/ops/_values_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/clone_native.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/dense_dim_native.h>
#include <ATen/ops/empty_native.h>
#include <ATen/ops/indices_native.h>
#include <ATen/ops/is_coalesced_native.h>
#include <ATen/ops/sparse_dim_native.h>
#include <ATen/ops/values_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>

namespace simulated {
namespace {

// ------------------------------------------------------- devices, as PyTorch sees them

thread_local c10::DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, kDevices> current_streams{};

c10::Stream stream_of(c10::Device device, c10::StreamId id) {
  auto index = device.has_index() ? device.index() : current_device;
  return c10::Stream(c10::Stream::UNSAFE, {kSim, index}, id);
}

c10::Stream current_stream(c10::Device device) {
  return stream_of(device, current_streams.at(stream_of(device, 0).device_index()));
}

c10::Stream next_of_ring(c10::Device device, int priority) {
  static std::array<std::atomic<unsigned>, 2> turns{};
  int ring = priority < 0 ? 1 : 0;
  return stream_of(device, kFirstOfRings + ring * kRing + turns.at(ring)++ % kRing);
}

// Limits and habits of other accelerators: see the functions of the same names in the
// module, which tests call.
std::atomic<bool> lacks_new_streams{false}, lacks_events{false};
std::atomic<bool> refuses_events{false}, keeps_first_recording{false};

// Which devices have a context. All, unless a test counts them: then a device gets one when it
// is made current, or is used while it is current.
std::atomic<bool> counts_contexts{false};
std::array<std::atomic<bool>, kDevices> contexts{};

void make_context(c10::DeviceIndex device) { contexts.at(device) = true; }

void check_events() {
  make_context(current_device);
  TORCH_CHECK(!lacks_events, "Backend doesn't support events.");
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return {kSim, current_device}; }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device = device.index();
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() >= 0 && device.index() < kDevices, "there is no ", device);
    if (device.index() == current_device) // as of CUDA 12
      return;
    make_context(device.index());
    current_device = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }

  c10::Stream getStream(c10::Device device) const override { return current_stream(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream_of(device, 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    make_context(stream_of(device, 0).device_index());
    return next_of_ring(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int priority) const override {
    TORCH_CHECK(!lacks_new_streams, "Backend doesn't support create a new Stream.");
    make_context(stream_of(device, 0).device_index());
    return next_of_ring(device, priority);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(stream.device());
    current_streams.at(stream.device_index()) = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override {
    make_context(current_device);
    Queue& queue = queue_of(stream);
    Lock lock(mutex);
    queue.check();
    return queue.steps.empty();
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    synchronize(simulated::record(stream));
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    make_context(current_device); // which is set back to
    for (auto& queue : queues.at(device))
      synchronize(simulated::record(queue));
  }

  // An event holds the mark of its latest recording. It is created by the first one, as
  // CUDA's are.
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    check_events();
    TORCH_CHECK(!refuses_events, "the device is lost");
    auto mark = simulated::record(stream);
    Lock lock(mutex);
    if (*event == nullptr) {
      counters.events_created++;
      *event = new MarkPtr;
    } else if (keeps_first_recording && !(*static_cast<MarkPtr*>(*event))->reached) {
      return;
    }
    *static_cast<MarkPtr*>(*event) = mark;
  }
  static MarkPtr latest(void* event) {
    Lock lock(mutex);
    return *static_cast<MarkPtr*>(event);
  }
  void block(void* event, const c10::Stream& stream) const override {
    check_events();
    TORCH_CHECK(!refuses_events, "the device is lost");
    simulated::block(stream, latest(event));
  }
  bool queryEvent(void* event) const override {
    count(counters.event_queries);
    check_events();
    return query(latest(event));
  }
  void synchronizeEvent(void* event) const override {
    check_events();
    synchronize(latest(event));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    count(counters.events_destroyed);
    delete static_cast<MarkPtr*>(event);
  }

  // Kernels own their memory, so it is not reused while they run.
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---------------------------------------------------------------------------- memory

using Memory = std::shared_ptr<void>;
std::map<const char*, size_t> pinned; // where pinned memory begins, and its size

void release(void* memory) { delete static_cast<Memory*>(memory); }

struct Allocator final : c10::Allocator {
  explicit Allocator(bool pin) : pin(pin) {}
  c10::DataPtr allocate(size_t size) override {
    auto start = static_cast<char*>(::operator new(size));
    if (!pin)
      return {start, new Memory(start, [](char* p) { ::operator delete(p); }), release,
              {kSim, current_device}};
    Lock lock(mutex);
    pinned[start] = size;
    return {start, new Memory(start, unpin), release, c10::kCPU};
  }
  static void unpin(char* start) {
    Lock lock(mutex);
    pinned.erase(start);
    ::operator delete(start);
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
  const bool pin;
};
REGISTER_ALLOCATOR(kSim, new Allocator(false))

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex device) const override {
    return !counts_contexts || contexts.at(device);
  }
  bool isPinnedPtr(const void* address) const override {
    Lock lock(mutex);
    auto after = pinned.upper_bound(static_cast<const char*>(address));
    return after != pinned.begin() && address < std::prev(after)->first + std::prev(after)->second;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static Allocator allocator(true);
    return &allocator;
  }
};

// The same memory as a tensor of the host's, for a kernel to work on. Keeps memory that
// was allocated here alive, and nothing else.
at::Tensor on_host(const at::Tensor& tensor) {
  c10::InferenceMode normal(false); // the thread of the stream is in no such mode
  auto& data = tensor.storage().data_ptr();
  bool ours = data.get_deleter() == release;
  Memory memory = ours ? *static_cast<Memory*>(data.get_context()) : nullptr;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [memory](void*) {},
                       at::dtype(tensor.scalar_type()));
}

// --------------------------------------------------------------------------- kernels

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, c10::GetAllocator(kSim), kKeys,
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, c10::GetAllocator(kSim), kKeys,
                                           c10::dtype_or_default(dtype));
}

// Only for results of other operations: a tensor that grows loses its values.
const at::Tensor& resize_in_place(const at::Tensor& self, at::IntArrayRef size,
                                  std::optional<at::MemoryFormat>) {
  auto bytes = at::detail::computeStorageNbytesContiguous(size, self.itemsize(),
                                                          self.storage_offset());
  if (bytes > self.storage().nbytes()) {
    c10::DeviceGuard guard(self.device());
    self.storage().set_data_ptr_noswap(c10::GetAllocator(kSim)->allocate(bytes));
    self.storage().set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

// As in CUDA: the host never waits for a copy between devices. It waits for a copy from or to
// the host unless the copy is non-blocking, and always until unpinned memory is free again.
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  bool from_device = from.is_privateuseone(), to_device = to.is_privateuseone();
  bool staged = !from_device && !from.is_pinned();
  bool at_once = to_device ? !from_device && !non_blocking : !non_blocking || !to.is_pinned();
  auto stream = current_stream((from_device ? from : to).device());
  auto target_stream = current_stream((to_device ? to : from).device());
  if (target_stream != stream)
    block(stream, record(target_stream));
  launch(stream, [source = staged ? from.clone() : on_host(from), target = on_host(to)] {
    target.copy_(source);
  });
  if (target_stream != stream)
    block(target_stream, record(stream));
  if (at_once)
    synchronize(record(stream));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  return copy_from(from, resize_in_place(to, from.sizes(), std::nullopt), false);
}

void fill_after(const at::Tensor& self, const at::Scalar& value, double seconds) {
  launch(current_stream(self.device()), [host = on_host(self), value, sleep = sleeper(seconds)] {
    sleep();
    host.fill_(value);
  });
}

at::Tensor& fill(at::Tensor& self, const at::Scalar& value) {
  fill_after(self, value, 0);
  return self;
}

at::Tensor& zero(at::Tensor& self) {
  fill_after(self, 0, 0);
  return self;
}

at::Scalar item(const at::Tensor& self) {
  synchronize(record(current_stream(self.device())));
  return on_host(self).item();
}

// The host computes everything else, when the current streams are done.
void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  for (c10::DeviceIndex device = 0; device < kDevices; device++)
    synchronize(record(current_stream({kSim, device})));
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("resize_", resize_in_place);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("fill_.Scalar", fill);
  library.impl("zero_", zero);
  library.impl("_local_scalar_dense", item);
  library.impl("record_stream", [](at::Tensor&, c10::Stream) {}); // as recordDataPtrOnStream
}

// A sparse tensor consists of two dense ones. The host computes all operations on it.

at::Tensor sparse_on_host(const at::Tensor& tensor) {
  return at::_sparse_coo_tensor_unsafe(tensor._indices().cpu(), tensor._values().cpu(),
                                       tensor.sizes())._coalesced_(tensor.is_coalesced());
}

at::Tensor sparse_on_device(const at::Tensor& host, at::Device device) {
  return at::_sparse_coo_tensor_unsafe(host._indices().to(device), host._values().to(device),
                                       host.sizes())._coalesced_(host.is_coalesced());
}

at::Tensor sparse_coalesce(const at::Tensor& self) {
  return sparse_on_device(sparse_on_host(self).coalesce(), self.device());
}

at::Tensor sparse_add(const at::Tensor& self, const at::Tensor& other, const at::Scalar& alpha) {
  return sparse_on_device(at::add(sparse_on_host(self), sparse_on_host(other), alpha),
                          self.device());
}

at::Tensor& sparse_add_in_place(at::Tensor& self, const at::Tensor& other, const at::Scalar& alpha) {
  auto sum = sparse_add(self, other, alpha);
  at::sparse::get_sparse_impl(self)->set_indices_and_values_unsafe(sum._indices(), sum._values());
  return self._coalesced_(sum.is_coalesced());
}

TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, library) {
  library.impl("_sparse_coo_tensor_with_dims", at::native::new_with_dims_sparse);
  library.impl("_sparse_coo_tensor_with_dims_and_tensors",
               at::native::new_with_dims_and_tensor_sparse_symint);
  library.impl("_indices", at::native::_indices_sparse);
  library.impl("_values", at::native::_values_sparse);
  library.impl("indices", at::native::indices_sparse);
  library.impl("values", at::native::values_sparse);
  library.impl("_nnz", at::native::_nnz_sparse);
  library.impl("is_coalesced", at::native::is_coalesced_sparse);
  library.impl("_coalesced_", at::native::_coalesced_sparse_);
  library.impl("sparse_dim", at::native::sparse_dim_sparse);
  library.impl("dense_dim", at::native::dense_dim_sparse);
  library.impl("empty.memory_format", at::native::empty_sparse);
  library.impl("copy_", at::native::copy_sparse_wrapper_);
  library.impl("clone", at::native::clone_sparse);
  library.impl("_coalesce", sparse_coalesce);
  library.impl("add.Tensor", sparse_add);
  library.impl("add_.Tensor", sparse_add_in_place);
}

// ------------------------------------------------------------------ what tests call

pybind11::dict current_counters() {
  using namespace pybind11::literals;
  Lock lock(mutex);
  Counters now = counters;
  lock.unlock(); // as making Python objects may collect garbage, events for example
  return pybind11::dict(
      "event_queries"_a = now.event_queries, "events_created"_a = now.events_created,
      "events_destroyed"_a = now.events_destroyed, "synchronizations"_a = now.synchronizations);
}

} // namespace

// No GIL is needed: shared data is atomic, or guarded by the mutex of streams.h, and no
// Python object is touched while a mutex is held.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, module, pybind11::mod_gil_not_used()) {
  using Released = pybind11::call_guard<pybind11::gil_scoped_release>;
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  module.attr("DEVICES") = kDevices;
  module.def("counters", &current_counters);
  module.def("reset_counters", [] {
    Lock lock(mutex);
    counters = {};
  });
  module.def("reset", [] {
    lacks_new_streams = lacks_events = refuses_events = false;
    keeps_first_recording = counts_contexts = false;
    reset();
  }, Released());
  module.def("take_new_streams_away", [] { lacks_new_streams = true; });
  module.def("take_events_away", [] { lacks_events = true; });
  module.def("refuse_events", [] { refuses_events = true; });
  module.def("keep_first_recordings", [] { keeps_first_recording = true; });
  module.def("count_contexts", [] {
    for (auto& made : contexts)
      made = false;
    counts_contexts = true;
  });
  module.def("set_current_device_without_context", [](c10::DeviceIndex device) {
    return std::exchange(current_device, device);
  });
  module.def("has_context", [](c10::DeviceIndex device) {
    return !counts_contexts || contexts.at(device);
  });
  module.def("shut_down", &shut_down, Released());
  module.def("wake", &wake, Released());
  module.def("sleep", [](double seconds) {
    launch(current_stream(kSim), sleeper(seconds));
  }, Released());
  module.def("finished_at", [](int64_t device, int64_t stream) {
    Lock lock(mutex);
    auto when = queues.at(device).at(stream).finished;
    return std::chrono::duration<double>(when.time_since_epoch()).count();
  });
  module.def("fail", [](std::string message) {
    launch(current_stream(kSim), [message] { throw std::runtime_error(message); });
  }, Released());
  module.def("fill_after", [](const at::Tensor& tensor, double value, double seconds) {
    fill_after(tensor, value, seconds);
  }, Released());
}

} // namespace simulated
