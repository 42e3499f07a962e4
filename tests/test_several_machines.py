"""Batches run on other machines, and fail in time if these die or cannot be reached."""

from __future__ import annotations

import importlib.util

import pytest

from .hosts import hosts, skip_without_hosts
from .threads import PATIENCE_WITH_PROCESSES


def test_batches_fail_in_time_if_their_machine_fails():
    if importlib.util.find_spec("grpc") is None:
        pytest.skip("install the extra `integrations` to test grpc")
    skip_without_hosts()
    with hosts(3) as [front, *workers]:
        program = f"from tests.several_machines import *; front_end(*{workers})"
        assert front.start("-c", program).wait(PATIENCE_WITH_PROCESSES) == 0
