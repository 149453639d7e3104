"""Hosts on this machine, each behind a line of its own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .nat import INSIDE, Nat
from .profiles import Line, Profile

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.0"
MTU = 1500
CUBIC = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
START_SECONDS, END_SECONDS = 30.0, 5.0


class LabError(Exception):
    """This machine cannot be a lab; the text says why and what to do."""


class Lab:
    """``with Lab(profile, hosts=n) as lab``: n hosts that reach each other over the profile's lines, and nobody else.

    As root, or else in a user namespace (``rootless``: in one at any rate). ``mtu``: bytes of the largest packet; small
    ones make lines of a few hundred kbit/s less coarse, 64,000 spares CPU where no rate matters. ``seed``: of loss and
    jitter. ``nats``: the routers that hosts are behind (``nat.py``), the host's own first.
    ``network``: the first three numbers of their public addresses. Leaving ends every process
    in the hosts. Raises ``LabError``.
    """

    def __init__(
        self,
        lines: Profile | Sequence[Line],
        *,
        hosts: int | None = None,
        mtu: int = MTU,
        seed: int = 0,
        rootless: bool = False,
        nats: Mapping[int, Sequence[Nat]] | None = None,
        network: str = NETWORK,
    ) -> None:
        self.profile = lines if isinstance(lines, Profile) else Profile(name="lines", about="", lines=tuple(lines))
        self.hosts = len(self.profile.first + self.profile.lines) if hosts is None else hosts
        if not 0 < self.hosts <= 250:
            raise ValueError(f"1 to 250 hosts, not {self.hosts}")
        self.mtu, self.seed, self.network = mtu, seed, network
        self.nats = {host: tuple(chain) for host, chain in (nats or {}).items() if chain}
        if not all(0 <= host < self.hosts for host in self.nats):
            raise ValueError(f"routers for hosts 0 to {self.hosts - 1} only, not {sorted(self.nats)}")
        self.rootless = rootless or os.geteuid() != 0
        self.how = ""
        self._processes: list[subprocess.Popen[Any]] = []
        self._enter: list[list[str]] = []
        self._inodes: set[str] = set()

    def __enter__(self) -> Lab:
        if sys.platform != "linux":
            raise LabError("network namespaces are Linux's")
        for tool in ("ip", "nsenter"):
            if shutil.which(tool) is None:
                raise LabError(f"{tool} is missing: apt install iproute2 util-linux")
        if not self.rootless:
            allow_cubic()
        self._control, theirs = socket.socketpair()
        module = f"{__package__}.forwarder"
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            self._forwarder = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=theirs.fileno(),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
        self._control.settimeout(START_SECONDS)
        self._answers = self._control.makefile("rb")
        nats = [(host, [asdict(nat) for nat in chain]) for host, chain in self.nats.items()]
        setup = {"profile": profile_data(self.profile), "hosts": self.hosts, "mtu": self.mtu, "seed": self.seed}
        try:
            ready = self._ask(**setup, nats=nats, network=self.network, rootless=self.rootless)
            if "error" in ready:
                raise LabError(ready["error"])
        except BaseException:
            self.__exit__()
            raise
        self.rootless = ready["rootless"]
        proc = f"/proc/{self._forwarder.pid}"
        user = [f"--user={proc}/ns/user", "--preserve-credentials"] if self.rootless else []
        self._enter = [["nsenter", *user, f"--net={proc}/fd/{fd}", "--"] for fd in ready["spaces"]]
        self._inodes = {os.readlink(f"{proc}/fd/{fd}") for fd in ready["spaces"]}
        self.congestion = ready["congestion"]
        ways = "unprivileged user namespace" if self.rootless else "root"
        turn = "real-time" if ready["first"] else "ordinary"
        self.how = (
            f"network namespaces ({ways}), TUN devices, one forwarder in Python ({turn} priority), "
            f"{self.mtu}-byte packets, TCP {self.congestion}"
        )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + END_SECONDS
        while (left := self._inhabitants()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for process in self._processes:
            process.wait()
        self._answers.close()
        self._control.close()  # and the forwarder ends
        try:
            self._forwarder.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._forwarder.kill()
            self._forwarder.wait()

    def _inhabitants(self) -> list[int]:
        """Living processes in the hosts, whoever started them."""
        found = []
        for entry in Path("/proc").iterdir() if self._inodes else ():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if os.readlink(entry / "ns" / "net") in self._inodes:
                        found.append(int(entry.name))
        return found

    def _ask(self, **command: Any) -> Any:
        try:
            self._control.sendall(json.dumps(command).encode() + b"\n")
            answer = self._answers.readline()
        except OSError as error:
            raise LabError(f"the forwarder: {error}") from None
        if not answer:
            raise LabError("the forwarder has ended; what it said is on standard error")
        return json.loads(answer)

    def address(self, host: int) -> str:
        """By which others know it: of a host behind a router, the router's."""
        return f"{self.network}.{range(self.hosts)[host] + 1}"

    def inside(self, host: int) -> str:
        """What a host takes for its address."""
        return INSIDE if host in self.nats else self.address(host)

    def forget(self, host: int) -> None:
        """The host's routers lose their mappings, as if they had been switched off and on."""
        if host not in self.nats:
            raise ValueError(f"host {host} is behind no router")
        self._ask(do="forget", host=host)

    def enter(self, host: int) -> list[str]:
        """What a command begins with that is to run in a host."""
        return self._enter[host]

    def popen(self, host: int, argv: Sequence[str | os.PathLike[str]], **kwargs: Any) -> subprocess.Popen[Any]:
        """``subprocess.Popen`` in a host, in a session of its own; killed if the thread that called this ends."""
        command = [*self._enter[host], *(os.fspath(word) for word in argv)]
        kwargs = {"preexec_fn": functools.partial(die_with, os.getpid()), "start_new_session": True, **kwargs}
        process = subprocess.Popen(command, **kwargs)
        self._processes.append(process)
        return process

    def run(
        self, host: int, argv: Sequence[str | os.PathLike[str]], *, timeout: float | None = None, **kwargs: Any
    ) -> subprocess.CompletedProcess[Any]:
        """``subprocess.run`` in a host; standard output and error are captured unless they are given."""
        kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **kwargs}
        process = self.popen(host, argv, **kwargs)
        try:
            out, error = process.communicate(timeout=timeout)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def sent(self, host: int) -> int:
        """Bytes of IP packets that the host's interface has sent, as its kernel counts them; lost ones too."""
        return self.counted(host)[2]

    def received(self, host: int) -> int:
        """Bytes of IP packets that have reached the host's interface."""
        return self.counted(host)[1]

    def counted(self, host: int) -> tuple[float, int, int]:
        """When the counters were read (``time.monotonic``), bytes received, bytes sent."""
        at, received, sent = self._ask(do="count", host=range(self.hosts)[host])
        return at, received, sent

    def set(self, host: int, line: Line) -> None:
        """Another line from now on; what is queued leaves at the old rate."""
        self._ask(do="set", host=range(self.hosts)[host], line=asdict(line))

    def cut(self, host: int) -> None:
        """Nothing in, nothing out, and nobody is told, until ``mend``. What had left the host still arrives."""
        self._ask(do="cut", host=range(self.hosts)[host], cut=True)

    def mend(self, host: int) -> None:
        self._ask(do="cut", host=range(self.hosts)[host], cut=False)

    def forwarder_cpu(self) -> float:
        """CPU seconds of the forwarder since its start, the kernel's for it included."""
        return self._ask(do="load")["cpu"]

    def forwarded(self) -> tuple[int, int]:
        """Packets handed over, and how many of them more than 1 ms after their moment: did the emulation keep up?"""
        load = self._ask(do="load")
        return load["packets"], load["late"]


def die_with(parent: int) -> None:
    """In a child that has just been forked: it is killed when its parent ends, also if that has ended already."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def allow_cubic() -> None:
    """A namespace takes only what the machine allows to all: as root we add cubic there, and leave it."""
    with contextlib.suppress(OSError):
        allowed = CUBIC.read_text().split()
        if "cubic" not in allowed:
            CUBIC.write_text(" ".join([*allowed, "cubic"]))


def profile_data(profile: Profile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "lines": [asdict(line) for line in profile.lines],
        "first": [asdict(line) for line in profile.first],
        "pairs": [(a, b, asdict(pair)) for (a, b), pair in profile.pairs.items()],
    }
