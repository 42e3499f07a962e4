"""Once the interpreter is finalizing, nothing waits for a thread, as none runs any more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .threads import PATIENCE_WITH_PROCESSES

# What the finaliser of an object of a module does, when the interpreter clears the module.
CASES = {
    "close": "batcher.close(); print('closed')",
    "close with a timeout": "batcher.close(timeout=1000); print('closed')",
    "close without draining": "batcher.close(drain=False); print('closed')",
    "submit": "raises(lambda: batcher.submit(1))",
    "with_timeout": "raises(lambda: with_timeout(Future(), 1000))",
    "wait": "raises(Future().wait)",
    "wait_all": "raises(lambda: wait_all([Future()]))",
    "as_completed": "raises(lambda: next(as_completed([Future()])))",
    "read a stream": "raises(lambda: next(iter(ValueStream())))",
    "adopt the result of a pool": "raises(lambda: as_future(result))",
    "shut down": "distributed.shutdown(); print('closed')",
    "call an RPC function": "raises(double)",
}

# One interpreter imports torch, and is forked for each case; a child exits as any interpreter.
PROGRAM = f"""
import os, sys, threading, warnings
from multiprocessing.pool import ThreadPool
from torchfut_aio import *
from torchfut_aio import distributed

warnings.simplefilter("ignore")

@distributed.async_rpc
async def double():
    return 2

def raises(function, RuntimeError=RuntimeError, print=print, is_finalizing=sys.is_finalizing):
    assert is_finalizing()
    try:
        function()
    except RuntimeError as error:
        print("refused:", error)

class AtExit:
    def __init__(self, do, globals):
        self.do, self.globals = do, globals

    def __del__(self):
        exec(self.do, self.globals)

def begin(used):
    global batcher, result
    batcher = Batcher(list, max_batch=2, max_wait=0, max_queue=100)
    if used:
        assert batcher.submit(1).wait(60) == 1
        assert double().wait(60) == 2
        with_timeout(Future(), 1000)
    result = ThreadPool(1).apply_async(threading.Event().wait)

for do in {list(CASES.values())!r}:
    for used in (False, True):
        sys.stdout.flush()
        if child := os.fork():
            status = os.waitpid(child, 0)[1]
            print("end", os.waitstatus_to_exitcode(status), flush=True)
        else:
            begin(used)
            at_exit = AtExit(compile(do, "at exit", "exec"), dict(globals()))
            break
    else:
        continue
    break
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What each case has printed, unused and used, by the case's name."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=PATIENCE_WITH_PROCESSES,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 0, done.stderr
    outputs = done.stdout.split("end ")
    texts = outputs[:-1]
    codes = [after.split("\n", 1)[0] for after in outputs[1:]]
    texts = [texts[0], *(text.split("\n", 1)[1] for text in texts[1:])]
    assert set(codes) == {"0"}, (codes, done.stderr)
    return dict(zip(CASES, zip(texts[::2], texts[1::2], strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_finalizing_waits_for_no_thread(case, ends):
    for text in ends[case]:
        assert text.strip() == "closed" or text.startswith("refused: "), text
