"""Programs that use other libraries; ``test_integrations.py`` runs each in a new process.

These libraries leave global state behind, which would disturb other tests.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import pytest

from torchfut_aio import CancelledError, Future, NotAFutureError, as_completed, as_future, gather

from .cluster import LOOPS, run_on
from .threads import PATIENCE


def on_every_loop(main: Callable[..., Any], *args: Any) -> None:
    for loop in LOOPS:
        run_on(loop, in_time, main, *args)


async def in_time(main: Callable[..., Any], *args: Any) -> None:
    with anyio.fail_after(PATIENCE):
        await main(*args)


def ray() -> None:
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    _ray_references()
    _ray_workers()
    _ray_serve()
    ray.shutdown()


def _ray_references() -> None:
    import ray

    @ray.remote
    def add(first: int, second: int) -> int:
        return first + second

    @ray.remote
    def fail() -> None:
        raise KeyError("foo")

    @ray.remote
    class Gate:
        """An event for functions of another library."""

        def __init__(self) -> None:
            self.opened = asyncio.Event()

        async def wait(self) -> str:
            await self.opened.wait()
            return "opened"

        async def open(self) -> None:
            self.opened.set()

    @ray.remote(num_returns="streaming")
    def count() -> Any:
        yield 1

    async def main() -> None:
        local = Future[int]()
        local.set_result(7)
        assert await gather([add.remote(1, 2), local]) == [3, 7]
        assert {fut.value() async for fut in as_completed([add.remote(n, 0) for n in (1, 2)])}
        with pytest.raises(KeyError, match="foo"):
            await as_future(fail.remote())
        gate = Gate.remote()
        ref = gate.wait.remote()
        fut = as_future(ref)
        with anyio.move_on_after(0.1):
            await fut
        assert not fut.done()
        assert as_future(ref) is fut
        await as_future(gate.open.remote())
        assert await fut == "opened"
        with pytest.raises(NotAFutureError):
            as_future(count.remote())

    on_every_loop(main)


def _ray_workers() -> None:
    import os
    import signal

    import ray
    import ray_workers
    from worker_pool import WorkerError

    ray_workers.LIMIT = 2.0

    @ray.remote(num_cpus=1, max_restarts=-1)
    class Actor:
        """A worker whose vectors are the number of its process."""

        def embed(self, texts: list[str]) -> list[int]:
            return [os.getpid()] * len(texts)

    actors = [Actor.remote() for _ in range(2)]

    async def main() -> None:
        [bad], [good] = await gather([actor.embed.remote(["text"]) for actor in actors])
        async with ray_workers.batcher_of(actors) as batcher:
            answers: list[int | str] = []

            async def ask() -> int | str:
                try:
                    answers.append(await batcher("text"))
                except WorkerError as error:
                    answers.append(str(error))
                return answers[-1]

            assert {await ask() for _ in range(4)} == {bad, good}
            os.kill(bad, signal.SIGKILL)
            while not isinstance(await ask(), str):
                pass
            assert str(answers.pop()).startswith("actor 0: Actor")
            answers.clear()
            while await ask() == good:
                pass
            assert isinstance(answers[-1], int), answers  # of the actor that was restarted
            os.kill(good, signal.SIGSTOP)
            while not isinstance(await ask(), str):
                pass
            os.kill(good, signal.SIGCONT)
            assert answers[-1] == "actor 1: no answer within 2 s"
            while await ask() != good:
                pass

    anyio.run(in_time, main)


def _ray_serve() -> None:
    import ray_serve
    from ray import serve

    async def post(text: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", 8000)
        head = f"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: {len(text)}\r\n\r\n"
        writer.write((head + text).encode())
        return reader, writer

    async def main(handle: Any, open_gate: Callable[[], None], log: Callable[[], str]) -> None:
        async def until(condition: Callable[[Any], bool]) -> None:
            while not condition(await handle.statistics.remote()):
                pass

        posted = [await post("first")]
        await until(lambda found: found.running == 1)
        for text in ("leaves", "stays"):
            posted.append(await post(text))
        await until(lambda found: found.queued == 2)
        posted[1][1].close()
        await until(lambda found: found.given_up == 1)
        open_gate()
        assert (await posted[2][0].readuntil(b"]")).endswith(b"[5.0]")
        assert log() == "first\nstays\n"
        for _, writer in posted:
            writer.close()

    with tempfile.TemporaryDirectory() as folder:
        gate, log = Path(folder, "gate"), Path(folder, "log")

        def load() -> Callable[[list[str]], list[list[float]]]:
            def embed(texts: list[str]) -> list[list[float]]:
                with log.open("a") as file:
                    print(*texts, file=file)
                while not gate.exists():
                    time.sleep(0.01)
                return [[float(len(text))] for text in texts]

            return embed

        anyio.run(in_time, main, ray_serve.run(load, replicas=1), gate.touch, log.read_text)
    serve.shutdown()


_opened = threading.Event()


def wait_until_opened() -> bool:
    return _opened.wait(PATIENCE)


def dask() -> None:
    import distributed

    async def main(client: Any) -> None:
        _opened.clear()
        source = client.submit(wait_until_opened, pure=False)
        fut = as_future(source)
        assert as_future(source) is fut
        with anyio.move_on_after(0.1):
            await fut
        assert not fut.done()
        _opened.set()
        assert await gather([fut, client.submit(pow, 2, 10)]) == [True, 1024]
        with pytest.raises(ZeroDivisionError):
            await as_future(client.submit(divmod, 1, 0))
        # A source that is already done when it is adopted.
        assert await as_future(source) is True

    with distributed.Client(
        processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None
    ) as client:
        on_every_loop(main, client)
        cancelled = client.submit(pow, 2, 11, workers=["nowhere"], allow_other_workers=False)
        fut = as_future(cancelled)
        cancelled.cancel()
        with pytest.raises(CancelledError):
            fut.wait(PATIENCE)

    async def asynchronous() -> None:
        async with distributed.Client(
            processes=False, n_workers=1, dashboard_address=None, asynchronous=True
        ) as client:
            assert await as_future(client.submit(pow, 2, 12)) == 4096
            with pytest.raises(ZeroDivisionError):
                await as_future(client.submit(divmod, 1, 0))

    asyncio.run(asynchronous())


def grpc() -> None:
    import grpc

    release = threading.Event()

    def answer(request: bytes, context: Any) -> bytes:
        if request == b"late":
            release.wait(PATIENCE)
        if request == b"wrong":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "foo")
        return request

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc, name-defined]
        def service(self, _call: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    async def main(call: Any) -> None:
        release.clear()
        late = call.future(b"late")
        fut = as_future(late)
        assert as_future(late) is fut
        assert await as_future(call.future(b"now")) == b"now"
        with pytest.raises(grpc.RpcError) as caught:
            await as_future(call.future(b"wrong"))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not fut.done()
        release.set()
        assert await fut == b"late"
        release.clear()
        cancelled = call.future(b"late")
        fut = as_future(cancelled)
        cancelled.cancel()
        with pytest.raises(CancelledError):
            await fut
        release.set()

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        on_every_loop(main, channel.unary_unary("/service/method"))
    server.stop(None).wait(PATIENCE)


def trio_asyncio() -> None:
    import trio
    import trio_asyncio

    async def of_asyncio(source: asyncio.Future[int]) -> int:
        return await as_future(source)

    async def main() -> None:
        async with trio_asyncio.open_loop() as loop:
            with trio.fail_after(PATIENCE):
                source = loop.create_future()
                fut = as_future(source)
                loop.call_later(0.01, source.set_result, 5)
                assert await fut == 5
                assert await trio_asyncio.aio_as_trio(of_asyncio)(source) == 5
                source = loop.create_future()
                loop.call_later(0.01, source.set_result, 6)
                assert await trio_asyncio.aio_as_trio(of_asyncio)(source) == 6
            left = as_future(loop.create_future())
        with pytest.raises(CancelledError):
            left.wait(PATIENCE)

    trio.run(main)


def gevent() -> None:
    import gevent

    request, answer = Future[int](), Future[int]()

    async def serve() -> None:
        asyncio.get_running_loop().call_later(PATIENCE, sys.exit)
        answer.set_result(await request + 1)

    native = gevent.get_hub().threadpool.spawn(asyncio.run, serve())
    ticks = []

    def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            gevent.sleep(0.001)

    ticker = gevent.spawn(tick)
    while not repr(request).startswith("<Future pending waiters=1"):
        gevent.sleep(0.001)
    request.set_result(1)
    assert answer.wait(PATIENCE) == 2
    native.get(timeout=PATIENCE)
    own, before = Future[int](), len(ticks)
    gevent.spawn_later(0.1, own.set_result, 3)
    assert own.wait(PATIENCE) == 3
    assert len(ticks) - before > 1  # other greenlets have run
    # gevent's own pool returns an AsyncResult. There is no adapter for it; it has link().
    linked = Future[int]()
    gevent.get_hub().threadpool.spawn(pow, 2, 5).rawlink(lambda it: linked.set_result(it.get()))
    assert linked.wait(PATIENCE) == 32
    ticker.kill()
