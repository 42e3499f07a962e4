"""The example HTTP server, alone and behind nginx, with slow, silent and vanishing clients."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import os
import pathlib
import re
import shutil
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


class Proxy:
    """nginx in front of a server."""

    def __init__(self, process, port):
        self.process, self.port = process, port


@pytest.fixture
def proxied(serve, tmp_path):
    """Start a server behind nginx, with some numbers of its configuration changed."""
    nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
    if not nginx:
        assert "CI" not in os.environ, "nginx is missing"
        pytest.skip("nginx is missing: apt-get install nginx-light")

    @contextmanager
    def proxied(limits=(), **constants):
        with serve(**constants) as server, socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
            folders = "".join(
                f"{name}_temp_path {tmp_path}/{name};\n"
                for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            text = (EXAMPLES / "nginx.conf").read_text()
            changes = {"127.0.0.1:8000": f"127.0.0.1:{server.port}", "http {": "http {" + folders}
            changes |= {"listen 80;": f"listen 127.0.0.1:{port};", **dict(limits)}
            for before, after in changes.items():
                assert before in text
                text = text.replace(before, after)
            configuration = tmp_path / "nginx.conf"
            configuration.write_text(text)
            options = f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/nginx.log;"
            free.close()
            process = subprocess.Popen([nginx, "-c", configuration, "-g", options])
            proxy = Proxy(process, port)
            try:
                until(lambda: process.poll() is not None or connects(port))
                assert process.poll() is None, (tmp_path / "nginx.log").read_text()
                yield proxy, server
            finally:
                process.terminate()
                process.wait(PATIENCE)

    return proxied


def connects(port):
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True


# ----------------------------------------------------------------------- a client


def request(number=0, what=0, *, pixels=None):
    body = json.dumps(pixels or [number, what] + [0] * 62).encode()
    return b"POST /digit HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


STATISTICS = b"GET /statistics HTTP/1.1\r\nHost: x\r\n\r\n"


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
        while size := int(await self.reader.readuntil(b"\n"), 16):
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
    _, _, body = await ask(server, STATISTICS)
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
    posted = re.search(r'curl -d (".*") http', (EXAMPLES / "http_server.py").read_text())[1]
    posted = subprocess.check_output(["bash", "-c", f"echo {posted}"])

    async def main(server):
        right = 0
        for image, digit in zip(digits.images[:50], digits.target[:50]):
            status, _, body = await ask(server, request(pixels=image.flatten().tolist()))
            assert status == 200
            right += json.loads(body)["digit"] == digit
        assert right >= 45
        status, headers, body = await ask(server, text_request("The", 30))
        assert headers["content-type"].startswith("text/event-stream")
        written, last = tokens(body)
        assert (status, len(written), last) == (200, 30, "event: end\ndata:")
        nonsense = [[number] + [0] * 63 for number in (10**400, math.nan, math.inf, -1, 17)]
        for pixels in ([1, 2, 3], ["1"] * 64, {"1": 2}, *nonsense):
            assert (await ask(server, request(pixels=pixels)))[0] == 400
        assert (await ask(server, request(pixels=[0] * 5000)))[0] == 413
        assert (await ask(server, request(pixels=json.loads(posted))))[0] == 200
        assert (await ask(server, text_request("The", "many")))[0] == 400
        assert (await statistics(server))["items"] == 51

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
        connections = [await Connection.open(server) for _ in range(5)]
        for connection in connections:  # none of them reads
            connection.writer.write(text_request("a50000", 1000))
            await connection.reader.readuntil(b"data: ")
        assert (await ask(server, text_request("b1", 5)))[0] == 503
        await connections[0].close()
        await eventually(server, lambda s: s["texts"] == 4)
        assert (await ask(server, text_request("b1", 5)))[0] == 200

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

    with serve(BODY_SECONDS=0.5, TEXT_SECONDS=1) as server:
        run(main(server))


# ----------------------------------------------------------------- functions that fail


def test_function_error_fails_only_its_batch_of_requests(serve):
    async def main(server):
        for number, raised in ((1, "OSError"), (3, "SystemExit"), (4, "KeyboardInterrupt")):
            assert (await ask(server, request(1, number)))[0] == 500
            status, _, body = await ask(server, request(4))
            assert (status, json.loads(body)) == (200, {"digit": 4})
            status, _, body = await ask(server, text_request(raised, 5))
            assert (status, body) == (200, f'event: error\ndata: "{raised}"\n\n'.encode())
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
        asked = [asyncio.ensure_future(ask(server, request(1))) for _ in range(300)]
        statuses = [status for status, _, _ in await asyncio.gather(*asked)]
        assert set(statuses) == {504, 503}
        assert (await hangs)[0] == 504
        status, _, body = await ask(server, text_request("b1", 5))
        assert (status, tokens(body)[0]) == (200, ["b."] * 5)
        with pytest.raises(asyncio.IncompleteReadError):  # it breaks off
            await ask(server, text_request("hang", 5))
        assert (await statistics(server))["running"] == 1

    with serve(SECONDS=1, TEXT_SECONDS=1, GRACE=1) as server:
        run(main(server))
        server.terminate()
        assert server.exit_code() == -signal.SIGALRM


# ------------------------------------------------------------------------------ shutdown


def test_server_terminates_despite_clients_that_do_not_read(serve):
    async def main(server):
        for _ in range(5):
            silent = await Connection.open(server)
            silent.writer.write(text_request("a50000", 1000))
            await silent.reader.readuntil(b"data: ")
        server.terminate()
        assert await asyncio.to_thread(server.exit_code, PATIENCE) == 0

    with serve(TEXT_SECONDS=1) as server:
        run(main(server))


SIGNALS = [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT, signal.SIGINT)]


@pytest.mark.parametrize("signals", SIGNALS)
def test_shutdown_answers_received_requests_and_texts(serve, signals, tmp_path):
    async def main(server):
        waiting = [asyncio.ensure_future(ask(server, request(n))) for n in range(10)]
        await eventually(server, lambda s: s["queued"] + s["running"] == 10)
        reader = await Connection.open(server)
        reader.writer.write(text_request("b1", 5000))
        await reader.reader.readuntil(b"data: ")
        for number in signals:
            server.terminate(number)
            await asyncio.to_thread(until, lambda: not connects(server.port))
        server.open_gate()
        for n, (status, _, body) in enumerate(await asyncio.gather(*waiting)):
            assert (status, json.loads(body)) == (200, {"digit": n})
        assert (await reader.reader.read()).endswith(b"event: end\ndata:\n\n\r\n0\r\n\r\n")

    patience = {"SECONDS": PATIENCE, "TEXT_SECONDS": PATIENCE, "GRACE": int(PATIENCE)}
    with serve(is_open=False, **patience) as server:
        run(main(server))
        assert server.exit_code() == 0
    assert (tmp_path / "log").read_text() == ""


# --------------------------------------------------------------------------- behind nginx


@pytest.mark.parametrize("signals", SIGNALS)
def test_every_request_behind_nginx_is_answered_at_shutdown(proxied, signals):
    answered, refused, texts = [], [], []
    enough = asyncio.Event()

    async def asks(proxy, n, *, is_new):
        connection = await Connection.open(proxy)
        while True:
            status, headers, body = await connection.ask(request(n))
            if status == 503:
                refused.append(n)
                return
            assert (status, json.loads(body)) == (200, {"digit": n})
            answered.append(n)
            if len(answered) == 300:
                enough.set()
            if is_new or headers["connection"] == "close":
                await connection.close()
                connection = await Connection.open(proxy)

    async def reads_a_text(proxy):
        status, _, body = await ask(proxy, text_request("b100", 500))
        assert tokens(body) == (["b" * 100 + "."] * 500, "event: end\ndata:")
        texts.append(status)

    async def main(proxy, server):
        load = [asyncio.ensure_future(asks(proxy, n, is_new=n % 2)) for n in range(10)]
        load += [asyncio.ensure_future(reads_a_text(proxy)) for _ in range(20)]
        await enough.wait()
        for number in signals:
            server.terminate(number)
        await asyncio.gather(*load)

    patience = {"SECONDS": PATIENCE, "TEXT_SECONDS": PATIENCE, "GRACE": int(PATIENCE)}
    with proxied(**patience) as (proxy, server):
        run(main(proxy, server))
        assert server.exit_code() == 0
    assert len(refused) == 10
    assert texts == [200] * 20


QUICK = {"_timeout 5s": "_timeout 1s", "send_timeout 10s": "send_timeout 1s"}
QUICK |= {"lingering_time 5s": "lingering_time 1s", "keepalive_timeout 20s": "keepalive_timeout 1s"}
FLOODS = {
    "lines": STATISTICS[:-2] + b"X: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 2000,
    "one line": STATISTICS[:-2] + b"X: " + b"a" * 50_000,
    "address": b"GET /text?prompt=" + b"a" * 50_000,
}


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("is_first", [True, False])
def test_nginx_refuses_a_head_without_end(proxied, flood, is_first):
    async def main(proxy):
        connection = await Connection.open(proxy)
        if not is_first:
            assert (await connection.ask(request(3)))[0] == 200
        connection.writer.write(FLOODS[flood])
        refused = await rest(connection)
        assert refused.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 414 "))
        assert (await ask(proxy, request(3)))[0] == 200

    with proxied(QUICK) as (proxy, _):
        run(main(proxy))


async def rest(connection):
    """Read until the connection is closed."""
    received = b""
    with suppress(ConnectionError):
        while data := await connection.reader.read(65536):
            received += data
    return received


def test_nginx_disconnects_idle_and_slow_clients(proxied):
    async def drip(connection, data):
        while not (connection.reader.at_eof() or connection.writer.is_closing()):
            connection.writer.write(data)
            await asyncio.sleep(0.05)

    async def main(proxy):
        idle, half, dripped, kept, next_half, next_dripped, body, slow_body = [
            await Connection.open(proxy) for _ in range(8)
        ]
        for each in (kept, next_half, next_dripped):
            assert (await each.ask(request(3)))[0] == 200
        for each in (half, dripped, next_half, next_dripped):
            each.writer.write(b"GET /stat")
        for each in (body, slow_body):
            each.writer.write(request(3).replace(b"Length: ", b"Length: 9", 1))
        drips = [drip(each, b"a") for each in (dripped, next_dripped)] + [drip(slow_body, b" ")]
        everyone = (idle, half, dripped, kept, next_half, next_dripped, body, slow_body)
        await asyncio.gather(*drips, *(rest(each) for each in everyone))
        assert (await ask(proxy, request(3)))[0] == 200

    with proxied(QUICK, BODY_SECONDS=2) as (proxy, _):
        run(main(proxy))


def test_idle_clients_shut_out_no_other_client(proxied):
    async def main(proxy):
        idle = [await Connection.open(proxy) for _ in range(900)]
        for _ in range(3):
            assert (await ask(proxy, request(3)))[0] == 200
        assert sum(each.reader.at_eof() for each in idle) < 900

    with proxied({"worker_connections 8192": "worker_connections 300"}) as (proxy, _):
        run(main(proxy))


async def narrow_connection(proxy, data):
    """Connect, send the data without an end, and read nothing."""
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(narrow, ("127.0.0.1", proxy.port))
    reader, writer = await asyncio.open_connection(sock=narrow, limit=1)
    connection = Connection(reader, writer)
    writer.write(data)
    return connection


def test_nginx_disconnects_clients_that_never_read(proxied):
    async def main(proxy, server):
        text = await narrow_connection(proxy, text_request("a50000", 1000))
        await eventually(server, lambda s: s["texts"] == 1)
        pipelined = await narrow_connection(proxy, STATISTICS)
        with suppress(ConnectionError):
            while True:
                pipelined.writer.write(STATISTICS * 100)
                await pipelined.writer.drain()
        await eventually(server, lambda s: s["texts"] == 0)
        assert (await ask(proxy, request(3)))[0] == 200
        await text.close()

    with proxied(QUICK, TEXT_SECONDS=PATIENCE_WITH_PROCESSES) as (proxy, server):
        run(main(proxy, server))


def test_nginx_limits_the_requests_of_one_address(proxied):
    async def main(proxy, server):
        connections = [await Connection.open(proxy) for _ in range(12)]
        for connection in connections:
            connection.writer.write(text_request("a50000", 1000))
        heads = [await each.reader.readline() for each in connections]
        assert sum(b" 429 " in head for head in heads) == 2
        assert sum(b" 200 " in head for head in heads) == 10
        other = await Connection.open(proxy, local_addr=("127.0.0.2", 0))
        assert (await other.ask(request(3)))[0] == 200

    with proxied({"limit_conn clients 100": "limit_conn clients 10"}) as (proxy, server):
        run(main(proxy, server))


def test_client_that_leaves_nginx_gives_up_its_requests(proxied):
    async def main(proxy, server):
        stays = asyncio.ensure_future(ask(proxy, request(5)))
        await eventually(server, lambda s: s["running"] == 1)
        connections = [await Connection.open(proxy) for _ in range(20)]
        for n, connection in enumerate(connections):
            connection.writer.write(request(3) if n % 2 else text_request("a10000", 1000))
        await eventually(server, lambda s: (s["queued"], s["texts"]) == (10, 10))
        for connection in connections:
            await connection.close()
        await eventually(server, lambda s: (s["given_up"], s["texts"]) == (10, 0))
        server.open_gate()
        assert (await stays)[0] == 200
        assert (await statistics(server))["items"] == 1

    patience = {"SECONDS": PATIENCE_WITH_PROCESSES, "TEXT_SECONDS": PATIENCE_WITH_PROCESSES}
    with proxied(is_open=False, **patience) as (proxy, server):
        run(main(proxy, server))
