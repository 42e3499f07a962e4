// The functions of libcudart that PyTorch calls. See engine.h.
//
// Each follows its description in the CUDA Runtime API reference, whose sections are named below;
// cuda_runtime_api.h has the same text. "Programming Guide" is the CUDA C++ Programming Guide.
// Undocumented behaviour is marked "from memory".
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "engine.h"

using namespace standin;
using std::shared_ptr;

#define API extern "C" __attribute__((visibility("default")))

static Device& device_now() { return state().devices[thread().device]; }

static bool valid(Event* event) { return state().events.count(event) != 0; }


// ---------------------------------------------------------------------------- errors

// Section "Error Handling". That a failed kernel's error cannot be cleared: see cudaErrorAssert and
// cudaErrorIllegalAddress in "Data types used by CUDA Runtime".

API cudaError_t cudaGetLastError() {
  cudaError_t last = thread().last;
  if (last == cudaSuccess || in_child_of_fork()) return last;
  Lock lock(state().mutex);
  if (last != device_now().failed) thread().last = cudaSuccess;  // that cannot be cleared
  return last;
}
API cudaError_t cudaPeekAtLastError() { return thread().last; }

struct ErrorText { cudaError_t error; const char *name, *text; };
static const ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorPeerAccessAlreadyEnabled, "cudaErrorPeerAccessAlreadyEnabled", "peer access is already enabled"},
    {cudaErrorAssert, "cudaErrorAssert", "device-side assert triggered"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered", "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered", "pointer does not correspond to a registered memory region"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureMerge, "cudaErrorStreamCaptureMerge", "operation would result in a merge of separate capture sequences"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched", "capture was not ended in the same stream as it began"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation", "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit", "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent", "operation not permitted on an event last recorded in a capturing stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread", "attempt to terminate a thread-local capture sequence from another thread"},
};
static const ErrorText* error_text(cudaError_t error) {
  for (auto& e : kErrors) if (e.error == error) return &e;
  return nullptr;
}
API const char* cudaGetErrorName(cudaError_t error) {
  auto* e = error_text(error);
  return e ? e->name : "unrecognized error code";
}
API const char* cudaGetErrorString(cudaError_t error) {
  auto* e = error_text(error);
  return e ? e->text : "unrecognized error code";
}

// ---------------------------------------------------------------------------- devices

// Sections "Device Management", "Peer Device Memory Access", "Version Management". The numbers are
// made up, of the size that a GPU has.

API cudaError_t cudaGetDeviceCount(int* count) {
  return call("cudaGetDeviceCount", kNothing, [&](Lock&) {
    *count = state().count;
    return *count ? cudaSuccess : cudaErrorNoDevice;
  });
}
API cudaError_t cudaGetDevice(int* device) {
  return call("cudaGetDevice", kNothing, [&](Lock&) {
    *device = thread().device;
    return cudaSuccess;
  });
}
API cudaError_t cudaSetDevice(int device) {
  return call("cudaSetDevice", kNothing, [&](Lock&) {
    if (device < 0 || device >= state().count) return cudaErrorInvalidDevice;
    if (thread().last == device_now().failed) thread().last = cudaSuccess;  // it is of that device
    thread().device = device;
    cudaError_t error = make_context(device);  // as the description of cudaSetDevice says
    return error ? error : state().devices[device].failed;
  });
}
API cudaError_t cudaDeviceSynchronize() {
  return call("cudaDeviceSynchronize", kContext, [&](Lock& lock) {
    if (cudaError_t error = unsafe_call()) return error;
    auto streams = device_now().streams;
    int device = thread().device;
    for (auto& stream : streams) wait_for_stream(lock, stream);
    return state().devices[device].failed;
  });
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return call("cudaDeviceGetStreamPriorityRange", kContext, [&](Lock&) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
  });
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  return call("cudaGetDeviceProperties", kNothing, [&](Lock&) {
    if (device < 0 || device >= state().count) return cudaErrorInvalidDevice;
    memset(p, 0, sizeof *p);
    strcpy(p->name, "Stand-in for a GPU (CPU)");
    p->uuid.bytes[0] = 0x5d;
    p->uuid.bytes[15] = char(device);
    p->totalGlobalMem = state().memory;
    p->sharedMemPerBlock = p->sharedMemPerBlockOptin = 49152;
    p->sharedMemPerMultiprocessor = 102400;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->memPitch = 2147483647;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->totalConstMem = 65536;
    p->major = 9;
    p->textureAlignment = 512;
    p->multiProcessorCount = 8;
    p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = 1;
    p->pciBusID = device + 1;
    p->asyncEngineCount = 3;
    p->memoryBusWidth = 64;
    p->l2CacheSize = 1 << 22;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->streamPrioritiesSupported = 1;
    p->computePreemptionSupported = p->canUseHostPointerForRegisteredMem = 1;
    p->cooperativeLaunch = p->hostRegisterSupported = 1;
    return cudaSuccess;
  });
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return call("cudaDeviceGetAttribute", kNothing, [&](Lock&) {
    if (device < 0 || device >= state().count) return cudaErrorInvalidDevice;
    switch (attribute) {
      case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
      case cudaDevAttrMaxSharedMemoryPerBlock:
      case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 49152; break;
      case cudaDevAttrMaxBlockDimX:
      case cudaDevAttrMaxBlockDimY: *value = 1024; break;
      case cudaDevAttrMaxBlockDimZ: *value = 64; break;
      case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
      case cudaDevAttrMaxGridDimY:
      case cudaDevAttrMaxGridDimZ: *value = 65535; break;
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 102400; break;
      case cudaDevAttrMaxRegistersPerBlock:
      case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
      case cudaDevAttrWarpSize: *value = 32; break;
      case cudaDevAttrMultiProcessorCount: *value = 8; break;
      case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
      case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
      case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
      case cudaDevAttrClockRate: *value = 1000000; break;
      case cudaDevAttrUnifiedAddressing:
      case cudaDevAttrCanUseHostPointerForRegisteredMem:
      case cudaDevAttrCooperativeLaunch:
      case cudaDevAttrHostRegisterSupported: *value = 1; break;
      default: *value = 0;
    }
    return cudaSuccess;
  });
}
API cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  return call("cudaDeviceGetPCIBusId", kNothing, [&](Lock&) {
    snprintf(text, size_t(length), "0000:%02x:00.0", device + 1);
    return cudaSuccess;
  });
}
API cudaError_t cudaDriverGetVersion(int* version) { *version = 13000; return cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { *version = 13000; return cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  return call("cudaDeviceCanAccessPeer", kNothing, [&](Lock&) {
    *can = device != peer;
    return cudaSuccess;
  });
}
API cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
  return call("cudaDeviceEnablePeerAccess", kContext, [&](Lock&) {
    static std::set<std::pair<int, int>> enabled;
    if (peer == thread().device) return cudaErrorInvalidDevice;
    if (cudaError_t error = make_context(peer)) return error;
    return enabled.insert({thread().device, peer}).second ? cudaSuccess
                                                          : cudaErrorPeerAccessAlreadyEnabled;
  });
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---------------------------------------------------------------------------- streams

// Section "Stream Management"; the default streams: page "Stream synchronization behavior".

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority) {
  return call("cudaStreamCreateWithPriority", kContext, [&](Lock&) {
    priority = std::max(-5, std::min(0, priority));
    *out = reinterpret_cast<cudaStream_t>(new_stream(thread().device, flags, priority).get());
    return cudaSuccess;
  });
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t* out) {
  return cudaStreamCreateWithPriority(out, cudaStreamDefault, 0);
}

// Calls the body with the stream.
static cudaError_t on_stream(const char* name, cudaStream_t handle,
                             const std::function<cudaError_t(Lock&, shared_ptr<Stream>)>& body) {
  return call(name, kContext, [&](Lock& lock) {
    auto stream = find_stream(handle, thread().device);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (state().devices[stream->device].failed) return state().devices[stream->device].failed;
    return body(lock, stream);
  });
}

API cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  return on_stream("cudaStreamDestroy", handle, [&](Lock&, shared_ptr<Stream> stream) {
    stream->destroyed = true;
    state().streams.erase(stream.get());
    if (stream->ops.empty()) state().devices[stream->device].streams.erase(stream);
    return cudaSuccess;
  });
}
API cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  return on_stream("cudaStreamGetPriority", handle, [&](Lock&, shared_ptr<Stream> stream) {
    *priority = stream->priority;
    return cudaSuccess;
  });
}
// Programming Guide, "Creating a Graph Using Stream Capture": it is invalid to query or synchronize
// a stream that is captured, and that invalidates the capture.
static cudaError_t asked_about(const shared_ptr<Stream>& stream) {
  if (stream->capture) {
    stream->capture->invalid = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  return unsafe_call();
}
API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return on_stream("cudaStreamQuery", handle, [&](Lock&, shared_ptr<Stream> stream) {
    if (cudaError_t error = asked_about(stream)) return error;
    return stream->ops.empty() ? cudaSuccess : cudaErrorNotReady;
  });
}
API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return on_stream("cudaStreamSynchronize", handle, [&](Lock& lock, shared_ptr<Stream> stream) {
    if (cudaError_t error = asked_about(stream)) return error;
    return wait_for_stream(lock, stream);
  });
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  return on_stream("cudaLaunchHostFunc", handle, [&](Lock&, shared_ptr<Stream> stream) {
    Op op;
    op.host = [=] { function(data); };
    return enqueue(stream, std::move(op));
  });
}
API cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t callback,
                                      void* data, unsigned) {
  return on_stream("cudaStreamAddCallback", handle, [&](Lock&, shared_ptr<Stream> stream) {
    Op op;
    op.host = [=] { callback(handle, cudaSuccess, data); };
    return enqueue(stream, std::move(op));
  });
}

// ---------------------------------------------------------------------------- events

// Section "Event Management". A query of an event is an unsafe call during a capture: from memory,
// of PyTorch's issues.

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags) {
  return call("cudaEventCreateWithFlags", kContext, [&](Lock&) {
    auto* event = new Event;
    event->device = thread().device;
    event->flags = flags;
    state().events.insert(event);
    *out = reinterpret_cast<cudaEvent_t>(event);
    return cudaSuccess;
  });
}
API cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  return call("cudaEventDestroy", kContext, [&](Lock&) {
    auto* event = reinterpret_cast<Event*>(handle);
    if (!state().events.erase(event)) return cudaErrorInvalidResourceHandle;
    delete event;
    return cudaSuccess;
  });
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t on, unsigned flags) {
  return on_stream("cudaEventRecord", on, [&](Lock&, shared_ptr<Stream> stream) {
    auto* event = reinterpret_cast<Event*>(handle);
    if (!valid(event) || event->device != stream->device) return cudaErrorInvalidResourceHandle;
    if (stream->capture && !(flags & cudaEventRecordExternal)) {
      if (stream->capture->invalid) return cudaErrorStreamCaptureInvalidated;
      event->captured = true;
      event->captured_in = stream->capture;
      event->captured_tail = stream->tail;
      event->record = nullptr;
      return cudaSuccess;
    }
    event->captured = false;
    Op op;
    op.record = event->record = std::make_shared<Record>();
    return enqueue(stream, std::move(op));
  });
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
// Calls the body with the event of a query.
static cudaError_t ask(const char* name, cudaEvent_t handle,
                       const std::function<cudaError_t(Lock&, Event*)>& body) {
  return call(name, kContext, [&](Lock& lock) {
    auto* event = reinterpret_cast<Event*>(handle);
    if (!valid(event)) return cudaErrorInvalidResourceHandle;
    if (event->captured) {
      if (auto capture = event->captured_in.lock()) capture->invalid = true;
      return cudaErrorCapturedEvent;
    }
    if (cudaError_t error = unsafe_call()) return error;
    if (state().devices[event->device].failed) return state().devices[event->device].failed;
    return body(lock, event);
  });
}
API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  return ask("cudaEventQuery", handle, [&](Lock&, Event* event) {
    return !event->record || event->record->done ? cudaSuccess : cudaErrorNotReady;
  });
}
API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  return ask("cudaEventSynchronize", handle, [&](Lock& lock, Event* event) {
    auto record = event->record;
    int device = event->device;
    if (record) state().caller_wakes.wait(lock, [&] { return record->done; });
    return state().devices[device].failed;
  });
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  return call("cudaEventElapsedTime", kContext, [&](Lock&) {
    auto *a = reinterpret_cast<Event*>(start), *b = reinterpret_cast<Event*>(end);
    if (!valid(a) || !valid(b) || a->device != b->device) return cudaErrorInvalidResourceHandle;
    for (auto* event : {a, b}) {
      if (event->captured) return cudaErrorCapturedEvent;
      if (!event->record || (event->flags & cudaEventDisableTiming))
        return cudaErrorInvalidResourceHandle;
      if (!event->record->done) return cudaErrorNotReady;
    }
    *ms = std::chrono::duration<float, std::milli>(b->record->at - a->record->at).count();
    return cudaSuccess;
  });
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t of, unsigned) {
  return on_stream("cudaStreamWaitEvent", handle, [&](Lock&, shared_ptr<Stream> stream) {
    auto* event = reinterpret_cast<Event*>(of);
    if (!valid(event)) return cudaErrorInvalidResourceHandle;
    if (event->captured) {
      auto capture = event->captured_in.lock();
      if (!capture) return cudaErrorCapturedEvent;
      if (capture->invalid) return cudaErrorStreamCaptureInvalidated;
      // Programming Guide, "Cross-stream Dependencies and Events" and "Prohibited and Unhandled
      // Operations".
      if (stream->capture && stream->capture != capture) {
        stream->capture->invalid = capture->invalid = true;
        return cudaErrorStreamCaptureMerge;
      }
      if (stream == state().devices[stream->device].legacy) {
        capture->invalid = true;
        return cudaErrorStreamCaptureImplicit;
      }
      if (!stream->capture) {
        stream->capture = capture;
        capture->streams.insert(stream.get());
      }
      for (auto* node : event->captured_tail)
        if (!std::count(stream->tail.begin(), stream->tail.end(), node))
          stream->tail.push_back(node);
      return cudaSuccess;
    }
    if (stream->capture) {
      if (!event->record) return cudaSuccess;
      stream->capture->invalid = true;
      return cudaErrorStreamCaptureIsolation;
    }
    if (!event->record || event->record->done) return cudaSuccess;
    Op op;
    op.wait = event->record;
    return enqueue(stream, std::move(op));
  });
}

// ---------------------------------------------------------------------------- memory

// Section "Memory Management"; which copies wait: page "API synchronization behavior". That
// allocations are unsafe calls during a capture: cudaThreadExchangeStreamCaptureMode.

static cudaError_t allocate(Lock& lock, void** out, size_t size, cudaMemoryType type) {
  State& s = state();
  *out = nullptr;
  if (cudaError_t error = unsafe_call()) return error;
  if (s.allocation_waits) {
    auto streams = device_now().streams;
    for (auto& stream : streams) wait_for_stream(lock, stream);
  }
  if (!size) return cudaSuccess;
  if (type == cudaMemoryTypeDevice && device_now().used + size > s.memory)
    return cudaErrorMemoryAllocation;
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return cudaErrorMemoryAllocation;
  memset(p, 0xCB, std::min(size, size_t(4) << 20));  // new memory is not zero
  if (type == cudaMemoryTypeDevice) device_now().used += size;
  s.memory_map[reinterpret_cast<uintptr_t>(p)] = {size, type, thread().device, false};
  *out = p;
  return cudaSuccess;
}
static cudaError_t deallocate(Lock& lock, void* p, cudaMemoryType type) {
  State& s = state();
  if (!p) return cudaSuccess;
  if (cudaError_t error = unsafe_call()) return error;
  auto at = reinterpret_cast<uintptr_t>(p);
  auto found = s.memory_map.find(at);
  if (found == s.memory_map.end() || found->second.type != type || found->second.registered)
    return cudaErrorInvalidValue;
  Memory memory = found->second;
  auto streams = s.devices[memory.device].streams;
  for (auto& stream : streams) wait_for_stream(lock, stream);  // "may perform implicit synchronization"
  s.memory_map.erase(at);
  if (type == cudaMemoryTypeDevice) s.devices[memory.device].used -= memory.size;
  munmap(p, memory.size);
  return cudaSuccess;
}
API cudaError_t cudaMalloc(void** p, size_t size) {
  return call("cudaMalloc", kContext,
              [&](Lock& lock) { return allocate(lock, p, size, cudaMemoryTypeDevice); });
}
API cudaError_t cudaFree(void* p) {
  return call("cudaFree", kContext,
              [&](Lock& lock) { return deallocate(lock, p, cudaMemoryTypeDevice); });
}
API cudaError_t cudaHostAlloc(void** p, size_t size, unsigned) {
  return call("cudaHostAlloc", kContext,
              [&](Lock& lock) { return allocate(lock, p, size, cudaMemoryTypeHost); });
}
API cudaError_t cudaFreeHost(void* p) {
  return call("cudaFreeHost", kContext,
              [&](Lock& lock) { return deallocate(lock, p, cudaMemoryTypeHost); });
}
API cudaError_t cudaHostRegister(void* p, size_t size, unsigned) {
  return call("cudaHostRegister", kContext, [&](Lock&) {
    if (cudaError_t error = unsafe_call()) return error;
    if (memory_of(p)) return cudaErrorHostMemoryAlreadyRegistered;
    state().memory_map[reinterpret_cast<uintptr_t>(p)] = {size, cudaMemoryTypeHost,
                                                          thread().device, true};
    return cudaSuccess;
  });
}
API cudaError_t cudaHostUnregister(void* p) {
  return call("cudaHostUnregister", kContext, [&](Lock&) {
    if (cudaError_t error = unsafe_call()) return error;
    auto found = state().memory_map.find(reinterpret_cast<uintptr_t>(p));
    if (found == state().memory_map.end() || !found->second.registered)
      return cudaErrorHostMemoryNotRegistered;
    state().memory_map.erase(found);
    return cudaSuccess;
  });
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return call("cudaMemGetInfo", kContext, [&](Lock&) {
    *total = state().memory;
    *free = state().memory - device_now().used;
    return cudaSuccess;
  });
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  return call("cudaPointerGetAttributes", kContext, [&](Lock&) {
    memset(a, 0, sizeof *a);
    Memory* memory = memory_of(p);
    a->type = memory ? memory->type : cudaMemoryTypeUnregistered;
    a->device = memory ? memory->device : cudaInvalidDeviceId;
    a->devicePointer = memory ? const_cast<void*>(p) : nullptr;
    bool on_device = memory && memory->type == cudaMemoryTypeDevice;
    a->hostPointer = on_device ? nullptr : const_cast<void*>(p);
    return cudaSuccess;
  });
}

static bool is_device(const void* p) {
  Memory* memory = memory_of(p);
  return memory && memory->type == cudaMemoryTypeDevice;
}
static cudaError_t copy(Lock& lock, void* to, const void* from, size_t size,
                        const shared_ptr<Stream>& stream, bool waits) {
  if (!size) return cudaSuccess;
  Memory *target = memory_of(to), *source = memory_of(from);
  Op op;
  // Pageable memory of the host is staged before the call returns, and a copy to it has ended then.
  // That 64 KiB are copied without waiting: Programming Guide, "Asynchronous Concurrent Execution".
  if (!source && !stream->capture) {
    auto staged = std::make_shared<std::vector<char>>(
        static_cast<const char*>(from), static_cast<const char*>(from) + size);
    op.work = [=] {
      memcpy(to, staged->data(), size);
      return cudaSuccess;
    };
    waits = waits || size > 65536;
  } else {
    op.work = [=] {
      memmove(to, from, size);
      return cudaSuccess;
    };
  }
  if (!target) waits = true;
  if (waits && stream->capture) {
    stream->capture->invalid = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  cudaError_t error = enqueue(stream, std::move(op));
  return error || !waits ? error : wait_for_stream(lock, stream);
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                                cudaStream_t handle) {
  return on_stream("cudaMemcpyAsync", handle, [&](Lock& lock, shared_ptr<Stream> stream) {
    return copy(lock, to, from, size, stream, false);
  });
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  return on_stream("cudaMemcpy", nullptr, [&](Lock& lock, shared_ptr<Stream> stream) {
    if (cudaError_t error = unsafe_call()) return error;
    return copy(lock, to, from, size, stream, !(is_device(to) && is_device(from)));
  });
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size,
                                    cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                  size_t width, size_t height, cudaMemcpyKind,
                                  cudaStream_t handle) {
  return on_stream("cudaMemcpy2DAsync", handle, [&](Lock& lock, shared_ptr<Stream> stream) {
    Op op;
    op.work = [=] {
      for (size_t n = 0; n < height; n++)
        memmove(static_cast<char*>(to) + n * to_pitch,
                static_cast<const char*>(from) + n * from_pitch, width);
      return cudaSuccess;
    };
    bool waits = !memory_of(to) || !memory_of(from);
    cudaError_t error = enqueue(stream, std::move(op));
    return error || !waits ? error : wait_for_stream(lock, stream);
  });
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t handle) {
  return on_stream("cudaMemsetAsync", handle, [&](Lock&, shared_ptr<Stream> stream) {
    Op op;
    op.work = [=] {
      memset(to, value, size);
      return cudaSuccess;
    };
    return enqueue(stream, std::move(op));
  });
}
API cudaError_t cudaMemset(void* to, int value, size_t size) {
  return cudaMemsetAsync(to, value, size, nullptr);
}

// ---------------------------------------------------------------------------- captures

// Sections "Stream Management" and "Graph Management".

static cudaError_t begin_capture(const shared_ptr<Stream>& stream, Graph* graph,
                                 cudaStreamCaptureMode mode) {
  State& s = state();
  if (stream == s.devices[stream->device].legacy) return cudaErrorStreamCaptureUnsupported;
  if (stream->capture) return cudaErrorIllegalState;
  auto capture = std::make_shared<Capture>();
  capture->id = ++s.captures_begun;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->origin = stream.get();
  capture->graph = graph;
  capture->streams.insert(stream.get());
  stream->capture = capture;
  stream->tail.clear();
  s.captures.push_back(capture);
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return on_stream("cudaStreamBeginCapture", handle, [&](Lock&, shared_ptr<Stream> stream) {
    return begin_capture(stream, new Graph, mode);
  });
}
API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t handle, cudaGraph_t graph,
                                              const cudaGraphNode_t*, const cudaGraphEdgeData*,
                                              size_t, cudaStreamCaptureMode mode) {
  return on_stream("cudaStreamBeginCaptureToGraph", handle, [&](Lock&, shared_ptr<Stream> s) {
    return begin_capture(s, reinterpret_cast<Graph*>(graph), mode);
  });
}
static void reach(Node* node, std::set<Node*>& reached) {
  if (reached.insert(node).second)
    for (auto* dependency : node->dependencies) reach(dependency, reached);
}
API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* out) {
  return on_stream("cudaStreamEndCapture", handle, [&](Lock&, shared_ptr<Stream> stream) {
    State& s = state();
    auto capture = stream->capture;
    *out = nullptr;
    if (!capture) return cudaErrorIllegalState;
    if (capture->mode != cudaStreamCaptureModeRelaxed &&
        capture->thread != std::this_thread::get_id())
      return cudaErrorStreamCaptureWrongThread;
    if (capture->origin != stream.get()) {
      capture->invalid = true;
      return cudaErrorStreamCaptureUnmatched;
    }
    std::set<Node*> joined;
    for (auto* node : stream->tail) reach(node, joined);
    bool unjoined = false;
    for (auto* other : capture->streams) {
      for (auto* node : other->tail) unjoined |= !joined.count(node);
      other->tail.clear();
    }
    for (auto* other : std::set<Stream*>(capture->streams)) other->capture = nullptr;
    s.captures.erase(std::find(s.captures.begin(), s.captures.end(), capture));
    if (capture->invalid) return cudaErrorStreamCaptureInvalidated;
    if (unjoined) return cudaErrorStreamCaptureUnjoined;
    *out = reinterpret_cast<cudaGraph_t>(capture->graph);
    return cudaSuccess;
  });
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return on_stream("cudaStreamIsCapturing", handle, [&](Lock&, shared_ptr<Stream> stream) {
    if (stream == state().devices[stream->device].legacy)
      for (auto& capture : state().captures)
        for (auto* other : capture->streams)
          if (other->device == stream->device && !(other->flags & cudaStreamNonBlocking))
            return cudaErrorStreamCaptureImplicit;  // which leaves the capture valid
    *status = !stream->capture            ? cudaStreamCaptureStatusNone
              : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                         : cudaStreamCaptureStatusActive;
    return cudaSuccess;
  });
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t* graph,
                                         const cudaGraphNode_t** nodes,
                                         const cudaGraphEdgeData** edges, size_t* count) {
  cudaError_t error = cudaStreamIsCapturing(handle, status);
  if (error || *status != cudaStreamCaptureStatusActive) return error;
  return on_stream("cudaStreamGetCaptureInfo", handle, [&](Lock&, shared_ptr<Stream> stream) {
    if (id) *id = stream->capture->id;
    if (graph) *graph = reinterpret_cast<cudaGraph_t>(stream->capture->graph);
    if (nodes) *nodes = reinterpret_cast<const cudaGraphNode_t*>(stream->tail.data());
    if (edges) *edges = nullptr;
    if (count) *count = stream->tail.size();
    return cudaSuccess;
  });
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return call("cudaThreadExchangeStreamCaptureMode", kContext, [&](Lock&) {
    std::swap(*mode, thread().mode);
    return cudaSuccess;
  });
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t handle,
                                              unsigned long long) {
  return call("cudaGraphInstantiateWithFlags", kContext, [&](Lock&) {
    auto* exec = new Exec;
    exec->device = thread().device;
    for (auto& node : reinterpret_cast<Graph*>(handle)->nodes) exec->ops.push_back(node->op);
    *out = reinterpret_cast<cudaGraphExec_t>(exec);
    return cudaSuccess;
  });
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t on) {
  return on_stream("cudaGraphLaunch", on, [&](Lock&, shared_ptr<Stream> stream) {
    for (auto& op : reinterpret_cast<Exec*>(handle)->ops)
      if (cudaError_t error = enqueue(stream, op)) return error;
    return cudaSuccess;
  });
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete reinterpret_cast<Exec*>(exec);
  return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return call("cudaGraphGetNodes", kNothing, [&](Lock&) {
    auto& all = reinterpret_cast<Graph*>(graph)->nodes;
    for (size_t n = 0; nodes && n < std::min(*count, all.size()); n++)
      nodes[n] = reinterpret_cast<cudaGraphNode_t>(all[n].get());
    *count = all.size();
    return cudaSuccess;
  });
}
API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t* out,
                                             cudaGraphEdgeData* edges, size_t* count) {
  return call("cudaGraphNodeGetDependencies", kNothing, [&](Lock&) {
    auto& all = reinterpret_cast<Node*>(node)->dependencies;
    for (size_t n = 0; out && n < std::min(*count, all.size()); n++)
      out[n] = reinterpret_cast<cudaGraphNode_t>(all[n]);
    if (edges && out) memset(edges, 0, sizeof(*edges) * std::min(*count, all.size()));
    *count = all.size();
    return cudaSuccess;
  });
}
struct UserObject { cudaHostFn_t destroy; void* data; };
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* out, void* data, cudaHostFn_t destroy,
                                     unsigned, unsigned) {
  *out = reinterpret_cast<cudaUserObject_t>(new UserObject{destroy, data});
  return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned,
                                          unsigned) {
  auto* o = reinterpret_cast<UserObject*>(object);
  reinterpret_cast<Graph*>(graph)->destroy.push_back([o] { o->destroy(o->data); });
  return cudaSuccess;
}

// ---------------------------------------------------------------------------- kernels

// Section "Execution Control". The functions that begin with two underscores are what nvcc's host
// code calls; only their declarations in crt/host_runtime.h describe them.

static std::unordered_map<const void*, Kernel*>& kernels() {
  static auto* all = new std::unordered_map<const void*, Kernel*>;  // by the host's function
  return *all;
}
static std::unordered_set<const void*>& handles() {
  static auto* all = new std::unordered_set<const void*>;
  return *all;
}
struct Launch { dim3 grid, block; size_t shared; cudaStream_t stream; };
static thread_local std::vector<Launch> launches;

API void** __cudaRegisterFatBinary(void* binary) {
  auto** handle = new void*;
  *handle = binary;
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int,
                                uint3*, uint3*, dim3*, dim3*, int*) {
  Lock lock(state().mutex);
  auto*& kernel = kernels()[function];
  if (kernel) return;
  kernel = new Kernel;
  kernel->name = name;
  handles().insert(kernel);
}
static std::map<const void*, std::pair<size_t, void*>>& variables() {
  static auto* all = new std::map<const void*, std::pair<size_t, void*>>;
  return *all;
}
API void __cudaRegisterVar(void**, char* variable, char*, const char*, int, size_t size, int, int) {
  variables()[variable] = {size, calloc(1, size)};
}
API cudaError_t cudaGetSymbolAddress(void** out, const void* symbol) {
  auto found = variables().find(symbol);
  if (found == variables().end()) return cudaErrorInvalidSymbol;
  *out = found->second.second;
  return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t size, size_t offset,
                                   cudaMemcpyKind) {
  void* to = nullptr;
  if (cudaError_t error = cudaGetSymbolAddress(&to, symbol)) return error;
  memcpy(static_cast<char*>(to) + offset, from, size);
  return cudaSuccess;
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  launches.push_back({grid, block, shared, static_cast<cudaStream_t>(stream)});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (launches.empty()) return cudaErrorMissingConfiguration;
  auto& launch = launches.back();
  *grid = launch.grid;
  *block = launch.block;
  *shared = launch.shared;
  *static_cast<cudaStream_t*>(stream) = launch.stream;
  launches.pop_back();
  return cudaSuccess;
}
static Kernel* kernel_of(const void* function) {
  if (handles().count(function)) return static_cast<Kernel*>(const_cast<void*>(function));
  auto found = kernels().find(function);
  return found == kernels().end() ? nullptr : found->second;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* function) {
  Lock lock(state().mutex);
  *out = reinterpret_cast<cudaKernel_t>(kernel_of(function));
  return *out ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
static cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments,
                          cudaStream_t handle) {
  return on_stream("cudaLaunchKernel", handle, [&](Lock& lock, shared_ptr<Stream> stream) {
    Kernel* kernel = kernel_of(function);
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    if (stream->device != thread().device) return cudaErrorInvalidResourceHandle;
    uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (!threads || threads > 1024 || !grid.x || !grid.y || !grid.z)
      return cudaErrorInvalidConfiguration;
    // Programming Guide, "Lazy Loading": a kernel is loaded when it is launched first, and that may
    // synchronize the context.
    static std::set<std::pair<int, Kernel*>> loaded;
    bool first = loaded.insert({stream->device, kernel}).second && !stream->capture;
    if (first && state().loading_waits) {
      auto streams = device_now().streams;
      for (auto& other : streams) wait_for_stream(lock, other);
    }
    auto op = op_of_launch(*kernel, arguments, grid, block);
    if (!op) return cudaErrorNoKernelImageForDevice;
    // Programming Guide, "Environment Variables": CUDA_LAUNCH_BLOCKING.
    cudaError_t error = enqueue(stream, std::move(*op));
    return error || stream->capture || !state().launch_blocking ? error
                                                                : wait_for_stream(lock, stream);
  });
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                   size_t, cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, stream);
}
API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                 size_t, cudaStream_t stream) {
  return launch(function, grid, block, arguments, stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block,
                                            void** arguments, size_t, cudaStream_t stream) {
  return launch(function, grid, block, arguments, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                    void** arguments) {
  return launch(function, config->gridDim, config->blockDim, arguments, config->stream);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = 90;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*,
                                                                       int block, size_t,
                                                                       unsigned) {
  *count = std::max(1, 2048 / std::max(1, block));
  return cudaSuccess;
}

// ---------------------------------------------------------------------------- the driver

// Section "Driver Entry Point Access".

// The driver's library has the same devices. It is loaded by its name, as the runtime does.
__attribute__((constructor)) static void load_driver() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&load_driver), &info)) return;
  std::string path = info.dli_fname;
  path = path.substr(0, path.rfind('/') + 1) + "libcuda.so.1";
  dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
}
static int not_supported() {
  if (state().verbose) fprintf(stderr, "the stand-in for CUDA: a function of the driver that is missing\n");
  return 801;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** out, unsigned,
                                                 unsigned long long,
                                                 cudaDriverEntryPointQueryResult* status) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  *out = nullptr;
  for (const char* suffix : {"_v2", ""})
    if (driver && !*out) *out = dlsym(driver, (std::string(symbol) + suffix).c_str());
  if (!*out) *out = reinterpret_cast<void*>(&not_supported);
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// For libcuda.so.1: a wait on a stream for a value in memory.
API int cuda_standin_wait_value(cudaStream_t handle, uintptr_t address, uint32_t value, bool writes) {
  cudaError_t error = on_stream("cuStreamWaitValue32", handle, [&](Lock&, shared_ptr<Stream> s) {
    auto* p = reinterpret_cast<uint32_t*>(address);
    if (!memory_of(p) || address % 4) return cudaErrorInvalidValue;
    Op op;
    if (writes) op.work = [=] { *p = value; return cudaSuccess; };
    else op.address = p, op.value = value;
    return enqueue(s, std::move(op));
  });
  return int(error);
}
API bool cuda_standin_has_context(int device) {
  Lock lock(state().mutex);
  return state().devices[device].has_context;
}
API void* cuda_standin_current_context() {
  return thread().bound ? &device_now() : nullptr;
}
// For programs that count: ctypes.CDLL("libcudart.so.13").cuda_standin_calls(b"cudaEventQuery").
API uint64_t cuda_standin_calls(const char* name) {
  Lock lock(state().mutex);
  return state().calls[name];
}
// The nth unknown kernel that was launched, or null: see cuda_runtime/plugin.py.
API const char* cuda_standin_unknown_kernel(size_t n) {
  Lock lock(state().mutex);
  auto& names = state().unknown_kernels;
  return n < names.size() ? names[n].c_str() : nullptr;
}
// Fails the kernel that is enqueued with it: FAIL is an error of cudaError_t.
API int cuda_standin_enqueue_failure(cudaStream_t handle, int error) {
  return on_stream("cuda_standin_enqueue_failure", handle, [&](Lock&, shared_ptr<Stream> stream) {
    Op op;
    op.work = [=] { return cudaError_t(error); };
    return enqueue(stream, std::move(op));
  });
}

// ---------------------------------------------------------------------------- not here

#define NOT_SUPPORTED(NAME, ...)                                                        \
  API cudaError_t NAME(__VA_ARGS__) {                                                   \
    return call(#NAME, kContext, [&](Lock&) { return cudaErrorNotSupported; });         \
  }
NOT_SUPPORTED(cudaDeviceGetDefaultMemPool, cudaMemPool_t*, int)
NOT_SUPPORTED(cudaDeviceGetGraphMemAttribute, int, cudaGraphMemAttributeType, void*)
NOT_SUPPORTED(cudaDeviceSetGraphMemAttribute, int, cudaGraphMemAttributeType, void*)
NOT_SUPPORTED(cudaFreeAsync, void*, cudaStream_t)
NOT_SUPPORTED(cudaMallocAsync, void**, size_t, cudaStream_t)
NOT_SUPPORTED(cudaMemPoolGetAttribute, cudaMemPool_t, cudaMemPoolAttr, void*)
NOT_SUPPORTED(cudaMemPoolSetAccess, cudaMemPool_t, const cudaMemAccessDesc*, size_t)
NOT_SUPPORTED(cudaMemPoolSetAttribute, cudaMemPool_t, cudaMemPoolAttr, void*)
NOT_SUPPORTED(cudaMemPoolTrimTo, cudaMemPool_t, size_t)
NOT_SUPPORTED(cudaGraphAddNode, cudaGraphNode_t*, cudaGraph_t, const cudaGraphNode_t*,
              const cudaGraphEdgeData*, size_t, cudaGraphNodeParams*)
NOT_SUPPORTED(cudaGraphConditionalHandleCreate, cudaGraphConditionalHandle*, cudaGraph_t, unsigned,
              unsigned)
NOT_SUPPORTED(cudaStreamUpdateCaptureDependencies, cudaStream_t, cudaGraphNode_t*,
              const cudaGraphEdgeData*, size_t, unsigned)
NOT_SUPPORTED(cudaIpcCloseMemHandle, void*)
NOT_SUPPORTED(cudaIpcGetEventHandle, cudaIpcEventHandle_t*, cudaEvent_t)
NOT_SUPPORTED(cudaIpcGetMemHandle, cudaIpcMemHandle_t*, void*)
NOT_SUPPORTED(cudaIpcOpenEventHandle, cudaEvent_t*, cudaIpcEventHandle_t)
NOT_SUPPORTED(cudaIpcOpenMemHandle, void**, cudaIpcMemHandle_t, unsigned)
NOT_SUPPORTED(cudaKernelSetAttributeForDevice, cudaKernel_t, cudaFuncAttribute, int, int)
NOT_SUPPORTED(cudaLibraryGetKernel, cudaKernel_t*, cudaLibrary_t, const char*)
NOT_SUPPORTED(cudaLibraryLoadData, cudaLibrary_t*, const void*, cudaJitOption*, void**, unsigned,
              cudaLibraryOption*, void**, unsigned)
NOT_SUPPORTED(cudaLibraryUnload, cudaLibrary_t)
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void* function,
                                                              int block, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(count, function, block, shared, 0);
}
