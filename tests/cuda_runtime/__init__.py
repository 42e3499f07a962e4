"""Python access to the stand-in for CUDA: whether PyTorch runs on it, and which calls it got.

See ``README.md``. The stand-in exists only in the environment of ``scripts/test-on-cuda-runtime``.
"""

from __future__ import annotations

import ctypes

import torch


def _library() -> ctypes.CDLL | None:
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL("libcudart.so.13")  # already loaded by torch
        library.cuda_standin_calls.restype = ctypes.c_uint64
        library.cuda_standin_unknown_kernel.restype = ctypes.c_char_p
    except (OSError, AttributeError):  # the library is missing, or is NVIDIA's
        return None
    return library


_standin = _library()

IS_INSTALLED = _standin is not None


def calls(function: str) -> int:
    """Return how often a function of CUDA's runtime has been called, by all threads."""
    assert _standin
    number: int = _standin.cuda_standin_calls(function.encode())
    return number


def unknown_kernels(after: int = 0) -> list[str]:
    """Return the unknown kernels that were launched, without the first ``after``."""
    assert _standin
    names: list[str] = []
    while name := _standin.cuda_standin_unknown_kernel(ctypes.c_size_t(after + len(names))):
        names.append(name.decode())
    return names


def enqueue_failure(error: int, stream: torch.Stream) -> None:
    """Enqueue a kernel that fails with an error of ``cudaError_t``."""
    assert _standin
    handle = ctypes.c_void_p(stream.cuda_stream)
    assert _standin.cuda_standin_enqueue_failure(handle, error) == 0
