"""A robust HTTP server: digits in batches, tokens as they are generated.

    pip install 'torchfut-aio[examples]'
    python examples/http_server.py [port]

    curl -d "[$(seq -s, 0 63)]" http://127.0.0.1:8000/digit
    curl -N 'http://127.0.0.1:8000/text?prompt=The&length=200'

The server runs Starlette on uvicorn, with uvloop. ``POST /digit`` takes the 64 pixels of an image,
0 to 16, and returns the digit, using the classifier of digits.py behind a `Batcher`. ``GET
/text`` continues a text: one thread generates a few tokens of every text at a time, and a
`ValueStream` passes each token to the handler, which sends it as a server-sent event. The server
handles these cases:

- Too many requests: new requests are answered 503 at once, queued requests in their turn.
- A request that takes too long: it is answered 504, and its image leaves the queue.
- A client that disconnects: its image leaves the queue, its text ends.
- A client that reads slowly: its text waits for a while, and the other texts continue.
- A client that sends slowly, or nothing: it is answered 408, or its connection is closed.
- A function that raises, even SystemExit: these requests are answered 500. A function that hangs:
  504, then 503.
- SIGTERM, or Ctrl-C: no more connections are accepted. For a second, existing connections may send
  requests, and each response asks its client to reconnect. The requests received by then are
  answered, unless a client does not read.

The proxy in front of the server has to limit the number of connections per client.
"""

import asyncio
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import pairwise
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

import anyio
import anyio.to_thread
import torch
import uvicorn
from digits import classify, images_and_labels, train
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from torchfut_aio import (
    Batcher,
    BatcherClosedError,
    QueueFullError,
    StreamClosedError,
    ValueStream,
)

MAX_BATCH = 64
MAX_QUEUE = 256  # waiting images
MAX_TEXTS = 100  # at a time
MAX_LENGTH = 1000  # tokens of a text
MAX_AHEAD = 16  # tokens that a client has not read yet
MAX_STEP = 4  # tokens of a text at a time
MAX_BODY = 10_000  # bytes
MAX_CONNECTIONS = 900  # most systems limit a process to 1,024 open files
HEAD_SECONDS = 5.0  # to receive the head of a request
BODY_SECONDS = 5.0  # to receive an image
SECONDS = 5.0  # to classify the image after that
TEXT_SECONDS = 60.0  # for a text
NOTICE = 1.0  # seconds for which responses announce that the server is shutting down
GRACE = 10.0  # seconds to answer the requests received by then

logger = logging.getLogger("http_server")

T = TypeVar("T")
R = TypeVar("R")
Classify = Callable[[list[torch.Tensor]], list[int]]
Continue = Callable[[list[str]], list[list[str]]]  # the next few tokens of each text


class Text:
    """A growing text, at most MAX_AHEAD tokens ahead of its client."""

    def __init__(self, prompt: str, length: int) -> None:
        self.text = prompt
        self.left = length
        self.tokens = ValueStream[str](max_size=MAX_AHEAD)

    @property
    def goes_on(self) -> bool:
        """Whether the text has not ended and its client still reads it."""
        return self.tokens.listening and not self.tokens.closed

    @property
    def has_room(self) -> bool:
        """Whether the client has read enough for another step."""
        return len(self.tokens) + MAX_STEP <= MAX_AHEAD

    def grow(self, tokens: list[str]) -> None:
        """Send the tokens to the client; does not block if there is room."""
        tokens = tokens[: min(self.left, MAX_STEP)]
        self.text += "".join(tokens)
        self.left -= len(tokens)
        with suppress(StreamClosedError):  # the client has disconnected
            self.tokens.put_many(tokens)
        if self.left == 0:
            self.tokens.close()


class Writer:
    """Continues all texts at once, in a thread. Each step adds a few tokens to each text."""

    def __init__(self, next_tokens: Continue) -> None:
        self.texts: list[Text] = []
        self._next_tokens = next_tokens
        self._new: SimpleQueue[Text | None] = SimpleQueue()
        self._is_closing = False
        self._thread = Thread(target=self._run, name="writer")
        self._thread.start()

    def write(self, prompt: str, length: int) -> ValueStream[str]:
        """Return a stream of the tokens that follow the prompt."""
        text = Text(prompt, length)
        self._new.put(text)
        return text.tokens

    def close(self, timeout: float) -> None:
        """Wait until all texts have ended.

        Raises:
            TimeoutError: The thread is still running.
        """
        self._new.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError("the writer's function did not return in time")

    def _run(self) -> None:
        while self.texts or not self._is_closing:
            able = [text for text in self.texts if text.has_room]
            try:
                for text, tokens in zip(able, self._continue(able), strict=True):
                    text.grow(tokens)
            except Exception as error:
                logger.exception("the texts failed")
                for text in able:
                    text.tokens.close(error)
            self._take_in(may_wait=not able)
            self.texts = [text for text in self.texts if text.goes_on]

    def _continue(self, texts: list[Text]) -> list[list[str]]:
        return self._next_tokens([text.text for text in texts]) if texts else []

    def _take_in(self, may_wait: bool) -> None:
        """Add new texts. If no other text can continue, wait for one, or for a client to read."""
        timeout = 0.01 if self.texts else None
        with suppress(Empty):
            while True:
                text = self._new.get(may_wait, timeout) if may_wait else self._new.get_nowait()
                may_wait = False
                if text is None:
                    self._is_closing = True
                else:
                    self.texts.append(text)


def contained(function: Callable[[list[T]], R]) -> Callable[[list[T]], R]:
    """Wrap a function so that it raises no error that would end its callers' event loop."""

    def call(items: list[T]) -> R:
        try:
            return function(items)
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"the function raised {type(error).__name__}") from error

    return call


class ClientLeftError(Exception):
    """The client closed the connection before it had its answer."""


async def answer_to(request: Request, answer: Awaitable[int]) -> int:
    """Await the answer, until the time is over or the client disconnects."""
    with anyio.CancelScope() as scope:
        watch = asyncio.create_task(cancel_if_disconnected(scope, request.receive))
        try:
            with anyio.fail_after(SECONDS):
                return await answer
        finally:
            watch.cancel()
    raise ClientLeftError


async def cancel_if_disconnected(scope: anyio.CancelScope, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def read_image(request: Request) -> torch.Tensor:
    body = b""
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise HTTPException(413)
        image = torch.tensor(json.loads(body), dtype=torch.float32).reshape(1, 8, 8)
        if not ((image >= 0) & (image <= 16)).all():  # also rejects NaN
            raise ValueError
    except TimeoutError:
        raise HTTPException(408) from None
    except (ArithmeticError, RuntimeError, TypeError, ValueError):
        raise HTTPException(400, "the body must be a list of 64 numbers, 0 to 16") from None
    return image / 16


class TextResponse(StreamingResponse):
    """Server-sent events, one per token. The last one is ``end`` or ``error``."""

    def __init__(self, stream: ValueStream[str]) -> None:
        self._stream, self._tokens = stream, stream.listen()
        super().__init__(self._events(self._tokens), media_type="text/event-stream")

    async def _events(self, tokens: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async for token in tokens:
                yield f"data: {json.dumps(token)}\n\n"
        except Exception as error:
            yield f"event: error\ndata: {json.dumps(type(error).__name__)}\n\n"
        else:
            yield "event: end\ndata:\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the tokens until they end, the client disconnects, or the timeout expires."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(TEXT_SECONDS, self._stream.close, TimeoutError())
        with self._tokens, anyio.move_on_after(1.1 * TEXT_SECONDS):  # the client may not read
            await super().__call__(scope, receive, send)
        timer.cancel()


class Service:
    """The application: its routes, and whether it is shutting down."""

    def __init__(self, classify: Classify, next_tokens: Continue) -> None:
        self.is_ending = False
        self.hangs = False
        self._texts: list[ValueStream[str]] = []
        self._classify = contained(classify)
        self._next_tokens = contained(next_tokens)
        routes = [
            Route("/digit", self.digit, methods=["POST"]),
            Route("/text", self.text),
            Route("/statistics", self.statistics),
        ]
        self._app: ASGIApp = Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self._batcher: Batcher[torch.Tensor, int] = Batcher(
            self._classify, max_batch_size=MAX_BATCH, max_wait=0.002, max_queue_size=MAX_QUEUE
        )
        self._writer = Writer(self._next_tokens)
        yield
        try:
            await self._batcher.aclose(timeout=GRACE)
        except TimeoutError:
            self.hangs = True
        try:
            await anyio.to_thread.run_sync(self._writer.close, GRACE)
        except TimeoutError:
            self.hangs = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request. During shutdown, the response asks the client to reconnect."""

        async def send_close(message: Message) -> None:
            if message["type"] == "http.response.start" and self.is_ending:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, send_close if scope["type"] == "http" else send)

    async def digit(self, request: Request) -> Response:
        """Return the digit that an image shows."""
        try:
            image = await read_image(request)
            digit = await answer_to(request, self._batcher(image))
        except (QueueFullError, BatcherClosedError):
            return JSONResponse({"error": "too many requests"}, 503, {"Retry-After": "1"})
        except TimeoutError:
            return JSONResponse({"error": "it took too long"}, 504)
        except (ClientDisconnect, ClientLeftError):
            return Response(status_code=499)  # the client does not read it
        except HTTPException:
            raise
        except Exception as error:
            logger.error("the classifier failed: %s", type(error).__name__)
            return JSONResponse({"error": type(error).__name__}, 500)
        return JSONResponse({"digit": digit})

    async def text(self, request: Request) -> Response:
        """Continue a text."""
        prompt = request.query_params.get("prompt") or "T"
        try:
            length = int(request.query_params.get("length", 100))
        except ValueError:
            length = 0
        if not 0 < length <= MAX_LENGTH or len(prompt) > MAX_BODY:
            raise HTTPException(400, f"the length must be from 1 to {MAX_LENGTH}")
        self._texts = [tokens for tokens in self._texts if tokens.listening]
        if len(self._texts) >= MAX_TEXTS:
            return JSONResponse({"error": "too many requests"}, 503, {"Retry-After": "1"})
        tokens = self._writer.write(prompt, length)
        self._texts.append(tokens)
        return TextResponse(tokens)

    async def statistics(self, _request: Request) -> Response:
        """Return the statistics of the batcher, and the number of texts in progress."""
        texts = len(self._writer.texts)
        return JSONResponse({**dataclasses.asdict(self._batcher.statistics()), "texts": texts})


class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Closes a connection if its client takes too long to send a request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the timer for the first request."""
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """Start the timer for the rest of a request, if it is incomplete."""
        super().data_received(data)
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_request()

    def _await_request(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._close_unless_after, self.cycle)

    def _close_unless_after(self, cycle: object) -> None:
        self._timer = None
        if self.cycle is cycle:
            self.transport.close()


class Server(uvicorn.Server):
    """Shuts down without dropping requests."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Print the address."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        print(f"serving on http://{host}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, and answer the requests of existing ones."""
        self._service.is_ending = True
        for connected in self._stop_listening():
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connected)
        # Closing a connection while its client sends a request would drop the request. So a
        # response first asks the client to close the connection. uvicorn then closes idle ones.
        await asyncio.sleep(NOTICE)
        await super().shutdown(sockets)
        # uvloop would wait for clients that do not read when it is closed.
        for connection in [*self.server_state.connections]:
            connection.transport.abort()

    def _stop_listening(self) -> list[socket.socket]:
        """Close the listening sockets; return the connections that are not accepted yet.

        Closing a listening socket drops these connections. A duplicate of the socket keeps it open
        until all are accepted.
        """
        files = [each.fileno() for server in self.servers for each in server.sockets]
        listeners = [socket.socket(fileno=os.dup(file)) for file in files]
        for server in self.servers:
            server.close()
        connected = []
        for listener in listeners:
            listener.setblocking(False)
            with listener, suppress(BlockingIOError):
                while True:
                    connected.append(listener.accept()[0])
        return connected

    def _protocol(self) -> asyncio.Protocol:
        state = self.lifespan.state
        return Protocol(config=self.config, server_state=self.server_state, app_state=state)


def serve(service: Service, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C, and answer the requests received by then."""
    config = uvicorn.Config(
        service,
        port=port,
        loop="uvloop",
        http=Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(GRACE),
    )
    # uvicorn installs its own handlers while it runs, and raises the signal again afterwards.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(KeyboardInterrupt):
        Server(config, service).run()
    print("the server has ended", flush=True)
    if service.hangs:
        logger.error("a function hangs: what waited for it has failed")
        os._exit(1)  # at exit, the interpreter would wait for the function


def bigrams(text: str) -> Continue:
    """Return a model of ``text`` that counts how often each character follows another."""
    characters = sorted({*text})
    place = {character: n for n, character in enumerate(characters)}
    counts = torch.zeros(len(characters), len(characters))
    for before, after in pairwise(text):
        counts[place[before], place[after]] += 1
    counts[counts.sum(dim=1) == 0] = 1  # perhaps nothing follows the last character

    def next_tokens(texts: list[str]) -> list[list[str]]:
        steps = [torch.tensor([place.get(text[-1], 0) for text in texts])]
        for _ in range(MAX_STEP):
            steps.append(torch.multinomial(counts[steps[-1]], 1).flatten())
        return [[characters[n] for n in row] for row in torch.stack(steps[1:], dim=1).tolist()]

    return next_tokens


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = train(*images_and_labels())
    serve(Service(partial(classify, model), bigrams(__doc__)), port)


if __name__ == "__main__":
    main()
