// Each stream is a thread that runs the jobs of a queue in order. An event is a mark that a
// job on such a queue sets. Tensors are in other files.
//
// No stream thread ever takes the GIL, so none may destroy an object that refers to Python.

#pragma once

#include <c10/core/Stream.h>
#include <c10/util/Exception.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <signal.h>
#include <string>
#include <thread>

namespace simulated {

constexpr auto kSim = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;
// Stream 0 is the default stream. The others are returned in turn to programs and futures, as
// on CUDA and XPU, from one ring for each of two priorities. They never have the id 2: on CUDA
// it is another stream in each thread.
constexpr int kFirstOfRings = 3, kRing = 32, kStreams = kFirstOfRings + 2 * kRing;

// Guards everything in this file. One lock is enough: kernels sleep.
inline std::mutex mutex;
using Lock = std::unique_lock<std::mutex>;

struct Counters {
  int64_t event_queries, events_created, events_destroyed, synchronizations;
};
inline Counters counters{};

inline void count(int64_t& counter) {
  Lock lock(mutex);
  counter++;
}

using Job = std::function<void()>;

// One recording of an event. An event that is recorded again gets a new mark, which does
// not affect waits for the old one.
struct Queue;
struct Mark {
  const Queue& queue;
  bool reached = false, after_failure = false;
  std::condition_variable changed;

  void reach();
};
using MarkPtr = std::shared_ptr<Mark>;

// One step of a stream: a job, or a mark to reach.
struct Step {
  Job job;
  MarkPtr mark;
};

struct Queue {
  std::deque<Step> steps; // the one that is being taken stays at the front until it is done
  std::condition_variable arrived;
  std::thread thread; // started by the first job
  std::string error; // of the first kernel that failed; those after it do not run
  std::chrono::steady_clock::time_point finished; // when the latest kernel did

  void check() const { TORCH_CHECK(error.empty(), error); }
};

inline void Mark::reach() {
  reached = true;
  after_failure = !queue.error.empty();
  changed.notify_all();
}

// Never destroyed, as static objects are destroyed while threads may still run.
inline auto& queues = *new std::array<std::array<Queue, kStreams>, kDevices>;

inline Queue& queue_of(c10::Stream stream) {
  return queues.at(stream.device_index()).at(stream.id());
}

inline void for_each_queue(const std::function<void(Queue&)>& visit) {
  for (auto& of_device : queues)
    for (auto& queue : of_device)
      visit(queue);
}

inline bool stopping = false;
inline int64_t wakes = 0; // how often wake() was called
inline std::condition_variable woken;

// Sleeps until the time is up, or wake() is called after this.
inline Job sleeper(double seconds) {
  Lock lock(mutex);
  return [duration = std::chrono::duration<double>(seconds), before = wakes] {
    Lock lock(mutex);
    woken.wait_for(lock, duration, [&] { return stopping || wakes != before; });
  };
}

inline void wake() {
  Lock lock(mutex);
  wakes++;
  woken.notify_all();
}

inline void work_off(Queue& queue) {
  Lock lock(mutex);
  while (true) {
    queue.arrived.wait(lock, [&] { return stopping || !queue.steps.empty(); });
    if (queue.steps.empty())
      return;
    Step step = std::move(queue.steps.front());
    if (step.job) {
      lock.unlock();
      step.job();
      step.job = nullptr; // frees memory, for which it may need the lock
      lock.lock();
    }
    queue.steps.pop_front();
    // Only now: a stream whose last mark has been reached is idle.
    if (step.mark)
      step.mark->reach();
  }
}

inline void enqueue(Queue& queue, Step step) {
  Lock lock(mutex);
  if (stopping) // only daemon threads still get here, perhaps for ever
    return;
  queue.steps.push_back(std::move(step));
  queue.arrived.notify_one();
  if (queue.thread.joinable())
    return;
  sigset_t all, before; // signals are for Python's threads, not for this one
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  queue.thread = std::thread(work_off, std::ref(queue));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

inline void launch(c10::Stream stream, Job kernel) {
  Queue& queue = queue_of(stream);
  enqueue(queue, {[&queue, kernel = std::move(kernel)] {
    Lock lock(mutex);
    if (!queue.error.empty())
      return;
    lock.unlock();
    std::string error;
    try {
      kernel();
    } catch (const std::exception& exception) {
      error = exception.what();
    }
    lock.lock();
    queue.error = error;
    queue.finished = std::chrono::steady_clock::now();
  }, nullptr});
}

inline MarkPtr record(Queue& queue) {
  MarkPtr mark(new Mark{queue});
  Lock lock(mutex);
  if (mark->queue.steps.empty()) {
    mark->reach();
    return mark;
  }
  lock.unlock();
  enqueue(queue, {nullptr, mark});
  return mark;
}

inline MarkPtr record(c10::Stream stream) { return record(queue_of(stream)); }

inline void wait(const MarkPtr& mark) {
  Lock lock(mutex);
  mark->changed.wait(lock, [&] { return mark->reached; });
}

// Makes the stream wait, not the caller. A failure does not spread to the stream.
inline void block(c10::Stream stream, const MarkPtr& mark) {
  enqueue(queue_of(stream), {[mark] { wait(mark); }, nullptr});
}

inline bool query(const MarkPtr& mark) {
  Lock lock(mutex);
  if (mark->after_failure)
    mark->queue.check();
  return mark->reached;
}

inline void synchronize(const MarkPtr& mark) {
  count(counters.synchronizations);
  wait(mark);
  query(mark);
}

// Ends all kernels, and forgets all failures.
inline void reset() {
  wake();
  for_each_queue([](Queue& queue) {
    wait(record(queue));
    Lock lock(mutex);
    queue.error.clear();
  });
}

// Runs what is queued, without sleeping, and ends all threads.
inline void shut_down() {
  for_each_queue([](Queue& queue) {
    Lock lock(mutex);
    stopping = true;
    woken.notify_all();
    queue.arrived.notify_all();
  });
  for_each_queue([](Queue& queue) {
    if (queue.thread.joinable())
      queue.thread.join();
  });
}

} // namespace simulated
