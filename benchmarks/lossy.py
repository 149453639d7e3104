"""A long line that loses packets: the share of its rate that a stream of 1 MB frames gets over one hop.

    python -m benchmarks.lossy            (Linux; from the checkout; about 6 minutes)

Two hosts of the lab (``benchmarks/netlab``), 100 Mbit/s, 40 ms round trip, independent random losses either way. Each
case is a process that dials another one and sends without a pause. Shares are of the rate of IP packets, 12.5 MB/s:
0.96 is what one TCP can carry of payload. ``share`` is of the last seconds, ``whole`` of the whole run, dialling and
finding out what to do included. The congestion control is the one that the kernel names for the sender's sockets.

    one      a single connection, the congestion control left as it is: cubic
    striped  as many connections as the sender comes to, cubic
    bbr      one connection, BBR asked for on the socket once losses are seen
    default  what a worker does: BBR where the host allows it, else more connections
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.protocol.channel import Channel
from potluck.protocol.frames import Kind, TensorSpec, make_frame
from potluck.protocol.grpc_transport import GrpcTransport
from potluck.protocol.identity import Identity
from potluck.protocol.tls import Certificate
from potluck.protocol.transport import TransportConfig

from .netlab import Lab
from .netlab.profiles import Profile, line

FRAME_NBYTES = 1 << 20
MBIT, TRIP_MS = 100.0, 40.0
LAST_SECONDS = 12.0
FIXED = (2, 4, 8, 16)


@dataclass(frozen=True)
class Mode:
    connections: tuple[int, int]
    bbr: bool
    seconds: float


MODES = {
    "one": Mode((1, 1), False, 16.0),
    "striped": Mode((1, 16), False, 65.0),
    "bbr": Mode((1, 1), True, 25.0),
    "default": Mode((1, 16), True, 25.0),
    **{f"fixed-{k}": Mode((k, k), False, 25.0) for k in FIXED},
}
USUAL = ("one", "striped", "bbr", "default")


async def listen(host: str) -> None:
    """Takes channels until it is killed and prints, four times a second, when how much payload had come."""
    identity, total = Identity.generate(), 0

    async def read(channel: Channel) -> None:
        nonlocal total
        while True:
            total += len((await channel.recv()).payload)

    tasks: set[asyncio.Task[None]] = set()
    transport = GrpcTransport(identity, Certificate.generate(), TransportConfig(run="lossy"), host=host)
    (address,) = await transport.listen(lambda channel: tasks.add(asyncio.create_task(read(channel))))
    print(json.dumps([identity.peer_id, address]), flush=True)
    while True:
        await asyncio.sleep(0.25)
        print(json.dumps([time.monotonic(), total]), flush=True)


async def send(peer: str, address: str, mode: Mode) -> None:
    """Sends for the mode's time; prints what its channel came to."""
    transport = GrpcTransport(
        Identity.generate(),
        Certificate.generate(),
        TransportConfig(run="lossy"),
        connections=mode.connections,
        bbr=mode.bbr,
    )
    channel = await transport.dial(peer, [address])
    began = time.monotonic()
    seen: list[dict[str, Any]] = []
    index = 0
    while time.monotonic() < began + mode.seconds:
        frame = make_frame(
            index.to_bytes(8, "big") + bytes(FRAME_NBYTES - 8),
            kind=Kind.ACTIVATION,
            run=b"lossyrun",
            generation=1,
            step=index,
            stage=0,
            microbatch=0,
            part=0,
            attempt=0,
            tensors=(TensorSpec(codec="none", shape=(FRAME_NBYTES,), nbytes=FRAME_NBYTES),),
            targets=0,
            dense_nbytes=0,
        )
        await channel.send(frame)
        index += 1
        path = channel.path()
        now = {"connections": path.connections, "congestion": path.congestion}
        if not seen or {k: seen[-1][k] for k in now} != now:
            seen.append({"seconds": round(time.monotonic() - began, 1), **now})
    print(json.dumps({"began": began, "ended": time.monotonic(), "path": seen}), flush=True)
    await channel.hang_up()
    await transport.close()


def measure(lab: Lab, name: str) -> dict[str, Any]:
    """One case."""
    mode = MODES[name]
    me = [sys.executable, "-m", "benchmarks.lossy"]
    far = lab.popen(1, [*me, "--listen", lab.address(1)], stdout=subprocess.PIPE, text=True)
    assert far.stdout is not None
    peer, address = json.loads(far.stdout.readline())
    packets, late = lab.forwarded()
    near = lab.run(0, [*me, "--send", peer, address, name], stderr=sys.stderr, timeout=mode.seconds + 120)
    after, later = lab.forwarded()
    time.sleep(0.5)  # for its last mark
    far.kill()
    marks = [json.loads(row) for row in far.stdout.read().splitlines() if row.endswith("]")]
    far.wait()
    told = json.loads(near.stdout)
    return {
        "mode": name,
        "share": share(marks, told["ended"] - LAST_SECONDS, told["ended"]),
        "whole": share(marks, told["began"], told["ended"]),
        "path": told["path"],
        "late_packets": round((later - late) / max(1, after - packets), 4),
    }


def share(marks: list[list[float]], begin: float, end: float) -> float:
    """Of the line's rate, between two moments of the same clock."""
    inside = [mark for mark in marks if begin <= mark[0] <= end]
    (first, before), (last, after) = inside[0], inside[-1]
    return round((after - before) * 8 / 1e6 / (last - first) / MBIT, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", type=float, nargs="+", default=[0.0, 0.1, 1.0], help="percent (default 0 0.1 1)")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=USUAL)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    parser.add_argument("--send", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.listen:
        asyncio.run(listen(arguments.listen))
        return
    if arguments.send:
        logging.basicConfig(level=logging.INFO, format="    %(message)s")
        asyncio.run(send(*arguments.send[:2], MODES[arguments.send[2]]))
        return
    results = []
    for loss in arguments.loss:
        lines = Profile(
            name=f"{loss:g} % loss",
            about="",
            lines=(line(up=MBIT, down=MBIT, round_trip_ms=TRIP_MS, loss=loss / 100),),
        )
        for number in range(arguments.rounds):
            with Lab(lines, hosts=2, seed=number) as lab:
                how = lab.how
                for name in arguments.mode:
                    found = {"loss_percent": loss, "seed": number, **measure(lab, name)}
                    results.append(found)
                    last = found["path"][-1]
                    print(
                        f"{loss:g} % {name:8} share {found['share']:.3f}, whole run {found['whole']:.3f}, at last "
                        f"{last['connections']} connections, {last['congestion']}",
                        flush=True,
                    )
    conditions = {
        "mbit": MBIT,
        "round_trip_ms": TRIP_MS,
        "frame_nbytes": FRAME_NBYTES,
        "last_seconds": LAST_SECONDS,
        "lab": how,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    print(json.dumps(conditions))
    if arguments.json:
        arguments.json.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
