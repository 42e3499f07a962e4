"""The example HTTP server in a separate process, with slow, silent and vanishing clients."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import ClassVar

import pytest

from .cluster import PROCESSES
from .threads import PATIENCE, PATIENCE_WITH_PROCESSES, until

datasets = pytest.importorskip("sklearn.datasets", reason="the classifier learns from its digits")
for module in ("starlette", "uvicorn"):
    pytest.importorskip(module, reason="the HTTP server needs it: see the extra server")
http_service = importlib.import_module("tests.http_service")  # requires the modules above

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


class RunningServer:
    """A running server: its address, and ways to stop it."""

    def __init__(self, process, output, gate=None):
        self.process = process
        self.output = output
        self.gate = gate

    @property
    def port(self):
        written = self.output.read_text() if self.output.exists() else ""
        found = re.search(r"serving on http://127.0.0.1:(\d+)\n", written)
        return int(found[1]) if found else None

    def exit_code(self, timeout=PATIENCE_WITH_PROCESSES):
        """Wait until the server has exited; return None after ``timeout``."""
        with suppress(subprocess.TimeoutExpired):
            if isinstance(self.process, subprocess.Popen):
                return self.process.wait(timeout)
            self.process.join(timeout)
            return self.process.exitcode

    def open_gate(self):
        self.gate.touch()

    def terminate(self, number=signal.SIGTERM):
        os.kill(self.process.pid, number)

    def sockets(self):
        found = 0
        for descriptor in pathlib.Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found += os.readlink(descriptor).startswith("socket:")
        return found


@contextmanager
def ended_at_exit(server, log):
    give_up = time.monotonic() + PATIENCE_WITH_PROCESSES
    try:
        while not server.port:
            assert server.exit_code(0.01) is None, log.read_text()
            assert time.monotonic() < give_up
        yield server
    finally:
        server.process.kill()
        server.exit_code(PATIENCE)


@pytest.fixture(autouse=True)
def clients_are_quick(nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()  # loops of this process run only clients


@pytest.fixture
def serve(tmp_path):
    """Start a server with some of its constants changed, and with an open gate by default."""

    @contextmanager
    def serve(*, is_open=True, **constants):
        gate, output, log = (tmp_path / name for name in ("gate", "output", "log"))
        if is_open:
            gate.touch()
        arguments = (*map(str, (gate, output, log)), constants)
        process = PROCESSES.Process(target=http_service.serve, args=arguments)
        process.start()
        with ended_at_exit(RunningServer(process, output, gate), log) as server:
            yield server

    return serve


# ----------------------------------------------------------------------- a client


def request(number=0, what=0, *, pixels=None, close=False):
    body = json.dumps(pixels or [number, what] + [0] * 62).encode()
    head = f"POST /digit HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return (head + ("Connection: close\r\n" if close else "") + "\r\n").encode() + body


def text_request(prompt, length):
    return f"GET /text?prompt={prompt}.&length={length} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


class Connection:
    """An HTTP/1.1 connection, which detects incomplete responses."""

    opened: ClassVar[list] = []

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.opened.append(self)

    @classmethod
    async def open(cls, server, **options):
        return cls(*await asyncio.open_connection("127.0.0.1", server.port, **options))

    async def ask(self, data):
        """Return the status, the headers and the body; None if the response is empty."""
        self.writer.write(data)
        return await self.response()

    async def response(self):
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        except ConnectionResetError:
            return None
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        status = int(first.split()[1])
        if headers.get("transfer-encoding") == "chunked":
            return status, headers, await self.chunks()
        return status, headers, await self.reader.readexactly(int(headers["content-length"]))

    async def chunks(self):
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        await self.reader.readexactly(2)
        return body

    async def close(self):
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


def tokens(body):
    """Return the tokens in an event stream, and its last event."""
    *events, last = body.decode().strip().split("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in events], last


async def ask(server, data):
    connection = await Connection.open(server)
    try:
        return await connection.ask(data)
    finally:
        await connection.close()


async def statistics(server):
    _, _, body = await ask(server, b"GET /statistics HTTP/1.1\r\nHost: x\r\n\r\n")
    return json.loads(body)


async def eventually(server, condition):
    give_up = time.monotonic() + PATIENCE
    while not condition(found := await statistics(server)):
        assert time.monotonic() < give_up, found
        await asyncio.sleep(0.01)
    return found


def run(main):
    async def run_and_close():
        try:
            await asyncio.wait_for(main, PATIENCE_WITH_PROCESSES)
        finally:
            for connection in Connection.opened:
                connection.writer.transport.abort()
            Connection.opened.clear()

    asyncio.run(run_and_close())


# ---------------------------------------------------------------------------- the example


def test_server_classifies_digits_and_streams_texts(tmp_path):
    digits = datasets.load_digits()

    async def main(server):
        connection = await Connection.open(server)
        right = 0
        for image, digit in zip(digits.images[:50], digits.target[:50]):
            status, _, body = await connection.ask(request(pixels=image.flatten().tolist()))
            assert status == 200
            right += json.loads(body)["digit"] == digit
        assert right >= 45
        status, headers, body = await connection.ask(text_request("The", 30))
        assert headers["content-type"].startswith("text/event-stream")
        written, last = tokens(body)
        assert (status, len(written), last) == (200, 30, "event: end\ndata:")
        nonsense = [[number] + [0] * 63 for number in (10**400, math.nan, math.inf, -1, 17)]
        for pixels in ([1, 2, 3], ["1"] * 64, {"1": 2}, *nonsense):
            assert (await ask(server, request(pixels=pixels)))[0] == 400
        assert (await ask(server, request(pixels=[0] * 5000)))[0] == 413
        assert (await ask(server, text_request("The", "many")))[0] == 400
        assert (await statistics(server))["items"] == 50

    command = [sys.executable, "-W", "error", EXAMPLES / "http_server.py", "0"]
    output, log = tmp_path / "output", tmp_path / "log"
    with output.open("w") as written, log.open("w") as errors:
        process = subprocess.Popen(command, stdout=written, stderr=errors)
    with ended_at_exit(RunningServer(process, output), log) as server:
        run(main(server))
        server.terminate()
        assert server.exit_code() == 0
    assert log.read_text() == ""


# ------------------------------------------------------------------------------- overload


def test_server_answers_503_at_once_when_its_queue_is_full(serve):
    clients, queue = 600, 256

    async def main(server):
        asked = [asyncio.ensure_future(ask(server, request(n % 10))) for n in range(clients)]
        full = await eventually(
            server, lambda s: s["queued"] + s["running"] + s["rejected"] == clients
        )
        assert full["queued"] == queue
        server.open_gate()
        responses = await asyncio.gather(*asked)
        statuses = [status for status, _, _ in responses]
        assert set(statuses) == {200, 503}
        assert statuses.count(503) == full["rejected"]
        for n, (status, headers, body) in enumerate(responses):
            if status == 503:
                assert headers["retry-after"] == "1"
            else:
                assert json.loads(body) == {"digit": n % 10}
        status, _, _ = await ask(server, request(7))
        assert status == 200

    with serve(is_open=False, SECONDS=PATIENCE_WITH_PROCESSES) as server:
        run(main(server))


def test_request_that_takes_too_long_gets_504_and_is_skipped(serve):
    async def main(server):
        asked = [asyncio.ensure_future(ask(server, request(0)))]
        await eventually(server, lambda s: s["running"] == 1)
        asked += [asyncio.ensure_future(ask(server, request(n))) for n in range(10)]
        assert {status for status, _, _ in await asyncio.gather(*asked)} == {504}
        server.open_gate()
        await eventually(server, lambda s: (s["items"], s["given_up"]) == (1, 10))

    with serve(is_open=False, SECONDS=0.5) as server:
        run(main(server))


def test_texts_beyond_the_limit_get_503(serve):
    async def main(server):
        connections = [await Connection.open(server) for _ in range(6)]
        for connection in connections[:5]:  # none of them reads
            connection.writer.write(text_request("a50000", 1000))
            await connection.reader.readuntil(b"data: ")
        assert (await connections[5].ask(text_request("b1", 5)))[0] == 503
        await connections[0].close()
        give_up = time.monotonic() + PATIENCE
        while (await connections[5].ask(text_request("b1", 5)))[0] == 503:
            assert time.monotonic() < give_up
        for connection in connections[1:]:
            await connection.close()

    with serve(MAX_TEXTS=5) as server:
        run(main(server))


# ------------------------------------------------------------------ clients that disconnect


def test_server_survives_300_disconnecting_clients_without_leaks(serve):
    async def main(server):
        await statistics(server)
        before = server.sockets()
        stay = [asyncio.ensure_future(ask(server, request(n))) for n in range(10)]
        await eventually(server, lambda s: s["queued"] + s["running"] == 10)
        connections = [await Connection.open(server) for _ in range(300)]
        for n, connection in enumerate(connections):
            connection.writer.write(request(1) if n % 3 else text_request("a10000", 1000))
        await eventually(server, lambda s: s["queued"] + s["running"] == 210 and s["texts"] == 100)
        for connection in connections:
            await connection.close()
        await eventually(server, lambda s: s["texts"] == 0)
        until(lambda: server.sockets() <= before + 10)
        await statistics(server)  # so the handler of the last lost client has run
        server.open_gate()
        for n, (status, _, body) in enumerate(await asyncio.gather(*stay)):
            assert (status, json.loads(body)) == (200, {"digit": n})
        found = await eventually(server, lambda s: not s["queued"] + s["running"])
        assert found["given_up"] == 200
        assert found["rejected"] == 0
        assert (await ask(server, request(5)))[0] == 200

    with serve(is_open=False, SECONDS=PATIENCE_WITH_PROCESSES, TEXT_SECONDS=3600) as server:
        run(main(server))


# ----------------------------------------------------------------------------- slow clients


def test_slow_reader_gets_its_whole_text_and_delays_no_other(serve):
    async def main(server):
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.setblocking(False)
        await asyncio.get_running_loop().sock_connect(narrow, ("127.0.0.1", server.port))
        slow = Connection(*await asyncio.open_connection(sock=narrow))
        slow.writer.write(text_request("a50000", 120))
        await slow.reader.readuntil(b"\r\n\r\n")
        for _ in range(3):
            status, _, body = await ask(server, text_request("b1", 1000))
            assert (status, tokens(body)) == (200, (["b."] * 1000, "event: end\ndata:"))
        assert (await statistics(server))["texts"] == 1  # far from its end
        written, last = tokens(await slow.chunks())
        assert written == ["a" * 50000 + "."] * 120
        assert last == "event: end\ndata:"
        await slow.close()

    with serve(TEXT_SECONDS=PATIENCE_WITH_PROCESSES) as server:
        run(main(server))


def test_stalled_client_is_disconnected_in_time(serve):
    async def main(server):
        silent, half = await Connection.open(server), await Connection.open(server)
        silent.writer.write(text_request("a50000", 1000))
        await silent.reader.readuntil(b"\r\n\r\n")
        half.writer.write(request(5)[:-3])
        status, _, _ = await half.response()
        assert status == 408
        await eventually(server, lambda s: s["texts"] == 0)
        await silent.close()
        await half.close()

    with serve(BODY_SECONDS=0.5, TEXT_SECONDS=3) as server:
        run(main(server))


def test_client_without_a_complete_request_is_disconnected(serve):
    async def main(server):
        idle, slow, answered = [await Connection.open(server) for _ in range(3)]
        assert (await answered.ask(request(3)))[0] == 200
        slow.writer.write(b"GET /stat")
        answered.writer.write(b"GET /stat")
        while not all(each.reader.at_eof() for each in (idle, slow, answered)):
            for each in (slow, answered):
                each.writer.write(b"a")
            await asyncio.sleep(0.05)
        assert (await ask(server, request(3)))[0] == 200

    with serve(HEAD_SECONDS=1.5) as server:
        run(main(server))


# ----------------------------------------------------------------- functions that fail


def test_function_error_fails_only_its_batch_of_requests(serve):
    async def main(server):
        for number, raised in ((1, "OSError"), (3, "SystemExit"), (4, "KeyboardInterrupt")):
            expected = "OSError" if number == 1 else "RuntimeError"
            status, _, body = await ask(server, request(1, number))
            assert (status, json.loads(body)) == (500, {"error": expected})
            status, _, body = await ask(server, request(4))
            assert (status, json.loads(body)) == (200, {"digit": 4})
            status, _, body = await ask(server, text_request(raised, 5))
            assert (status, body) == (200, f'event: error\ndata: "{expected}"\n\n'.encode())
            status, _, body = await ask(server, text_request("b1", 5))
            assert tokens(body) == (["b."] * 5, "event: end\ndata:")

    with serve() as server:
        run(main(server))
        server.terminate()
        assert server.exit_code() == 0


def test_server_answers_and_terminates_while_the_function_hangs(serve):
    async def main(server):
        hangs = asyncio.ensure_future(ask(server, request(1, 2)))
        await eventually(server, lambda s: s["running"] == 1)
        asked = [asyncio.ensure_future(ask(server, request(1))) for _ in range(100)]
        statuses = [status for status, _, _ in await asyncio.gather(*asked)]
        assert set(statuses) == {504, 503}
        assert (await hangs)[0] == 504
        status, _, body = await ask(server, text_request("b1", 5))
        assert (status, tokens(body)[0]) == (200, ["b."] * 5)
        status, _, body = await ask(server, text_request("hang", 5))
        assert (status, body) == (200, b'event: error\ndata: "TimeoutError"\n\n')
        assert (await statistics(server))["running"] == 1

    constants = {"SECONDS": 1, "TEXT_SECONDS": 3, "NOTICE": 0.1, "GRACE": 1}
    constants |= {"MAX_QUEUE": 30, "MAX_BATCH": 20}
    with serve(**constants) as server:
        run(main(server))
        server.terminate()
        assert server.exit_code() == 1


# ------------------------------------------------------------------------------ shutdown


def test_server_terminates_despite_clients_that_do_not_read(serve):
    async def main(server):
        for _ in range(5):
            silent = await Connection.open(server)
            silent.writer.write(text_request("a50000", 1000))
            await silent.reader.readuntil(b"data: ")
        server.terminate()
        assert await asyncio.to_thread(server.exit_code, PATIENCE) == 0

    with serve(NOTICE=0.1, GRACE=1) as server:
        run(main(server))


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_shutdown_under_load_drops_no_response(serve, signal_number, tmp_path):
    answered, refused, dropped, texts = [], [], [], []
    enough = asyncio.Event()

    def note_answer(n):
        answered.append(n)
        if len(answered) == 1000:
            enough.set()

    async def keeps_its_connection(server, n):
        connection = await Connection.open(server)
        while True:
            response = await connection.ask(request(n))
            if response is None:
                dropped.append("on a connection that was to stay open")
                break
            status, headers, body = response
            assert (status, json.loads(body)) == (200, {"digit": n})
            note_answer(n)
            if headers.get("connection") == "close":
                refused.append(n)
                break
            await asyncio.sleep(0.1 * random.random())  # an idle connection
        await connection.close()

    async def connects_anew(server, n):
        while True:
            try:
                connection = await Connection.open(server)
            except ConnectionError:
                refused.append(n)
                return
            response = await connection.ask(request(n, close=True))
            await connection.close()
            if response is None:
                dropped.append("on a new connection")
            else:
                note_answer(n)

    async def reads_a_text(server):
        connection = await Connection.open(server)
        status, _, body = await connection.ask(text_request("b100", 500))
        texts.append(status)
        assert tokens(body) == (["b" * 100 + "."] * 500, "event: end\ndata:")
        await connection.close()

    async def main(server):
        clients = [keeps_its_connection(server, n % 10) for n in range(64)]
        clients += [connects_anew(server, n % 10) for n in range(16)]
        clients += [reads_a_text(server) for _ in range(20)]
        load = asyncio.ensure_future(asyncio.gather(*clients))
        await enough.wait()
        server.terminate(signal_number)
        await load

    timeout = PATIENCE_WITH_PROCESSES
    with serve(SECONDS=timeout, TEXT_SECONDS=timeout, GRACE=timeout, NOTICE=2) as server:
        run(main(server))
        assert server.exit_code() == 0
    assert dropped == []
    assert len(refused) == 64 + 16
    assert texts == [200] * 20
    assert (tmp_path / "log").read_text() == ""
