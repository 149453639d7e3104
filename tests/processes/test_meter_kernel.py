"""The byte meter against the kernel: every worker in a network namespace of its own, behind a line of its own.

The meter means bytes at IP level, as a volunteer's data cap counts them. An interface also counts the 14 bytes
of every Ethernet header, which the test takes off. Segmentation and receive offload are off on all interfaces:
with them an interface counts a train of segments as one packet with one header, and receivers acknowledge
trains instead of every second segment, which no home line at this speed does. HTTP to the page is not metered;
nobody asks for it here.
"""

from __future__ import annotations

import contextlib
import json
import os
import pydoc_data.topics
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from potluck.demo import die_with_parent
from potluck.protocol.config import RunConfig, convert, dump
from potluck.protocol.identity import Identity

pytestmark = pytest.mark.timeout(110)

ETHERNET_NBYTES = 14
RUN_SECONDS = 90.0
RATE = ["rate", "100mbit", "burst", "16kb", "latency", "200ms"]
# What `ethtool -K DEVICE tso off gso off gro off` does, for machines without it.
OFFLOADS_OFF = """
import ctypes, fcntl, socket, struct, sys
SIOCETHTOOL, ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO = 0x8946, 0x1F, 0x24, 0x2C
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    for command in (ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO):
        value = ctypes.create_string_buffer(struct.pack("=II", command, 0))
        request = struct.pack("16sP", sys.argv[1].encode(), ctypes.addressof(value)) + bytes(16)
        fcntl.ioctl(control, SIOCETHTOOL, request)
"""
DEMO = {
    "name": "meter",
    "steps": 30,
    "model": {"d_model": 128, "layers": 2, "heads": 4, "rotary_dim": 16, "seq_len": 64},
    "pipeline": {"stages": 2, "microbatch_size": 2, "microbatches": 4, "recompute": False},
    "activations": {"forward": "int4:tile=64", "backward": "int8:tile=64"},
    "sync": {"preset": "potluck", "every": 8, "delay": 2},
    "eval": {"every": 15, "samples": 8},
    "coordinator": {"wait_for": 4},
}
DENSE = {
    **DEMO,
    "steps": 8,
    "model": {"d_model": 256, "layers": 2, "heads": 4, "rotary_dim": 16, "seq_len": 64},
    "activations": {"forward": "fp16", "backward": "fp16"},
    "sync": {"preset": "dense"},
}
ALL_WITHIN, EACH_WITHIN = 0.03, 0.05


def must(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


class Lines:
    """Namespaces ``0`` (the coordinator) to ``workers``, joined by a bridge in one more."""

    def __init__(self, workers: int) -> None:
        self.prefix = f"meter{os.getpid()}"
        self.hub = f"{self.prefix}-hub"
        self.nodes = [f"{self.prefix}-{i}" for i in range(workers + 1)]
        self.processes: list[subprocess.Popen[bytes]] = []

    def lay(self) -> None:
        for name in (self.hub, *self.nodes):
            must("ip", "netns", "add", name)
            quiet = ("net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
            must("ip", "netns", "exec", name, "sysctl", "-q", "-w", *quiet)
            must("ip", "-n", name, "link", "set", "lo", "up")
        must("ip", "-n", self.hub, "link", "add", "bridge", "type", "bridge")
        must("ip", "-n", self.hub, "link", "set", "bridge", "up")
        for i, name in enumerate(self.nodes):
            ends = ("type", "veth", "peer", "name", "eth0", "netns", name)
            must("ip", "-n", self.hub, "link", "add", f"port{i}", "mtu", "1500", *ends)
            must("ip", "-n", self.hub, "link", "set", f"port{i}", "master", "bridge", "up")
            must("ip", "-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            must("ip", "-n", name, "link", "set", "eth0", "mtu", "1500", "up")
            for space, device in ((self.hub, f"port{i}"), (name, "eth0")):
                must("ip", "netns", "exec", space, sys.executable, "-c", OFFLOADS_OFF, device)
                must("tc", "-n", space, "qdisc", "add", "dev", device, "root", "tbf", *RATE)

    def spawn(self, node: int, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        command = ["ip", "netns", "exec", self.nodes[node], sys.executable, "-m", "potluck", "-v", *arguments]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, preexec_fn=die_with_parent
            )
        self.processes.append(process)
        return process

    def counted(self, node: int) -> dict[str, int]:
        """Bytes at IP level that the interface has seen since it is there, in and out."""
        show = ["ip", "-n", self.nodes[node], "-j", "-s", "link", "show", "eth0"]
        done = subprocess.run(show, capture_output=True, check=True, timeout=20)
        stats = json.loads(done.stdout)[0]["stats64"]
        return {
            way: stats[key]["bytes"] - ETHERNET_NBYTES * stats[key]["packets"]
            for way, key in (("in", "rx"), ("out", "tx"))
        }

    def clear(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
        for name in (*self.nodes, self.hub):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)


@pytest.fixture
def lines() -> Iterator[Lines]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need root on Linux")
    if shutil.which("ip") is None or shutil.which("tc") is None or shutil.which("sysctl") is None:
        pytest.skip("needs ip, tc (iproute2) and sysctl (procps)")
    made = Lines(workers=4)
    try:
        probe = subprocess.run(["ip", "netns", "add", f"{made.prefix}-probe"], capture_output=True, check=False)
        if probe.returncode:
            pytest.skip(f"no network namespaces here: {probe.stderr.decode().strip()}")
        must("ip", "netns", "del", f"{made.prefix}-probe")
        made.lay()
        yield made
    finally:
        made.clear()


@pytest.mark.parametrize("settings", [DEMO, pytest.param(DENSE, marks=pytest.mark.slow)], ids=["demo", "dense"])
def test_metered_bytes_are_those_the_kernel_counts(lines: Lines, tmp_path: Path, settings: dict[str, object]) -> None:
    config = convert({**settings, "data": {"source": pydoc_data.topics.__file__, "vocab_size": 512}})
    run(lines, tmp_path, config)
    rows, metered, kernel = compare(lines, tmp_path)
    table = "\n".join(["", *rows])
    assert abs(sum(metered.values()) / sum(kernel.values()) - 1) < ALL_WITHIN, table
    for node in kernel:
        assert abs(metered[node] / kernel[node] - 1) < EACH_WITHIN, table


def run(lines: Lines, folder: Path, config: RunConfig) -> None:
    """The whole run, to its orderly end."""
    (folder / "run.yaml").write_text(dump(config))
    ready = folder / "ready.json"
    up = ["coordinator", "up", str(folder / "run.yaml"), "--host", "10.77.0.1", "--ready-file", str(ready)]
    deadline = time.monotonic() + RUN_SECONDS
    coordinator = lines.spawn(0, folder / "0.log", *up, "--data-dir", str(folder / "0"))
    while not ready.exists():
        assert coordinator.poll() is None and time.monotonic() < deadline, (folder / "0.log").read_text()
        time.sleep(0.05)
    ticket = json.loads(ready.read_text())["ticket"]
    for i in range(1, len(lines.nodes)):
        place = ["--host", f"10.77.0.{i + 1}", "--threads", "1", "--data-dir", str(folder / str(i))]
        lines.spawn(i, folder / f"{i}.log", "worker", "join", ticket, *place)
    for i, process in enumerate(lines.processes):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        assert process.returncode == 0, f"node {i}: {(folder / f'{i}.log').read_text()[-3000:]}"


def compare(lines: Lines, folder: Path) -> tuple[list[str], dict[int, int], dict[int, int]]:
    """A table for people; each worker's bytes by its meter and by its interface."""
    metered: dict[int, int] = {}
    kernel: dict[int, int] = {}
    rows = []
    with contextlib.closing(sqlite3.connect(folder / "0" / "run.sqlite")) as ledger:
        for i in range(1, len(lines.nodes)):
            peer = Identity.load_or_create(folder / str(i) / "identity.pem").peer_id
            sums: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"in": 0, "out": 0})
            for purpose, way, nbytes in ledger.execute(
                "SELECT purpose, direction, SUM(nbytes) FROM traffic WHERE peer = ? GROUP BY purpose, direction", [peer]
            ):
                sums[purpose][way] += nbytes
            seen = lines.counted(i)
            ours = {way: sum(s[way] for s in sums.values()) for way in seen}
            metered[i], kernel[i] = sum(ours.values()), sum(seen.values())
            for purpose, s in sorted(sums.items()):
                rows.append(f"worker {i}  {purpose:12} in {s['in']:9} out {s['out']:9}")
            rows.append(f"worker {i}  metered      in {ours['in']:9} out {ours['out']:9}")
            rows.append(f"worker {i}  kernel       in {seen['in']:9} out {seen['out']:9}")
            rows.append(
                f"worker {i}  in {ours['in'] / seen['in'] - 1:+.2%}  out {ours['out'] / seen['out'] - 1:+.2%}"
                f"  both {metered[i] / kernel[i] - 1:+.2%}"
            )
    rows.append(
        f"all: metered {sum(metered.values())}, kernel {sum(kernel.values())}, ratio "
        f"{sum(metered.values()) / sum(kernel.values()) - 1:+.2%}"
    )
    return rows, metered, kernel
