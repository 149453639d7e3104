"""A real lab of three hosts. Bounds are wide: what a busy machine does to a measurement is not the lab's doing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from potluck.benchmarks.netlab import UNLIMITED, Lab, LabError, Line, Pair, Profile
from potluck.benchmarks.netlab import traffic as traffic_file

TRAFFIC = [sys.executable, "-I", "-S", traffic_file.__file__]
HOME = Line(up_mbit=8, down_mbit=16, delay_ms=20)
PAIRS = {(1, 2): Pair(delay_ms=50)}
TRIP_MS = 2 * 20
BUSY_MS = 100.0  # what the machine may add


def a_lab(**settings: object) -> Lab:
    return Lab(Profile(name="test", about="", lines=(UNLIMITED, HOME, UNLIMITED), pairs=PAIRS), **settings)


def or_skip(lab: Lab) -> Lab:
    try:
        return lab.__enter__()
    except LabError as error:
        pytest.skip(f"no lab here: {error}")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    made = or_skip(a_lab())
    try:
        yield made
    finally:
        made.__exit__()


def listening(lab: Lab, host: int, *role: str) -> subprocess.Popen[str]:
    process = lab.popen(host, [*TRAFFIC, *role], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def pings(lab: Lab, host: int, other: int, count: int = 10) -> list[float]:
    done = lab.run(host, [*TRAFFIC, "ping", lab.address(other), str(count), "0.01", "0.5"], timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def count(lab: Lab, sender: int, receiver: int, *, packets: int, mbit: float, nbytes: int) -> int:
    counter = listening(lab, receiver, "count", "1")
    lab.run(sender, [*TRAFFIC, "spray", lab.address(receiver), str(mbit), str(nbytes), str(packets)], timeout=60)
    return json.loads(counter.communicate(timeout=60)[0])


def test_hosts_reach_each_other_and_nobody_else(lab: Lab):
    devices = lab.run(0, ["ip", "-o", "link"]).stdout.splitlines()
    assert [row.split(":")[1].strip() for row in devices] == ["lo", "eth0"]
    assert lab.run(0, ["ip", "route"]).stdout.count("\n") == 1
    assert "TCP" in lab.how and lab.congestion in lab.how


def test_delay_is_the_sum_of_both_lines_and_the_way(lab: Lab):
    echo = listening(lab, 1, "echo")
    for host, asked in ((0, TRIP_MS), (2, TRIP_MS + 2 * 50)):
        assert asked - 0.5 < min(pings(lab, host, 1)) < asked + BUSY_MS
    ended(echo)


def test_nothing_is_faster_than_its_line_and_counters_count_it(lab: Lab):
    for sender, receiver, mbit in ((1, 0, 8), (0, 1, 16)):
        sent, received = lab.sent(sender), lab.received(receiver)
        start = time.monotonic()
        came = count(lab, sender, receiver, packets=700, mbit=1.5 * mbit, nbytes=1500)
        assert time.monotonic() - start > came * 1500 * 8 / (mbit * 1e6)
        assert lab.sent(sender) - sent == 700 * 1500
        assert lab.received(receiver) - received == came * 1500
        assert came > 50  # a queue takes more than that at once


def test_loss_is_what_was_asked_for_and_lines_change_while_it_runs(lab: Lab):
    lab.set(1, Line(loss=0.2))
    try:
        came = count(lab, 1, 0, packets=4000, mbit=4, nbytes=100)
    finally:
        lab.set(1, HOME)
    assert 0.16 < 1 - came / 4000 < 0.24  # 6 standard deviations


def test_cut_and_mend(lab: Lab):
    echo = listening(lab, 1, "echo")
    lab.cut(1)
    assert pings(lab, 0, 1, 5) == []
    lab.mend(1)
    assert len(pings(lab, 0, 1, 5)) == 5
    ended(echo)


def test_run_gives_what_the_command_said_and_is_ended_in_time(lab: Lab):
    done = lab.run(2, [sys.executable, "-c", "import sys; print('out'); sys.exit(3)"])
    assert (done.returncode, done.stdout) == (3, "out\n")
    with pytest.raises(subprocess.TimeoutExpired):
        lab.run(2, ["sleep", "60"], timeout=0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def spaces() -> set[str]:
    found = set()
    for entry in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(entry))
        except OSError:
            pass
    return found


@pytest.mark.parametrize("rootless", [False, True])
def test_leaving_ends_every_process_and_every_namespace(rootless: bool):
    made = or_skip(a_lab(rootless=rootless))
    escaped = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    print(os.getpid(), flush=True)\ntime.sleep(600)"
    )
    process = made.popen(1, [sys.executable, "-c", escaped], stdout=subprocess.PIPE, text=True)
    pids = [process.pid, int(process.stdout.readline()), made._forwarder.pid]
    inside = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}
    assert all(alive(pid) for pid in pids) and len(inside) == 2 and inside <= spaces()
    made.__exit__()
    process.stdout.close()
    assert not any(alive(pid) for pid in pids)
    assert not inside & spaces()


def test_a_lab_whose_owner_is_killed_ends_too():
    program = (
        "from potluck.benchmarks.netlab import Lab, UNLIMITED\n"
        "lab = Lab([UNLIMITED], hosts=1).__enter__()\n"
        "print(lab._forwarder.pid, lab.popen(0, ['sleep', '600']).pid, flush=True)\n"
        "lab.popen(0, ['sleep', '600']).wait()\n"
    )
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    owner = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    row = owner.stdout.readline()
    owner.kill()
    error = owner.communicate()[1].decode()
    if "LabError" in error:
        pytest.skip(error.splitlines()[-1])
    pids = [int(pid) for pid in row.split()]
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {pids}"
        time.sleep(0.01)
