"""The stand-in's kernels compute the same values as the host."""

from __future__ import annotations

import pytest
import torch

MATRIX = torch.arange(6.0).reshape(2, 3)
VECTOR = torch.tensor([3.0, 1.0, 2.0, 5.0, float("nan"), 4.0, 0.0])
INDEXES = torch.tensor([[0, 1, 1, 0], [2, 0, 0, 1]])


def sparse(device):
    values = torch.arange(4.0).to(device)
    return torch.sparse_coo_tensor(INDEXES.to(device), values, (2, 3), check_invariants=False)


FUNCTIONS = {
    "fill": lambda on: torch.full((3,), 2.5, device=on),
    "arange": lambda on: torch.arange(2, 11, 3, device=on),
    "transpose": lambda on: MATRIX.to(on).T.contiguous(),
    "strided": lambda on: MATRIX.to(on).T + MATRIX.to(on).T,
    "half": lambda on: MATRIX.to(on).half(),
    "bfloat16": lambda on: MATRIX.to(on).bfloat16().float(),
    "integers": lambda on: MATRIX.to(on).to(torch.int32),
    "divide": lambda on: MATRIX.to(on) / 2,
    "subtract": lambda on: 2 - MATRIX.to(on),
    "divide integers": lambda on: torch.arange(7, device=on).div(2, rounding_mode="trunc"),
    "remainder": lambda on: torch.arange(-3, 4, device=on) % 3,
    "exp": lambda on: MATRIX.to(on).exp(),
    "negate": lambda on: -MATRIX.to(on),
    "sqrt": lambda on: MATRIX.to(on).sqrt(),
    "tanh": lambda on: MATRIX.to(on).tanh(),
    "less": lambda on: MATRIX.to(on) < 3,
    "equal": lambda on: MATRIX.to(on) == 2,
    "sum": lambda on: MATRIX.to(on).sum(),
    "sum of columns": lambda on: MATRIX.to(on).sum(0),
    "max": lambda on: MATRIX.to(on).max(),
    "min": lambda on: MATRIX.to(on).min(),
    "all": lambda on: (MATRIX.to(on) >= 0).all(),
    "any": lambda on: (MATRIX.to(on) > 9).any(),
    "matmul": lambda on: MATRIX.to(on) @ MATRIX.to(on).T,
    "batched matmul": lambda on: torch.bmm(MATRIX.to(on)[None], MATRIX.to(on).T[None]),
    "cat": lambda on: torch.cat([VECTOR.to(on), VECTOR.to(on)]),
    "cat of columns": lambda on: torch.cat([MATRIX.to(on), MATRIX.to(on)[:, :2].clone()], 1),
    "stack": lambda on: torch.stack([MATRIX.to(on), MATRIX.to(on)], 1),
    "nonzero": lambda on: (VECTOR.to(on) > 1).nonzero(),
    "index": lambda on: MATRIX.to(on)[torch.tensor([1, 0], device=on)],
    "sort": lambda on: VECTOR.to(on).sort().values,
    "sort in descending order": lambda on: VECTOR.to(on).sort(descending=True).values,
    "argsort": lambda on: VECTOR.to(on).argsort(),
    "sort rows": lambda on: MATRIX.to(on).sort(1, descending=True).indices,
    "sort columns": lambda on: MATRIX.to(on).sort(0, descending=True).values,
    "coalesced indices": lambda on: sparse(on).coalesce().indices(),
    "coalesced values": lambda on: sparse(on).coalesce().values(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernel_and_host_compute_the_same(name):
    on_host, on_device = FUNCTIONS[name]("cpu"), FUNCTIONS[name]("cuda")
    assert on_device.is_cuda
    torch.testing.assert_close(on_device.cpu(), on_host, equal_nan=True)


def test_a_tensor_is_printed():
    assert str(MATRIX.cuda()) == str(MATRIX).replace("])", "], device='cuda:0')")
