"""After a kernel has failed, each wait raises the device's error and none hangs."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from ..threads import PATIENCE_WITH_PROCESSES

ASSERTED = "CUDA error: device-side assert triggered"

WAITS = [
    "await, devices declared",
    "await, devices undeclared",
    "await of another stream",
    "synchronize(stream)",
    "synchronize(device)",
    "synchronize(event)",
    "to_host",
    "as_future(event)",
    "as_future(stream)",
    "then",
    "gather",
    "with_timeout",
    "wait in a thread",
    "as_concurrent",
]

AFTERWARDS = {
    "an int": "returned 5",
    "an int, devices declared": "returned 5",
    "a CPU tensor": "returned tensor([1., 1.])",
    "a CUDA tensor": ASSERTED,
    "a CUDA tensor, devices declared": ASSERTED,
    "to_host of an int": "returned 5",
    "to_host of a CUDA tensor": ASSERTED,
    "gather of ints": "returned [1, 2]",
    "then of an int": "returned 2",
    "synchronize()": ASSERTED,
    "synchronize of the device": ASSERTED,
    "the same future": ASSERTED,
    "as_future of the event": ASSERTED,
}

pytestmark = pytest.mark.parametrize("how", ["asyncio", "trio", "asyncio blocking"])


@functools.cache
def outcomes(how):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.cuda_runtime.failed_kernel", *how.split()],
        capture_output=True,
        text=True,
        timeout=PATIENCE_WITH_PROCESSES,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_raises_the_error_of_the_device(how, wait):
    assert ASSERTED in outcomes(how)[wait]


def test_asyncio_future_raises_the_error_of_the_device(how):
    if how.startswith("asyncio"):
        assert ASSERTED in outcomes(how)["as_asyncio"]


def test_a_callback_is_called_once(how):
    assert outcomes(how)["callbacks called"] == "1"


@pytest.mark.parametrize("use", AFTERWARDS)
def test_only_device_operations_raise_after_the_failure(how, use):
    assert AFTERWARDS[use] in outcomes(how)[f"afterwards: {use}"]


def test_no_future_stays_pending_after_the_failure(how):
    assert outcomes(how)["pending"] == "0"
