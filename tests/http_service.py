"""The example HTTP server, with functions that misbehave on demand."""

from __future__ import annotations

import os
import pathlib
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from torchfut_aio import Batcher

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import http_server


def serve(gate: str, output: str, log: str, constants: dict[str, Any]) -> None:
    """Run the server on a free port, with some constants of the example changed."""
    for path, descriptor in ((output, 1), (log, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    vars(http_server).update(constants)

    def classify(images: list[torch.Tensor]) -> list[int]:
        """Return the first pixel, once the file ``gate`` exists."""
        while not os.path.exists(gate):
            time.sleep(0.001)
        numbers = [(image.flatten()[:2] * 16).tolist() for image in images]
        for error, number in ((OSError, 1), (SystemExit, 3), (KeyboardInterrupt, 4)):
            if any(second == number for _, second in numbers):
                raise error("the model is broken")
        if any(second == 2 for _, second in numbers):
            time.sleep(3600)
        return [round(first) for first, _ in numbers]

    def generate(prompt: str, length: int) -> Iterator[str]:
        """Continue "b5." with "bbbbb."; such tokens can be large enough to fill buffers."""
        for error in (OSError, SystemExit, KeyboardInterrupt):
            if prompt.startswith(error.__name__):
                raise error("the model is broken")
        if prompt.startswith("hang"):
            time.sleep(3600)
        for _ in range(length):
            yield prompt[0] * int(prompt[1:].partition(".")[0]) + "."

    digits = Batcher(classify, max_batch_size=20, max_queue_size=256)
    http_server.serve(digits, generate, 0)
