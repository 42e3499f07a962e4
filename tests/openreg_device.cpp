// A kernel for torch_openreg that does nothing until it is woken: see openreg_device.py.

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>

struct orStream;
namespace openreg {
int addTaskToStream(orStream* stream, std::function<void()> task);
}

namespace {
std::mutex mutex;
// Never destroyed: at the end of the process a stream may still wait.
auto& woken = *new std::condition_variable;
long times_woken = 0;
} // namespace

extern "C" int enqueue_sleep(orStream* stream, double seconds) {
  std::lock_guard<std::mutex> lock(mutex);
  return openreg::addTaskToStream(stream, [seconds, before = times_woken] {
    std::unique_lock<std::mutex> lock(mutex);
    woken.wait_for(lock, std::chrono::duration<double>(seconds),
                   [before] { return times_woken != before; });
  });
}

extern "C" void wake_all() {
  std::lock_guard<std::mutex> lock(mutex);
  times_woken++;
  woken.notify_all();
}
