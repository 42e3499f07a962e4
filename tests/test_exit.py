"""During finalization nothing waits for a thread, as no thread runs any more."""

from __future__ import annotations

import pytest

from . import forks

# Code in the finaliser of a module's object, which runs when the interpreter clears the module.
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
    "get from a stream": "raises(ValueStream().get)",
    "adopt the result of a pool": "raises(lambda: as_future(result))",
    "shut down": "distributed.shutdown(); print('closed')",
    "call an RPC function": "raises(double)",
}

PROGRAM = """
import sys, threading, warnings
from multiprocessing.pool import ThreadPool
from torchfut_aio import *
from torchfut_aio import distributed

warnings.simplefilter("ignore")

@distributed.async_rpc
async def double():
    return 2

# An adapter that no source has needed before cannot be imported: an ImportError.
refusals = RuntimeError, ImportError

def raises(function, refusals=refusals, print=print, is_finalizing=sys.is_finalizing):
    assert is_finalizing()
    try:
        function()
    except refusals as error:
        print("refused:", error)

class AtExit:
    def __init__(self, do, globals):
        self.do, self.globals = compile(do, "at exit", "exec"), globals

    def __del__(self):
        exec(self.do, self.globals)

def begin(used):
    global batcher, result
    batcher = Batcher(list, max_batch_size=2, max_queue_size=100)
    if used:
        assert batcher.submit(1).wait(60) == 1
        assert double().wait(60) == 2
        with_timeout(Future(), 1000)
    result = ThreadPool(1).apply_async(threading.Event().wait)
"""


@pytest.mark.parametrize("case", CASES)
def test_finalizing_waits_for_no_thread(case):
    for used in (False, True):
        at_exit = f"AtExit({CASES[case]!r}, dict(globals()))"
        done = forks.run(f"{PROGRAM}\nbegin({used}); at_exit = {at_exit}")
        assert done.returncode == 0, done.stderr
        assert done.stdout == "closed\n" or done.stdout.startswith("refused: ")
