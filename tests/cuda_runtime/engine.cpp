#include "engine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace standin {

static long setting(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text && *text ? atol(text) : otherwise;
}

State& state() {
  static State* s = new State;  // never destroyed: the engine runs until the process ends
  return *s;
}

// At the program's first call of CUDA, not when it loads the library.
static void read_settings() {
  State& s = state();
  s.count = std::min<long>(setting("CUDA_STANDIN_DEVICES", 2), kMaxDevices);
  if (const char* visible = getenv("CUDA_VISIBLE_DEVICES")) {
    int listed = *visible ? int(1 + std::count(visible, visible + strlen(visible), ',')) : 0;
    s.count = std::min(s.count, listed);
  }
  s.memory = size_t(setting("CUDA_STANDIN_MEMORY_MIB", 8192)) << 20;
  s.connections = unsigned(setting("CUDA_DEVICE_MAX_CONNECTIONS", 0));
  s.launch_blocking = setting("CUDA_LAUNCH_BLOCKING", 0);
  s.loading_waits = setting("CUDA_STANDIN_LOADING_WAITS", 0);
  s.allocation_waits = setting("CUDA_STANDIN_ALLOCATION_WAITS", 0);
  s.errors_stay_on_device = setting("CUDA_STANDIN_ERRORS_STAY_ON_DEVICE", 0);
  s.verbose = setting("CUDA_STANDIN_VERBOSE", 0);
}

Thread& thread() {
  thread_local Thread t;
  return t;
}

static bool is_blocking(const Stream& stream) { return !(stream.flags & cudaStreamNonBlocking); }

// Whether an earlier op of another stream holds up the connection that both share: see
// CUDA_DEVICE_MAX_CONNECTIONS in "Environment Variables" of the CUDA C++ Programming Guide. That
// the streams of each priority take the queues in turn is from memory.
static bool held_up_by_connection(const Stream& stream, const Op& op) {
  if (stream.connection < 0) return false;
  for (auto& other : state().devices[stream.device].streams)
    if (other.get() != &stream && other->connection == stream.connection &&
        other->priority == stream.priority && !other->ops.empty() &&
        other->ops.front()->order < op.order)
      return true;
  return false;
}

// Runs the first op of a stream; returns whether it has ended.
static bool step(Lock& lock, const std::shared_ptr<Stream>& stream, Clock::time_point& next,
                 bool& polls) {
  State& s = state();
  if (stream->ops.empty()) return false;
  auto op = stream->ops.front();
  if (!op->begun) {
    if (held_up_by_connection(*stream, *op)) return false;
    for (auto& [other, count] : op->after)
      if (other->finished < count) return false;
    op->begun = true;
    auto length = std::chrono::duration<double>(op->seconds);
    op->until = Clock::now() + std::chrono::duration_cast<Clock::duration>(length);
    if (op->host) {
      s.host_functions.emplace_back(stream, op);
      s.host_wakes.notify_one();
    }
  }
  if (op->seconds && Clock::now() < op->until) {
    next = std::min(next, op->until);
    return false;
  }
  if (op->address && int32_t(*op->address - op->value) < 0) {
    polls = true;
    return false;
  }
  if (op->wait && !op->wait->done) return false;
  if (op->host && !op->ended) return false;
  if (op->work) {
    lock.unlock();
    cudaError_t error = op->work();
    lock.lock();
    if (error != cudaSuccess) fail(stream->device, error);
  }
  if (stream->ops.empty() || stream->ops.front() != op) return true;  // it has failed
  if (op->record) {
    op->record->done = true;
    op->record->at = Clock::now();
  }
  stream->ops.pop_front();
  stream->finished++;
  if (stream->destroyed && stream->ops.empty()) s.devices[stream->device].streams.erase(stream);
  s.caller_wakes.notify_all();
  return true;
}

bool in_child_of_fork() {
  State& s = state();
  return s.pid && s.pid != getpid();
}

static void engine() {
  State& s = state();
  Lock lock(s.mutex);
  for (;;) {
    uint64_t seen = s.changes;
    std::vector<std::shared_ptr<Stream>> working;
    for (auto& device : s.devices)
      for (auto& stream : device.streams)
        if (!stream->ops.empty()) working.push_back(stream);
    std::stable_sort(working.begin(), working.end(),
                     [](auto& a, auto& b) { return a->priority < b->priority; });
    bool progress = false, polls = false;
    auto next = Clock::now() + std::chrono::hours(1);
    for (auto& stream : working)
      while (step(lock, stream, next, polls)) progress = true;
    if (progress || s.changes != seen) continue;
    if (polls) next = std::min(next, Clock::now() + std::chrono::microseconds(100));
    s.engine_wakes.wait_until(lock, next, [&] { return s.changes != seen; });
  }
}

static void host_function_thread() {
  State& s = state();
  Lock lock(s.mutex);
  for (;;) {
    s.host_wakes.wait(lock, [&] { return !s.host_functions.empty(); });
    auto [stream, op] = s.host_functions.front();
    s.host_functions.pop_front();
    lock.unlock();
    op->host();
    lock.lock();
    op->ended = true;
    s.changes++;
    s.engine_wakes.notify_one();
  }
}

cudaError_t make_context(int index) {
  State& s = state();
  if (!s.count) return cudaErrorNoDevice;
  if (index < 0 || index >= s.count) return cudaErrorInvalidDevice;
  Device& device = s.devices[index];
  if (device.has_context) return cudaSuccess;
  device.has_context = true;
  device.legacy = new_stream(index, cudaStreamDefault, 0);
  device.legacy->connection = -1;
  if (!s.engine_runs) {
    s.engine_runs = true;
    s.pid = getpid();
    std::thread(engine).detach();
    std::thread(host_function_thread).detach();
  }
  return cudaSuccess;
}

std::shared_ptr<Stream> new_stream(int index, unsigned flags, int priority) {
  State& s = state();
  Device& device = s.devices[index];
  auto stream = std::make_shared<Stream>();
  stream->device = index;
  stream->flags = flags;
  stream->priority = priority;
  if (s.connections) stream->connection = int(device.next_connection[priority]++ % s.connections);
  device.streams.insert(stream);
  s.streams[stream.get()] = stream;
  return stream;
}

std::shared_ptr<Stream> find_stream(cudaStream_t handle, int device) {
  State& s = state();
  if (handle == nullptr || handle == cudaStreamLegacy) return s.devices[device].legacy;
  if (handle == cudaStreamPerThread) {
    auto& mine = thread().stream[device];
    if (!mine) mine = new_stream(device, cudaStreamDefault, 0);
    return mine;
  }
  auto found = s.streams.find(reinterpret_cast<Stream*>(handle));
  if (found == s.streams.end() || found->second->destroyed) return nullptr;
  return found->second;
}

cudaError_t enqueue(const std::shared_ptr<Stream>& stream, Op op) {
  State& s = state();
  if (auto capture = stream->capture) {
    if (capture->invalid) return cudaErrorStreamCaptureInvalidated;
    auto node = std::make_unique<Node>();
    node->op = std::move(op);
    node->dependencies = stream->tail;
    stream->tail = {node.get()};
    capture->graph->nodes.push_back(std::move(node));
    return cudaSuccess;
  }
  Device& device = s.devices[stream->device];
  if (device.failed) return device.failed;
  if (stream == device.legacy) {
    for (auto& capture : s.captures)
      for (auto* other : capture->streams)
        if (other->device == stream->device && is_blocking(*other)) {
          capture->invalid = true;
          return cudaErrorStreamCaptureImplicit;
        }
    for (auto& other : device.streams)
      if (other != stream && is_blocking(*other) && !other->ops.empty())
        op.after.emplace_back(other, other->enqueued);
  } else if (is_blocking(*stream) && !device.legacy->ops.empty()) {
    op.after.emplace_back(device.legacy, device.legacy->enqueued);
  }
  op.order = s.order++;
  stream->ops.push_back(std::make_shared<Op>(std::move(op)));
  stream->enqueued++;
  s.changes++;
  s.engine_wakes.notify_one();
  return cudaSuccess;
}

cudaError_t wait_for_stream(Lock& lock, const std::shared_ptr<Stream>& stream) {
  State& s = state();
  uint64_t count = stream->enqueued;
  std::vector<std::pair<std::shared_ptr<Stream>, uint64_t>> also;
  if (stream == s.devices[stream->device].legacy)
    for (auto& other : s.devices[stream->device].streams)
      if (is_blocking(*other)) also.emplace_back(other, other->enqueued);
  s.caller_wakes.wait(lock, [&] {
    for (auto& [other, other_count] : also)
      if (other->finished < other_count) return false;
    return stream->finished >= count;
  });
  return s.devices[stream->device].failed;
}

// By the descriptions of cudaErrorAssert and cudaErrorIllegalAddress: any further work returns the
// same error. That other devices return it as well is from memory.
void fail(int index, cudaError_t error) {
  State& s = state();
  for (int n = 0; n < s.count; n++) {
    if (n != index && s.errors_stay_on_device) continue;
    Device& device = s.devices[n];
    if (!device.has_context) continue;
    device.failed = error;
    for (auto& stream : device.streams) {
      for (auto& op : stream->ops)
        if (op->record) op->record->done = true;  // so that other devices do not wait for ever
      stream->ops.clear();
      stream->finished = stream->enqueued;
    }
  }
  s.changes++;
  s.caller_wakes.notify_all();
}

Memory* memory_of(const void* address, uintptr_t* base) {
  State& s = state();
  auto at = reinterpret_cast<uintptr_t>(address);
  auto found = s.memory_map.upper_bound(at);
  if (found == s.memory_map.begin()) return nullptr;
  --found;
  if (at >= found->first + found->second.size) return nullptr;
  if (base) *base = found->first;
  return &found->second;
}

cudaError_t unsafe_call() {
  // By the description of cudaThreadExchangeStreamCaptureMode. That it invalidates the capture:
  // "Invalidation" in the CUDA C++ Programming Guide, on stream capture.
  auto mode = thread().mode;
  cudaError_t error = cudaSuccess;
  for (auto& capture : state().captures) {
    if (mode == cudaStreamCaptureModeRelaxed || capture->mode == cudaStreamCaptureModeRelaxed)
      continue;
    bool mine = capture->thread == std::this_thread::get_id();
    bool global = mode == cudaStreamCaptureModeGlobal &&
                  capture->mode == cudaStreamCaptureModeGlobal;
    if (mine || global) {
      capture->invalid = true;
      error = cudaErrorStreamCaptureUnsupported;
    }
  }
  return error;
}

cudaError_t call(const char* name, Needs needs, const std::function<cudaError_t(Lock&)>& body) {
  State& s = state();
  cudaError_t error = cudaSuccess;
  if (in_child_of_fork()) {
    error = cudaErrorInitializationError;
  } else {
    Lock lock(s.mutex);
    [[maybe_unused]] static bool read = (read_settings(), true);
    s.calls[name]++;
    int device = thread().device;
    if (needs == kContext) {
      error = make_context(device);
      thread().bound = true;
    }
    if (!error && needs == kContext) error = s.devices[device].failed;
    if (!error) error = body(lock);
  }
  if (error != cudaSuccess) {
    thread().last = error;
    if (s.verbose && error != cudaErrorNotReady)
      fprintf(stderr, "the stand-in for CUDA: %s returned %d\n", name, int(error));
  }
  return error;
}

}  // namespace standin
