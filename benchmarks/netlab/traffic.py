"""What ``check`` runs inside hosts: ``python traffic.py ROLE ARGUMENTS``; standard library only.

Who waits says "ready" when it listens. What was found out is the last line printed, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
import time

PORT = 7077
PIECE = bytes(1 << 16)
HEAD = struct.Struct("!Q")
IP_UDP_NBYTES = 28


def udp(*, listens: bool = False) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.suppress(OSError):  # root only: 8 MB, for bursts after a moment without CPU
        made.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)
    if listens:
        made.bind(("0.0.0.0", PORT))
        print("ready", flush=True)
    return made


def sink() -> None:
    """Takes TCP connections and reads what comes."""
    with socket.create_server(("0.0.0.0", PORT), backlog=16) as server:
        print("ready", flush=True)
        ends = [server]
        while True:
            for end in select.select(ends, (), ())[0]:
                if end is server:
                    ends.append(server.accept()[0])
                elif not end.recv(1 << 18):
                    ends.remove(end)


def pour(address: str) -> None:
    """Sends over TCP until it is killed."""
    with socket.create_connection((address, PORT)) as end:
        while True:
            end.sendall(PIECE)


def echo() -> None:
    first()
    with udp(listens=True) as end:
        while True:
            data, sender = end.recvfrom(2048)
            end.sendto(data, sender)


def ping(address: str, count: str, every_seconds: str, wait_seconds: str) -> None:
    """Prints round trips in milliseconds: a datagram of 36 bytes each ``every_seconds``, the last one waited for."""
    first()
    sent: list[float] = []
    trips: list[float] = []
    with udp() as end:
        end.connect((address, PORT))
        start = time.monotonic()
        while len(trips) < int(count):
            now = time.monotonic()
            last = len(sent) == int(count)
            due = sent[-1] + float(wait_seconds) if last else start + len(sent) * float(every_seconds)
            if now >= due:
                if last:
                    break  # some are lost
                sent.append(time.monotonic())
                end.send(HEAD.pack(len(sent) - 1))
            elif select.select([end], (), (), due - now)[0]:
                i = HEAD.unpack(end.recv(2048))[0]
                trips.append((time.monotonic() - sent[i]) * 1000)
    print(json.dumps(trips))


def first() -> None:
    """As root: before other processes, so that a busy machine does not add to a round trip."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def spray(address: str, mbit: str, nbytes: str, count: str) -> None:
    """``count`` datagrams, ``nbytes`` each as an IP packet, evenly at ``mbit`` (0: as fast as it goes)."""
    payload = bytes(int(nbytes) - IP_UDP_NBYTES)
    gap = int(nbytes) * 8 / (float(mbit) * 1e6) if float(mbit) else 0.0
    with udp() as end:
        end.connect((address, PORT))
        start, sent = time.monotonic(), 0
        while sent < int(count):
            due = int(count) if not gap else min(int(count), int((time.monotonic() - start) / gap) + 1)
            for _ in range(min(due - sent, 256)):
                end.send(payload)
                sent += 1
            if gap and sent < int(count):
                time.sleep(max(0.0, start + sent * gap - time.monotonic(), 0.001))


def count(quiet_seconds: str) -> None:
    """Counts datagrams until none has come for so long."""
    with udp(listens=True) as end:
        came, wait = 0, 60.0
        while select.select([end], (), (), wait)[0]:
            end.recv(2048)
            came, wait = came + 1, float(quiet_seconds)
    print(json.dumps(came))


if __name__ == "__main__":
    {f.__name__: f for f in (sink, pour, echo, ping, spray, count)}[sys.argv[1]](*sys.argv[2:])
