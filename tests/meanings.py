"""Values that count as a sequence, one item for each future, and values that do not."""

from __future__ import annotations

import array
import collections
import os

import numpy as np
import pytest
import torch

Point = collections.namedtuple("Point", ["x", "y"])

LISTS = [
    pytest.param([1, 2], id="list"),
    pytest.param((1, 2), id="tuple"),
    pytest.param(range(1, 3), id="range"),
    pytest.param(collections.deque([1, 2]), id="deque"),
    pytest.param(array.array("i", [1, 2]), id="array"),
    pytest.param(torch.tensor([1, 2]), id="tensor"),
    pytest.param(torch.tensor([[1], [2]]), id="rows"),
    pytest.param(np.array([1, 2]), id="numpy"),
]

# Each with the name of its type, as in an error. All sequences have two items.
NOT_LISTS = [
    pytest.param(values, name, id=name)
    for values, name in [
        ({"a": 1, "b": 2}, "dict"),
        (collections.OrderedDict(a=1, b=2), "collections.OrderedDict"),
        ({"a": 1, "b": 2}.values(), "dict_values"),
        ({1, 2}, "set"),
        (frozenset([1, 2]), "frozenset"),
        ("ab", "str"),
        (b"ab", "bytes"),
        (bytearray(b"ab"), "bytearray"),
        (memoryview(b"ab"), "memoryview"),
        (collections.UserString("ab"), "collections.UserString"),
        ((n for n in (1, 2)), "generator"),
        (iter([1, 2]), "list_iterator"),
        (map(str, (1, 2)), "map"),
        (torch.tensor(1.0), "torch.Tensor of no dimensions"),
        (np.array(1.0), "numpy.ndarray of no dimensions"),
        (np.float64(1.0), "numpy.float64"),
        (None, "NoneType"),
        (5, "int"),
        (Point(1, 2), "tests.meanings.Point"),
        (torch.max(torch.ones(2, 2), 0), "torch.return_types.max"),
        (os.times(), "posix.times_result"),
    ]
]
