"""The poll policy that a program sets."""

from __future__ import annotations

import pytest

import torchfut_aio
from torchfut_aio import PollPolicy, get_poll_policy, set_poll_policy


def test_poll_policies_have_defaults_and_compare_equal():
    assert PollPolicy() == PollPolicy(min_interval=50e-6, max_interval=0.01, blocking=False)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"min_interval": 0}, ValueError),
        ({"min_interval": -1.0}, ValueError),
        ({"min_interval": 0.1, "max_interval": 0.01}, ValueError),
        ({"max_interval": float("inf")}, ValueError),
        ({"min_interval": float("nan")}, ValueError),
        ({"min_interval": "1"}, TypeError),
        ({"max_interval": None}, TypeError),
    ],
)
def test_invalid_poll_policy_is_refused(arguments, error):
    with pytest.raises(error, match=r"min_interval|max_interval"):
        PollPolicy(**arguments)


def test_set_poll_policy_returns_the_previous_policy():
    mine = PollPolicy(max_interval=0.002)
    before = set_poll_policy(mine)
    assert get_poll_policy() is mine
    assert set_poll_policy(before) is mine
    with pytest.raises(TypeError, match="PollPolicy"):
        torchfut_aio.set_poll_policy(0.001)
    assert set_poll_policy(before) is before
