"""An embeddings server with OpenAI's API: texts in batches, limited by their tokens.

    pip install '.[examples]'    # in a checkout
    python examples/embeddings_server.py [port] [host]    # 8000 and 127.0.0.1

    curl http://127.0.0.1:8000/v1/embeddings \
        -d '{"model": "all-MiniLM-L6-v2", "input": ["one text", "another text"]}'

Each text of a request is an item of a `Batcher`. If the request is refused or times out, or its
client leaves, its texts leave the queue. See docs/guides/embeddings.md.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import anyio
import torch
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, BeforeValidator, Field, Strict, ValidationError
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from torchfut_aio import (
    Batcher,
    BatcherClosedError,
    BatchReport,
    Future,
    QueueFullError,
    gather,
)

if TYPE_CHECKING:
    from embedder import Embedder, Tokens

# A slow core runs 1,000 tokens in a second, so MAX_TOKENS take less than half of SECONDS.
# Finding the tokens of a body takes at most 3 s, even if its words are chosen for that.
MAX_BODY = 128_000  # bytes
MAX_BODIES = 512  # requests that wait until their tokens are found
MAX_INPUTS = 1024  # texts in a request
MAX_CHARACTERS = 4000  # of a text; 512 tokens of English have about 2,200
MAX_TOKENS = 8_000  # in a request
MAX_QUEUE = 2 * MAX_INPUTS  # texts
MAX_BATCH = 64  # texts
MAX_BATCH_TOKENS = 1024  # larger batches are no faster on a CPU
SECONDS = 20.0  # for a request
LONGEST_WAIT = 10.0  # seconds; if anything waits for longer, the server is overloaded
LONGEST_BATCH = 60.0  # seconds; a batch that runs for longer hangs
GRACE = 25  # seconds to answer the accepted requests after SIGTERM

logger = logging.getLogger("embeddings_server")

# -------------------------------------------------------------------------------- requests


def listed(given: object) -> object:
    """Put a single text, or the token ids of a single text, into a list."""
    is_single = isinstance(given, list) and given and isinstance(given[0], int)
    return [given] if is_single or isinstance(given, str) else given


Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
TokenIds = Annotated[
    list[Annotated[int, Strict(), Field(ge=0)]], Field(min_length=1, fail_fast=True)
]
Texts = Annotated[list[Text | TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]


class EmbeddingRequest(BaseModel):
    """The body of a request. Other fields, such as ``user``, have no effect."""

    model: str
    input: Annotated[Texts, BeforeValidator(listed)]
    encoding_format: Literal["float", "base64", None] = None
    dimensions: None = None  # the vectors of this model cannot be shortened


def check_name(name: str, model: Embedder) -> None:
    if name != model.name:
        raise HTTPException(404, f"the model does not exist; this server has {model.name!r}")


def parse(body: bytes, model: Embedder) -> tuple[EmbeddingRequest, list[Tokens]]:
    """Return the request and the tokens of its texts. Reject what would fail a whole batch.

    This takes a tenth of a millisecond for each sentence, so it runs in a thread. It stops at the
    first text that exceeds a limit.
    """
    try:
        request = EmbeddingRequest.model_validate_json(body)
    except ValidationError as error:
        wrong = [(*each["loc"][:2], each["msg"]) for each in error.errors()]
        raise HTTPException(400, "; ".join(": ".join(map(str, each)) for each in wrong)) from None
    check_name(request.model, model)
    texts: list[Tokens] = []
    count = 0
    for given in request.input:
        text = model.tokenize(given) if isinstance(given, str) else given
        count += len(text)
        if len(text) > model.max_tokens or count > MAX_TOKENS:
            limits = f"{model.max_tokens} tokens in a text, {MAX_TOKENS} in a request"
            raise HTTPException(400, f"input: too long; the limits are {limits}")
        if max(text) >= model.vocabulary_size:
            raise HTTPException(400, f"input: the model has {model.vocabulary_size} token ids")
        texts.append(text)
    return request, texts


async def body_of(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the body has more than {MAX_BODY} bytes")
    return bytes(body)


@asynccontextmanager
async def connected(request: Request) -> AsyncIterator[None]:
    """Cancel the block, and raise ClientDisconnect, if the client leaves."""

    async def listen() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    with anyio.CancelScope() as scope:
        listener = asyncio.create_task(listen())
        try:
            yield
        finally:
            listener.cancel()
    if scope.cancelled_caught:
        raise ClientDisconnect


async def show_error(_request: Request, error: Exception) -> Response:
    """Answer as OpenAI's API does. uvicorn logs what is not an HTTPException."""
    if not isinstance(error, HTTPException):
        error = HTTPException(500, "the server failed")
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    content = {"message": error.detail, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": content}, error.status_code, error.headers)


# --------------------------------------------------------------------------------- metrics

TIMES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
SIZE = Histogram("batcher_batch_size", "Texts in a batch", buckets=(1, 2, 4, 8, 16, 32, 64))
RUN = Histogram("batcher_run_seconds", "Time that a batch ran", buckets=TIMES)
WAIT = Histogram("batcher_wait_seconds", "Time that a text waited", buckets=TIMES)


def observe(report: BatchReport[Tokens]) -> None:
    SIZE.observe(len(report.items))
    RUN.observe(report.run_time)
    for seconds in report.wait_times:
        WAIT.observe(seconds)


# ------------------------------------------------------------------------------ the server


class ModelError(Exception):
    """The model failed. The log has its error, which may be of any type."""


class Service(Collector):
    """The application, and a collector of Prometheus for the statistics of its batcher."""

    def __init__(self, model: Embedder) -> None:
        self.model = model
        self.parser: Batcher[bytes, tuple[EmbeddingRequest, list[Tokens]]] = Batcher(
            lambda bodies: [parse(bodies[0], model)], max_batch_size=1, max_queue_size=MAX_BODIES
        )
        self.batcher: Batcher[Tokens, torch.Tensor] = Batcher(
            self.run,
            cost=lambda texts: sum(map(len, texts)),
            max_batch_cost=MAX_BATCH_TOKENS,
            max_batch_size=MAX_BATCH,
            max_queue_size=MAX_QUEUE,
            on_batch=observe,
        )
        routes = [
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/metrics", self.metrics),
            Route("/live", self.live),
            Route("/ready", self.ready),
        ]
        self.app = Starlette(
            routes=routes,
            exception_handlers={HTTPException: show_error, Exception: show_error},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        async with self.parser, self.batcher:
            REGISTRY.register(self)
            yield
            REGISTRY.unregister(self)
            await self.batcher.aclose(timeout=1)  # no request is left

    def run(self, texts: list[Tokens]) -> list[torch.Tensor]:
        """Run the model on texts of similar length together, as it pads them to the longest."""
        vectors: dict[int, torch.Tensor] = {}
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        try:
            while order:
                longest = 1.5 * len(texts[order[0]])
                group = [n for n in order if len(texts[n]) <= longest]
                vectors |= zip(group, self.model.embed([texts[n] for n in group]), strict=True)
                order = order[len(group) :]
        except BaseException:
            logger.exception("the model failed")
            raise ModelError from None
        return [vectors[n] for n in range(len(texts))]

    async def embeddings(self, request: Request) -> Response:
        """Return a vector for each text."""
        try:
            with anyio.fail_after(SECONDS):
                body = await body_of(request)
                async with connected(request):
                    asked, texts = await self.parser(body)
                    vectors = (await self.embed(texts)).numpy().astype("<f4")
        except QueueFullError:
            # Not 429: the server does too much, and not this client. A proxy may ask another one.
            raise HTTPException(503, "the server is overloaded", {"Retry-After": "1"}) from None
        except (BatcherClosedError, asyncio.CancelledError):  # after GRACE
            raise HTTPException(503, "the server shuts down") from None
        except TimeoutError:
            # OpenAI's client would try again, and so add to the load.
            raise HTTPException(504, "it took too long", {"x-should-retry": "false"}) from None
        except ModelError:
            raise HTTPException(500, "the model failed") from None
        except ClientDisconnect:
            return Response(status_code=499)  # the client does not read it
        shown: list[Any] = vectors.tolist()
        if asked.encoding_format == "base64":
            shown = [base64.b64encode(vector).decode() for vector in vectors]
        data = [{"object": "embedding", "index": n, "embedding": v} for n, v in enumerate(shown)]
        count = sum(map(len, texts))
        usage = {"prompt_tokens": count, "total_tokens": count}
        content = {"object": "list", "data": data, "model": asked.model, "usage": usage}
        # The loop waits for this. json.dumps() would take ten times as long.
        return Response(to_json(content), media_type="application/json")

    async def embed(self, texts: list[Tokens]) -> torch.Tensor:
        """Return the vectors of all texts, or give up all of them."""
        futures: list[Future[torch.Tensor]] = []
        try:
            for text in texts:
                futures.append(self.batcher.submit(text))
            vectors = torch.stack(await gather(futures))
        finally:
            for future in futures:
                if not future.cancel():
                    future.exception()  # an error that nothing retrieves would be logged
        if not vectors.isfinite().all():
            logger.error("the model returned numbers that are not finite")
            raise ModelError
        return vectors

    async def models(self, request: Request) -> Response:
        """List the only model, or show it."""
        model = {"object": "model", "id": self.model.name, "created": 0, "owned_by": ""}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        check_name(request.path_params["name"], self.model)
        return JSONResponse(model)

    async def live(self, _request: Request) -> Response:
        """Answer 503 if a restart would help."""
        hangs = self.batcher.statistics().running_for > LONGEST_BATCH
        return Response("a batch hangs" if hangs else "ok", 503 if hangs else 200)

    async def ready(self, _request: Request) -> Response:
        """Answer 503 if other servers should get the requests."""
        oldest = max(each.statistics().oldest for each in (self.parser, self.batcher))
        is_late = oldest > LONGEST_WAIT
        return Response("overloaded" if is_late else "ok", 503 if is_late else 200)

    def metrics(self, _request: Request) -> Response:
        """Answer a scrape of Prometheus; Starlette calls it in a thread."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    def collect(self) -> Iterator[Metric]:
        """Return the statistics of now."""
        requests = self.parser.statistics()
        yield GaugeMetricFamily("parser_queued_requests", "Requests that wait", requests.queued)
        yield CounterMetricFamily("parser_rejected_requests", "As too many wait", requests.rejected)
        now = self.batcher.statistics()
        yield GaugeMetricFamily("batcher_queued_items", "Texts that wait", now.queued)
        yield GaugeMetricFamily("batcher_oldest_seconds", "Wait of the oldest text", now.oldest)
        yield GaugeMetricFamily("batcher_running_for_seconds", "Of the batch", now.running_for)
        yield CounterMetricFamily("batcher_rejected_items", "As the queue was full", now.rejected)
        yield CounterMetricFamily("batcher_given_up_items", "Before they ran", now.given_up)
        yield CounterMetricFamily("batcher_failed_items", "Texts that failed", now.failed)


def serve(model: Embedder, port: str = "8000", host: str = "127.0.0.1") -> None:
    """Serve until SIGTERM or Ctrl-C, and answer the requests accepted by then."""
    torch.set_num_threads(1)  # the event loop needs a core as well
    # A full collection would search all modules and the model, and stop all threads for a fifth of
    # a second. It skips frozen objects, so a cycle of them is never freed: collect garbage first.
    gc.collect()
    gc.freeze()
    uvicorn.run(
        Service(model).app,
        host=host,
        port=int(port),
        loop="uvloop",
        http="h11",  # httptools drops the body of a request that asks for an upgrade
        ws="none",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
    )


def main() -> None:
    from embedder import Embedder  # imports transformers, which takes seconds

    model = Embedder()
    model.embed([model.tokenize("the first call takes longer")])
    serve(model, *sys.argv[1:3])


if __name__ == "__main__":
    main()
