"""The policy that the program sets."""

from __future__ import annotations

import pytest

import torchfut_aio
from torchfut_aio import PollPolicy, set_poll_policy


def test_the_defaults_need_no_arguments_and_policies_compare():
    assert PollPolicy() == PollPolicy(shortest=50e-6, longest=0.01, blocking=False)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"shortest": 0}, ValueError),
        ({"shortest": -1.0}, ValueError),
        ({"shortest": 0.1, "longest": 0.01}, ValueError),
        ({"longest": float("inf")}, ValueError),
        ({"shortest": float("nan")}, ValueError),
        ({"shortest": "1"}, TypeError),
        ({"longest": None}, TypeError),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(arguments, error):
    with pytest.raises(error, match=r"shortest|longest"):
        PollPolicy(**arguments)


def test_setting_a_policy_returns_the_one_before():
    mine = PollPolicy(longest=0.002)
    before = set_poll_policy(mine)
    assert set_poll_policy(before) is mine
    with pytest.raises(TypeError, match="PollPolicy"):
        torchfut_aio.set_poll_policy(0.001)
    assert set_poll_policy(before) is before
