"""The stand-in behaves as CUDA's documentation says, as far as the package's tests rely on it.

Each case runs in its own process: some depend on settings, and some leave the device unusable.
"""

from __future__ import annotations

import pytest

from .. import forks

ENDING = """
sys.stdout.flush()
os._exit(0)
"""

BEFORE = """
import ctypes, os, sys, threading, time
import torch
from tests import cuda_device, cuda_runtime
from tests.accelerator import ends_soon

def raised(function):
    try:
        function()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "nothing"

def seconds(function):
    start = time.monotonic()
    function()
    return time.monotonic() - start

def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]

def captured(body, mode="global"):
    errors = []
    def run():
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode=mode)
            errors.append(raised(body))
            graph.capture_end()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    end = raised(run)
    print("inside:", *errors)
    print("at the end:", end)

def held_up(device="cuda:0"):
    "A stream that is held up until cuda_device.wake()."
    stream = torch.Stream(device)
    with stream:
        cuda_device.sleep(100)
    return stream

def runs_beside_one_that_is_held_up():
    stream, other = held_up(), torch.Stream("cuda")
    with other:
        torch.cuda._sleep(1)
    print(ends_soon(other), stream.query())
    cuda_device.wake()
    stream.synchronize(), other.synchronize()

SLEEP = 10**9  # cycles, which take a second here
"""

UNSUPPORTED = "CUDA error: operation not permitted when stream is capturing"
INVALIDATED = "CUDA error: operation failed due to a previous error during capture"
ASSERTED = "CUDA error: device-side assert triggered"

# Each case: a program, and its output.
CASES = {
    "a kernel that is not known raises, and is noted": (
        """
tensor = torch.ones(3, 3, device="cuda")
print(raised(tensor.triu))
print(["triu" in name for name in cuda_runtime.unknown_kernels()])
print(tensor.tolist() == [[1] * 3] * 3)
""",
        "CUDA error: no kernel image is available for execution on the device\n[True]\nTrue",
    ),
    "after a kernel has failed every call returns its error": (
        """
tensor, other = torch.zeros(2, device="cuda"), torch.zeros(2, device="cuda:1")
event, stream = torch.Event("cuda"), torch.Stream("cuda")
event.record()
cuda_runtime.enqueue_failure(710, torch.cuda.current_stream())
for use in (
    torch.cuda.synchronize, event.query, event.record, stream.query, stream.synchronize,
    lambda: torch.ones(2, device="cuda"), tensor.tolist, lambda: tensor + 1, other.tolist,
):
    print(raised(use))
""",
        "\n".join([ASSERTED] * 9),
    ),
    "an error may be that of one device": (
        """
os.environ["CUDA_STANDIN_ERRORS_STAY_ON_DEVICE"] = "1"
tensor, other = torch.zeros(2, device="cuda"), torch.zeros(2, device="cuda:1")
cuda_runtime.enqueue_failure(710, torch.cuda.current_stream())
print(raised(torch.cuda.synchronize))
torch.cuda.set_device(1)
print((other + 1).tolist())
print(raised(tensor.tolist))
""",
        f"{ASSERTED}\n[1.0, 1.0]\n{ASSERTED}",
    ),
    "a failed assertion of a kernel is an error of the device": (
        """
torch._assert_async(torch.ones(1, device="cuda"))
torch.cuda.synchronize()
torch._assert_async(torch.zeros(1, device="cuda"))
print(raised(torch.cuda.synchronize))
""",
        ASSERTED,
    ),
    "a launch blocks if CUDA_LAUNCH_BLOCKING is set": (
        """
os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
print(seconds(lambda: torch.cuda._sleep(SLEEP)) > 0.9)
print(raised(lambda: torch._assert_async(torch.zeros(1, device="cuda"))))
""",
        f"True\n{ASSERTED}",
    ),
    "a context is made on the devices that are used": (
        """
has_context = torch._C._cuda_hasPrimaryContext
print(has_context(0), has_context(1))
torch.cuda.set_device(1)
torch.zeros(2, device="cuda:1").tolist()
print(has_context(0), has_context(1))
in_thread(lambda: torch.cuda.current_stream().query())
print(has_context(0), has_context(1))
""",
        "False False\nFalse True\nTrue True",
    ),
    "there may be no device": (
        """
os.environ["CUDA_STANDIN_DEVICES"] = "0"
print(torch.cuda.is_available(), torch.cuda.device_count())
""",
        "False 0",
    ),
    "some devices may be invisible": (
        """
os.environ["CUDA_VISIBLE_DEVICES"] = "1"
print(torch.cuda.is_available(), torch.cuda.device_count())
""",
        "True 1",
    ),
    "a child of fork cannot use a device": (
        """
torch.zeros(2, device="cuda")
if child := os.fork():
    os.waitpid(child, 0)
else:
    torch.cuda._is_in_bad_fork = lambda: False
    print(raised(torch.cuda.synchronize))
""",
        "CUDA error: initialization error",
    ),
    "memory ends": (
        """
os.environ["CUDA_STANDIN_MEMORY_MIB"] = "64"
print(raised(lambda: torch.empty(100 << 20, dtype=torch.uint8, device="cuda"))[:18])
print(torch.zeros(2, device="cuda").tolist())
""",
        "CUDA out of memory\n[0.0, 0.0]",
    ),
    "memory begins as garbage": (
        "print(torch.empty(4, dtype=torch.uint8, device='cuda').tolist())",
        "[203, 203, 203, 203]",
    ),
    "streams run apart": ("runs_beside_one_that_is_held_up()", "True False"),
    "streams may share hardware queues": (
        """
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
torch.zeros(2, device="cuda"), cuda_device._cycles_per_second()
runs_beside_one_that_is_held_up()
""",
        "False False",
    ),
    "a first launch may wait for the device": (
        """
os.environ["CUDA_STANDIN_LOADING_WAITS"] = "1"
tensor = torch.empty(2, device="cuda")
with torch.Stream("cuda"):
    torch.cuda._sleep(SLEEP)
print(seconds(lambda: tensor.fill_(1)) > 0.5, seconds(lambda: tensor.fill_(2)) > 0.5)
""",
        "True False",
    ),
    "a copy to pageable memory waits, and one to pinned memory does not": (
        """
tensor = torch.zeros(2, device="cuda")
pageable, pinned = torch.empty(2), torch.empty(2).pin_memory()
torch.cuda._sleep(1)
for host in (pinned, pageable):
    torch.cuda._sleep(SLEEP)
    print(seconds(lambda: host.copy_(tensor, non_blocking=True)) > 0.5)
""",
        "False\nTrue",
    ),
    "an event is recorded on streams of its own device": (
        """
event, stream = torch.cuda.Event(), torch.cuda.Stream(1)
event.record(torch.cuda.current_stream(0))
record = ctypes.CDLL("libcudart.so.13").cudaEventRecord
print(record(ctypes.c_void_p(event.cuda_event), ctypes.c_void_p(stream.cuda_stream)))
""",
        "400",  # cudaErrorInvalidResourceHandle
    ),
    "the time between two events is that of the kernels": (
        """
begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
begin.record()
torch.cuda._sleep(SLEEP // 10)
end.record()
end.synchronize()
print(100 <= begin.elapsed_time(end) < 60_000)
""",
        "True",
    ),
    "a graph replays what was captured": (
        """
tensor, graph = torch.zeros(2, device="cuda"), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    tensor += 1
print(tensor.tolist())
graph.replay(), graph.replay()
print(tensor.tolist())
""",
        "[0.0, 0.0]\n[2.0, 2.0]",
    ),
    "a query of another thread ends a capture in global mode": (
        """
event = torch.Event("cuda")
event.record()
captured(lambda: print("in another thread:", in_thread(lambda: raised(event.query))))
""",
        f"in another thread: {UNSUPPORTED}\ninside: nothing\nat the end: {INVALIDATED}",
    ),
    "a query of another thread leaves a capture in thread_local mode alone": (
        """
event = torch.Event("cuda")
event.record()
torch.cuda.synchronize()
captured(lambda: print(in_thread(event.query)), "thread_local")
""",
        "True\ninside: nothing\nat the end: nothing",
    ),
    "a query of the thread that captures is unsafe in thread_local mode": (
        """
event = torch.Event("cuda")
event.record()
captured(event.query, "thread_local")
""",
        f"inside: {UNSUPPORTED}\nat the end: {INVALIDATED}",
    ),
    "in relaxed mode a query is safe": (
        """
event = torch.Event("cuda")
event.record()
torch.cuda.synchronize()
captured(event.query, "relaxed")
""",
        "inside: nothing\nat the end: nothing",
    ),
    "a capture does not depend on what was not captured": (
        """
event = torch.Event("cuda")
event.record()
captured(lambda: torch.accelerator.current_stream().wait_event(event))
""",
        "inside: CUDA error: dependency created on uncaptured work in another stream\n"
        f"at the end: {INVALIDATED}",
    ),
    "a capture does not end before what it forked is joined": (
        """
tensor, other = torch.zeros(2, device="cuda"), torch.cuda.Stream()
def fork():
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        tensor.fill_(1)
captured(fork)
""",
        "inside: nothing\nat the end: CUDA error: capturing stream has unjoined work",
    ),
    "a stream that is captured is not synchronised": (
        "captured(lambda: torch.cuda.current_stream().synchronize())",
        f"inside: {UNSUPPORTED}\nat the end: {INVALIDATED}",
    ),
}


@pytest.fixture(scope="module")
def printed():
    """The output of each program."""
    return {name: printed_by(program) for name, (program, _) in CASES.items()}


def printed_by(program):
    done = forks.run(BEFORE + program + ENDING, filters="ignore", finalizes=False)
    assert done.returncode == 0, done.stderr
    return "\n".join(done.stdout.splitlines())


@pytest.mark.parametrize("name", CASES)
def test_runtime_prints_the_documented_result(printed, name):
    assert printed[name] == CASES[name][1]
