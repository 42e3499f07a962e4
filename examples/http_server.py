"""An HTTP server: digits in batches, and texts token by token, as server-sent events.

    pip install '.[examples]'    # in a checkout
    python examples/http_server.py [port]

    curl -d "[$(yes 8 | head -64 | paste -sd,)]" http://127.0.0.1:8000/digit
    curl -N 'http://127.0.0.1:8000/text?prompt=The&length=200'

On a network, run nginx in front of it, with nginx.conf: it stops slow and greedy clients.
"""

import asyncio
import dataclasses
import gc
import json
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from threading import Thread
from typing import Any, TypeVar

import anyio
import torch
import uvicorn
from digits import classify, images_and_labels, train
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from torchfut_aio import Batcher, QueueFullError, ValueStream

MAX_TEXTS = 100  # at a time; each has a thread
MAX_AHEAD = 16  # tokens that a client has not read yet
MAX_BODY = 10_000  # bytes
BODY_SECONDS = 5.0  # to receive an image
SECONDS = 5.0  # to classify it
TEXT_SECONDS = 20.0  # to generate and send a text
GRACE = 25  # seconds to shut down, more than any request may take

T = TypeVar("T")
R = TypeVar("R")
Generate = Callable[[str, int], Iterator[str]]  # of a prompt and a length


async def run_unless_left(request: Request, batcher: Batcher[T, R], item: T) -> R:
    """Return the result of the item. The body of the request must have been read."""
    with anyio.CancelScope() as scope, anyio.move_on_after(SECONDS) as limit:
        listener = asyncio.create_task(cancel_when_left(request, scope))
        try:
            return await batcher(item)
        except QueueFullError:
            raise HTTPException(503, "too many requests", {"Retry-After": "1"}) from None
        except (SystemExit, KeyboardInterrupt) as error:  # of the model; it would end the loop
            raise HTTPException(500, "the model has exited") from error
        finally:
            listener.cancel()
    if limit.cancelled_caught:  # a TimeoutError of the model is no 504
        raise HTTPException(504, "it took too long")
    raise ClientDisconnect


async def cancel_when_left(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def digit(request: Request) -> Response:
    """Return the digit in an image."""
    try:
        with anyio.fail_after(BODY_SECONDS):
            body = await request.body()
        image = torch.tensor(json.loads(body), dtype=torch.float32).reshape(1, 8, 8) / 16
        if not ((image >= 0) & (image <= 1)).all():  # also rejects NaN
            raise ValueError
    except TimeoutError:
        raise HTTPException(408) from None
    except (ArithmeticError, RuntimeError, TypeError, ValueError):
        raise HTTPException(400, "the body must be a list of 64 numbers, 0 to 16") from None
    return JSONResponse({"digit": await run_unless_left(request, request.app.state.digits, image)})


class TextResponse(StreamingResponse):
    """The events of a text. They end after TEXT_SECONDS, even if the client reads nothing."""

    number = 0  # of texts in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        TextResponse.number += 1
        try:
            with anyio.move_on_after(TEXT_SECONDS):
                await super().__call__(scope, receive, send)
        finally:
            TextResponse.number -= 1


def write(generate: Generate, prompt: str, length: int, stream: ValueStream[str]) -> None:
    """Generate a text in this thread. A full stream blocks it until the client has read."""
    with suppress(BaseException), stream:  # the reader gets the error
        for token in generate(prompt, length):
            stream.put(token)  # raises StreamClosedError when the client has left


async def events(*text: Any) -> AsyncIterator[str]:
    stream = ValueStream[str](max_size=MAX_AHEAD)
    Thread(target=write, args=(*text, stream)).start()
    with stream.listen() as tokens:
        try:
            async for token in tokens:
                yield f"data: {json.dumps(token)}\n\n"
            yield "event: end\ndata:\n\n"
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # it is too late for a status
            yield f"event: error\ndata: {json.dumps(type(error).__name__)}\n\n"


async def text(request: Request) -> Response:
    """Continue a text."""
    prompt = request.query_params.get("prompt") or "T"
    length = request.query_params.get("length", "100")
    if not (length.isdecimal() and len(length) <= 4 and len(prompt) <= MAX_BODY):
        raise HTTPException(400, "the length must be a number, 0 to 9999")
    if TextResponse.number >= MAX_TEXTS:
        raise HTTPException(503, "too many texts", {"Retry-After": "1"})
    stream = events(request.app.state.generate, prompt, int(length))
    return TextResponse(stream, media_type="text/event-stream")


async def statistics(request: Request) -> Response:
    """Return the statistics of the digits' batcher, and the number of texts in progress."""
    found = dataclasses.asdict(request.app.state.digits.statistics())
    return JSONResponse({**found, "texts": TextResponse.number})


def handle_signals(handler: Callable[..., object] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def serve(digits: Batcher[torch.Tensor, int], generate: Generate, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C, and answer the requests received by then."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        handle_signals(stop)  # instead of uvicorn, which drops requests at a second Ctrl-C
        app.state.digits, app.state.generate = digits, generate
        async with digits:
            yield

    def stop(*_: object) -> None:
        server.should_exit = True
        signal.alarm(GRACE + 3)  # ends the process if a function hangs

    handle_signals(stop)
    routes = [
        Route("/digit", digit, methods=["POST"]),
        Route("/text", text),
        Route("/statistics", statistics),
    ]
    unread = {ClientDisconnect: lambda *_: Response(status_code=499)}
    app = Starlette(
        routes=routes, exception_handlers=unread, lifespan=lifespan, max_body_size=MAX_BODY
    )
    config = uvicorn.Config(
        app,
        http="h11",  # limits the size of a head
        ws="none",
        headers=[("Connection", "close")],  # nginx opens a connection for each request
        log_level="warning",
        timeout_graceful_shutdown=GRACE,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", port), backlog=config.backlog) as listener:
        # The kernel closes a connection whose client reads nothing for 10 s.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)
        print(f"serving on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        server.run(sockets=[listener])
    handle_signals(signal.SIG_IGN)  # the process exits


def generate(_prompt: str, length: int) -> Iterator[str]:
    """Yield letters, in the place of a language model."""
    for _ in range(length):
        yield random.choice(__doc__)


def main() -> None:
    torch.set_num_threads(1)  # the event loop needs a core as well
    model = train(*images_and_labels())
    # What is alive now, such as PyTorch and the model, is never collected. The garbage collector no
    # longer looks through it, so its pauses are short.
    gc.freeze()
    digits = Batcher(
        partial(classify, model), max_batch_size=64, max_queue_size=256, max_wait=0.002
    )
    serve(digits, generate, int(sys.argv[1]) if sys.argv[1:] else 8000)


if __name__ == "__main__":
    main()
