"""Hosts of a test: network namespaces of this machine, joined by a switch that can cut a link."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from .forks import ROOT
from .threads import until

_numbers = itertools.count()


def skip_without_hosts() -> None:
    """Skip a test where network namespaces cannot be created; in CI, fail it."""
    if os.geteuid() == 0 and shutil.which("ip"):
        return
    text = "network namespaces need root and the command `ip` of iproute2"
    if os.environ.get("CI"):
        pytest.fail(text)
    pytest.skip(text)


@dataclass
class Host:
    """A host with one network interface, which is plugged into a port of a switch."""

    name: str
    address: str
    switch: str
    port: str

    @property
    def prefix(self) -> list[str]:
        """The words to put before a command to run it on the host."""
        return ["ip", "netns", "exec", self.name]

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start this interpreter on the host. The program ends with the hosts at the latest."""
        command = [*self.prefix, sys.executable, *arguments]
        folders = os.pathsep.join(map(str, [ROOT, ROOT / "examples"]))
        env = {**os.environ, "PYTHONPATH": folders}
        return subprocess.Popen(command, text=True, cwd=ROOT, env=env, **options)

    def cut(self) -> None:
        """Drop all packets from and to this host. Its interface stays up."""
        self._set_port("nomaster")

    def heal(self) -> None:
        """Undo `cut`."""
        self._set_port("master", "switch")

    def unplug(self) -> None:
        """Take the link down."""
        self._set_port("down")

    def plug_in(self) -> None:
        """Undo `unplug`."""
        self._set_port("up")

    def _set_port(self, *state: str) -> None:
        _ip("-n", self.switch, "link", "set", self.port, *state)


@contextmanager
def hosts(number: int) -> Iterator[list[Host]]:
    """Create hosts that reach only each other, with the addresses 10.77.0.1 and following."""
    prefix = f"torchfut-{os.getpid()}-{next(_numbers)}"
    switch = f"{prefix}-switch"
    made = [Host(f"{prefix}-{n}", f"10.77.0.{n}", switch, f"port{n}") for n in range(1, number + 1)]
    names = [switch, *[host.name for host in made]]
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "name", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for host in made:
            pair = f"name {host.port} type veth peer name eth0 netns {host.name}"
            _ip("-n", switch, "link", "add", *pair.split())
            host.heal()
            host.plug_in()
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
        yield made
    finally:
        left = _ip("netns", "list").split()
        for name in filter(left.__contains__, names):
            _kill_programs(name)
            _ip("netns", "del", name)


def _kill_programs(name: str) -> None:
    def none_left() -> bool:
        pids = _ip("netns", "pids", name).split()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        return not pids

    until(none_left)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout
