"""An interpreter that forks itself for each program: see `tests.forks`.

It imports only what torch imports, and the modules that it is asked for: some programs check which
modules are imported.
"""

import atexit
import gc
import importlib
import json
import os
import sys
import threading
import types
import warnings
from types import CodeType
from typing import Any


def serve(*modules: str) -> tuple[CodeType, dict[str, Any]]:
    """Import modules; then return, in a fork for each request, the program and its namespace.

    The caller is the main program of the interpreter. Running the program is its last step, so a
    fork exits as an interpreter does.
    """
    for module in modules:
        importlib.import_module(module)
    requests, answers = os.fdopen(os.dup(0)), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.close(nothing)
    gc.collect()
    # Without freeze(), a collection in a fork would copy all of this memory. Frozen objects are not
    # collected at exit either: a program that tests the exit imports the package after the fork.
    gc.freeze()
    for line in requests:
        child = os.fork()
        if child == 0:
            requests.close()
            os.close(answers)
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            return _program(**json.loads(line)), main.__dict__
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, b"%d\n" % code)
    os._exit(0)


def _program(
    code: str, arguments: list[str], folder: str, filters: str, files: list[str]
) -> CodeType:
    """Set up this process as ``python -c code`` or ``python arguments`` would."""
    for descriptor, path in enumerate(files, 1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(folder)
    if filters != "error":  # the filters of this interpreter
        warnings.filters.remove(("error", None, Warning, None, 0))
        sys.warnoptions[:] = filters.split(",") if filters else []
        warnings._processoptions(sys.warnoptions)
    if not arguments:
        return compile(code, "<string>", "exec")
    sys.argv[:] = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    sys.modules["__main__"].__file__ = arguments[0]
    return compile(code, arguments[0], "exec")


def exit_without_modules() -> None:
    """Exit as the interpreter does, but finalize no module except the main one."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.modules["__main__"].__dict__.clear()
    gc.collect()  # logs errors that were never retrieved
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
