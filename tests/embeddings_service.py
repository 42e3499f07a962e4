"""The example embeddings server, with the model of the example or one that obeys its test."""

from __future__ import annotations

import asyncio
import json
import math
import os
import pathlib
import sys
import time
import warnings
from typing import Any

import torch
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from torchfut_aio import QueueFullError

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import embeddings_server

from .threads import PATIENCE_WITH_PROCESSES

FAULTS = {
    "!": OSError("the model is broken"),
    "T": TimeoutError("the model is broken"),
    "Q": QueueFullError("the model is broken"),
    "H": HTTPException(418, "the model is broken"),
    "D": ClientDisconnect("the model is broken"),
    "S": SystemExit("the model is broken"),
    "K": KeyboardInterrupt("the model is broken"),
    "C": asyncio.CancelledError("the model is broken"),
}


class Model:
    """Has a token for each letter. Its batches, and the text "wait", wait for the file ``gate``."""

    name = "letters"
    max_tokens = 10
    vocabulary_size = 128

    def __init__(self, folder: pathlib.Path) -> None:
        self._gate, self._ran = folder / "gate", folder / "ran"
        self._tokenized = folder / "tokenized"

    def tokenize(self, text: str) -> list[int]:
        with self._tokenized.open("a") as file:
            print(text, file=file)
        while text == "wait" and not self._gate.exists():
            time.sleep(0.001)
        return [ord(letter) for letter in text]

    def embed(self, texts: list[list[int]]) -> torch.Tensor:
        """Return the first token of each text and their number; FAULTS fail the batch."""
        with self._ran.open("a") as file:
            print(json.dumps(["".join(map(chr, text)) for text in texts]), file=file)
        while not self._gate.exists():
            time.sleep(0.001)
        for text in texts:
            if (fault := FAULTS.get("".join(map(chr, text)))) is not None:
                raise fault
        rows = [[math.nan if text == [ord("N")] else text[0], len(text)] for text in texts]
        return torch.tensor(rows, dtype=torch.float32)


def serve(folder: pathlib.Path, constants: dict[str, Any]) -> None:
    """Serve `Model` on a free port, with some constants of the example changed."""
    _prepare(folder)
    vars(embeddings_server).update(constants)
    embeddings_server.serve(Model(folder), "0")


def serve_example(folder: pathlib.Path, texts: list[str]) -> None:
    """Run the example on a free port. Before, store what its model returns for each text alone."""
    _prepare(folder)
    from embedder import Embedder

    model = Embedder()
    alone = [(tokens := model.tokenize(text), model.embed([tokens])[0].tolist()) for text in texts]
    (folder / "alone").write_text(json.dumps(alone))
    sys.argv[1:] = ["0"]
    embeddings_server.main()


def _prepare(folder: pathlib.Path) -> None:
    embeddings_server.SECONDS = PATIENCE_WITH_PROCESSES
    embeddings_server.GRACE = int(PATIENCE_WITH_PROCESSES)
    os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT, 0o600), 2)
    warnings.simplefilter("error")
