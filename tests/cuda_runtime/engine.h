// The stand-in's devices: streams, events, memory and captures, on the CPU.
//
// One thread, the engine, runs the work of all streams of all devices. Each stream is a FIFO.
// A slow op (a spinning kernel, a wait for a value or for another stream) holds up only its stream.
// Host functions run in a separate thread.
//
// Which waits for which: page "Stream synchronization behavior" of the CUDA Runtime API reference.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace standin {

using Clock = std::chrono::steady_clock;
using Lock = std::unique_lock<std::mutex>;

// Where in the work of a stream an event was recorded.
struct Record {
  bool done = false;
  Clock::time_point at;
};

// One op of a stream. It is done when all its parts are done.
struct Op {
  std::function<cudaError_t()> work;   // run by the engine, without the lock
  std::function<void()> host;          // run by the thread for host functions
  double seconds = 0;                  // how long it takes
  const volatile uint32_t* address = nullptr;  // until *address - value >= 0
  uint32_t value = 0;
  std::shared_ptr<Record> wait;    // until this is done
  std::shared_ptr<Record> record;  // what is done by this

  // Of an Op in the queue of a stream:
  uint64_t order = 0;  // of all streams
  std::vector<std::pair<std::shared_ptr<struct Stream>, uint64_t>> after;
  bool begun = false, ended = false;
  Clock::time_point until;
};

struct Node {
  Op op;
  bool empty = false;
  std::vector<Node*> dependencies;
};

struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;  // in the order in which they were captured
  std::vector<std::function<void()>> destroy;
  ~Graph() {
    for (auto& function : destroy) function();
  }
};

struct Exec {
  std::vector<Op> ops;
  int device = 0;
};

struct Capture {
  unsigned long long id = 0;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread;
  struct Stream* origin = nullptr;
  Graph* graph = nullptr;
  bool invalid = false;
  std::set<struct Stream*> streams;
};

struct Stream {
  int device = 0;
  unsigned flags = 0;
  int priority = 0;
  int connection = -1;  // streams of one connection take turns, if there are connections
  bool destroyed = false;
  bool busy = false;  // the engine runs its first op, without the lock
  std::deque<std::shared_ptr<Op>> ops;
  uint64_t enqueued = 0, finished = 0;
  std::shared_ptr<Capture> capture;
  std::vector<Node*> tail;  // what the next node of the capture depends on
};

struct Event {
  int device = 0;
  unsigned flags = 0;
  std::shared_ptr<Record> record;      // null: never recorded
  std::weak_ptr<Capture> captured_in;  // where it was last recorded, if in a capture
  bool captured = false;
  std::vector<Node*> captured_tail;
};

struct Memory {
  size_t size = 0;
  cudaMemoryType type = cudaMemoryTypeDevice;
  int device = 0;
  bool registered = false;
};

struct Device {
  bool has_context = false;
  cudaError_t failed = cudaSuccess;  // the error that all later calls return
  size_t used = 0;
  std::map<int, unsigned> next_connection;  // of streams of each priority
  std::shared_ptr<Stream> legacy;
  std::set<std::shared_ptr<Stream>> streams;  // all, with the legacy one
};

constexpr int kMaxDevices = 8;

struct State {
  std::mutex mutex;
  std::condition_variable engine_wakes, host_wakes, caller_wakes;
  int count = 2;
  size_t memory = size_t(8) << 30;
  unsigned connections = 0;
  bool launch_blocking = false, loading_waits = false, allocation_waits = false,
       errors_stay_on_device = false, verbose = false;
  Device devices[kMaxDevices];
  std::unordered_map<Stream*, std::shared_ptr<Stream>> streams;
  std::unordered_set<Event*> events;
  std::map<uintptr_t, Memory> memory_map;
  std::vector<std::shared_ptr<Capture>> captures;
  std::deque<std::pair<std::shared_ptr<Stream>, std::shared_ptr<Op>>> host_functions;
  std::map<std::string, uint64_t> calls;
  std::deque<std::string> unknown_kernels;  // that a program has launched
  uint64_t order = 0, changes = 0;
  unsigned long long captures_begun = 0;
  bool engine_runs = false;
  int pid = 0;
};

State& state();

struct Thread {
  int device = 0;
  bool bound = false;  // whether a context is current, as far as the driver's functions see
  cudaError_t last = cudaSuccess;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::shared_ptr<Stream> stream[kMaxDevices];  // its per-thread default streams
};

Thread& thread();

// In the child, the device's threads do not exist, and a lock may be held for ever.
bool in_child_of_fork();

// Everything below is called with the lock.
cudaError_t make_context(int device);
std::shared_ptr<Stream> new_stream(int device, unsigned flags, int priority);
std::shared_ptr<Stream> find_stream(cudaStream_t handle, int device);
cudaError_t enqueue(const std::shared_ptr<Stream>& stream, Op op);
cudaError_t wait_for_stream(Lock& lock, const std::shared_ptr<Stream>& stream);
void fail(int device, cudaError_t error);
Memory* memory_of(const void* address, uintptr_t* base = nullptr);
cudaError_t unsafe_call();

enum Needs { kNothing, kContext };

// Runs the body of an API function: with the lock, the context of the current device, and the
// error that this device has left.
cudaError_t call(const char* name, Needs needs, const std::function<cudaError_t(Lock&)>& body);

// In kernels.cpp. A kernel is identified by its mangled name. `op_of_launch` copies the arguments
// into the Op, as they are no longer valid when it runs, and records unknown kernels.
struct Kernel {
  std::string name;
  bool looked_up = false;
  std::function<std::optional<Op>(void** arguments, dim3 grid, dim3 block)> make;
};
std::optional<Op> op_of_launch(Kernel& kernel, void** arguments, dim3 grid, dim3 block);

}  // namespace standin
