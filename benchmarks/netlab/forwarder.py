"""The process that makes the hosts and carries their packets; ``Lab`` starts it, nobody else.

Every host is a network namespace without a name: it lives as long as this process or one in it. Its only interface
beside ``lo`` is a TUN device whose other end is read here. Commands and answers are lines of JSON on a socket that is
file descriptor 0; when it closes, this process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from .nat import INSIDE, Chain, Nat
from .net import Net
from .profiles import Line, Pair, Profile

DEVICE = "eth0"
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
BATCH = 64  # packets read from one host before others have their turn
LATE_SECONDS = 0.001
GRAIN_SECONDS, SPARE_TURNS = 0.0005, 6  # waking up costs most: under load a turn is made only so often


ADVICE = (
    "A lab needs root (in a container: CAP_SYS_ADMIN and CAP_NET_ADMIN) or user namespaces (sysctl "
    "user.max_user_namespaces, user.max_net_namespaces, kernel.unprivileged_userns_clone, "
    "kernel.apparmor_restrict_unprivileged_userns), and in both cases /dev/net/tun that it may open"
)


class Refused(Exception):
    """This machine does not let us; the text says what."""


def unshare(flags: int, what: str) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        raise Refused(f"no {what}: {os.strerror(ctypes.get_errno())}")


def enter_user_namespace() -> None:
    """We are root in a namespace of our own, and nobody special outside."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER, "user namespace")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        try:
            Path("/proc/self", name).write_text(text)
        except OSError as error:
            raise Refused(f"no user namespace: {name}: {error.strerror}") from None


def open_tun() -> int:
    """A TUN device in the current namespace; its packets are read and written without any header of the wire."""
    try:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    except OSError as error:
        raise Refused(f"/dev/net/tun: {error.strerror}") from None
    return tun


def sysctl(name: str, value: str) -> str:
    """Sets it if possible; what it is then."""
    path = Path("/proc/sys", *name.split("."))
    with contextlib.suppress(OSError):
        path.write_text(value)
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"


class Hosts:
    """The namespaces, devices and counters. Those in ``routed`` have a router, and a private address."""

    def __init__(self, count: int, *, net: str, mtu: int, routed: Collection[int]) -> None:
        self.tuns: list[int] = []
        self.spaces: list[int] = []
        self.counters: list[int] = []
        self.congestion = ""
        for i in range(count):
            unshare(CLONE_NEWNET, "network namespace")
            self.spaces.append(os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
            sysctl("net.ipv6.conf.all.disable_ipv6", "1")
            sysctl("net.ipv6.conf.default.disable_ipv6", "1")
            self.congestion = sysctl("net.ipv4.tcp_congestion_control", "cubic")
            self.tuns.append(open_tun())
            commands = (
                "link set lo up",
                f"link set {DEVICE} mtu {mtu} txqueuelen 5000 up",
                f"addr add {INSIDE if i in routed else f'{net}.{i + 1}'}/24 dev {DEVICE}",
                *([f"route add default dev {DEVICE}"] if i in routed else []),
            )
            done = subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, capture_output=True)
            if done.returncode:
                raise Refused(f"ip: {done.stderr.strip()}")
            self.counters.append(os.open("/proc/self/net/dev", os.O_RDONLY | os.O_CLOEXEC))
        unshare(CLONE_NEWNET, "network namespace")  # nobody but hosts' processes are in hosts' namespaces

    def counted(self, i: int) -> tuple[int, int]:
        """Bytes of IP packets that host ``i``'s interface received and sent."""
        for row in os.pread(self.counters[i], 4096, 0).decode().splitlines():
            name, _, numbers = row.partition(":")
            if name.strip() == DEVICE:
                columns = numbers.split()
                return int(columns[0]), int(columns[8])
        raise Refused(f"host {i} has lost its interface")


class Forwarder:
    def __init__(
        self, hosts: Hosts, net: Net, routers: dict[int, Chain], *, network: str, control: socket.socket
    ) -> None:
        self.hosts, self.net, self.routers, self.control = hosts, net, routers, control
        self.prefix = socket.inet_aton(f"{network}.0")[:3]
        self.pending = b""
        self.packets = self.late = 0
        self.cpu = time.process_time()

    def run(self) -> None:
        clock, tuns, net, routers = time.monotonic, self.hosts.tuns, self.net, self.routers
        readers = {tun: i for i, tun in enumerate(tuns)}
        waited_for = [self.control.fileno(), *tuns]
        turned, spare = 0.0, 0.0
        while True:
            now = clock()
            spare = min(spare + (now - turned) / GRAIN_SECONDS, SPARE_TURNS) - 1
            turned = now
            if spare < 0:
                time.sleep(-spare * GRAIN_SECONDS)
            at = net.next()
            ready = select.select(waited_for, (), (), None if at is None else max(0.0, at - clock()))[0]
            for fd in ready:
                if fd in readers:
                    self.read(readers[fd], fd)
                elif not self.obey():
                    return
            now = clock()
            for due, j, packet in net.due(now):
                self.packets += 1
                if (router := routers.get(j)) is not None and (packet := router.into(now, packet)) is None:
                    continue
                with contextlib.suppress(OSError):  # the interface is down or has no room: lost
                    os.write(tuns[j], packet)
                self.late += now - due > LATE_SECONDS

    def read(self, i: int, tun: int) -> None:
        """Takes in what host ``i`` sent."""
        size, prefix, last, enter = self.net.mtu, self.prefix, len(self.hosts.tuns), self.net.enter
        now, router = time.monotonic(), self.routers.get(i)
        with contextlib.suppress(BlockingIOError):
            for _ in range(BATCH):
                packet = os.read(tun, size)
                if router is not None and (packet := router.out(now, packet)) is None:
                    continue
                if packet[16:19] == prefix and packet[0] >> 4 == 4 and 0 < packet[19] <= last:
                    enter(now, i, packet[19] - 1, len(packet), packet)

    def obey(self) -> bool:
        """False: whoever commands is gone."""
        data = self.control.recv(65536)
        self.pending += data
        while b"\n" in self.pending:
            row, _, self.pending = self.pending.partition(b"\n")
            command = json.loads(row)
            answer = getattr(self, f"do_{command.pop('do')}")(**command)
            self.control.sendall(json.dumps(answer).encode() + b"\n")
        return bool(data)

    def do_set(self, host: int, line: dict[str, float]) -> None:
        self.net.set(host, Line(**line))

    def do_cut(self, host: int, cut: bool) -> None:
        self.net.hosts[host].cut = cut

    def do_forget(self, host: int) -> None:
        self.routers[host].forget()

    def do_count(self, host: int) -> tuple[float, int, int]:
        return time.monotonic(), *self.hosts.counted(host)

    def do_load(self) -> dict[str, float]:
        return {"cpu": time.process_time() - self.cpu, "packets": self.packets, "late": self.late}


def main() -> None:
    control = socket.socket(fileno=0)
    with control.makefile("rb") as file:
        setup = json.loads(file.readline())
    nats = {host: [Nat(**nat) for nat in chain] for host, chain in setup["nats"]}
    hosts, refusals = None, []
    for rootless in (True,) if setup["rootless"] else (False, True):
        try:
            if rootless:
                enter_user_namespace()
            hosts = Hosts(setup["hosts"], net=setup["network"], mtu=setup["mtu"], routed=nats.keys())
            break
        except Refused as error:
            refusals.append(f"{'user namespace' if rootless else 'root'}: {error}")
    if hosts is None:
        control.sendall(json.dumps({"error": f"{'; '.join(refusals)}. {ADVICE}"}).encode() + b"\n")
        sys.exit(1)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        first = True
    except OSError:
        first = False
    net = Net(profile_from(setup["profile"]), setup["hosts"], mtu=setup["mtu"], seed=setup["seed"])
    ready = {"spaces": hosts.spaces, "congestion": hosts.congestion, "first": first, "rootless": rootless}
    control.sendall(json.dumps(ready).encode() + b"\n")
    routers = {
        host: Chain(chain, outside=f"{setup['network']}.{host + 1}", seed=setup["seed"] + host)
        for host, chain in nats.items()
    }
    gc.disable()  # nothing here is a cycle
    Forwarder(hosts, net, routers, network=setup["network"], control=control).run()


def profile_from(data: dict) -> Profile:
    """What ``lab.profile_data`` wrote."""
    return Profile(
        name=data["name"],
        about="",
        lines=tuple(Line(**line) for line in data["lines"]),
        first=tuple(Line(**line) for line in data["first"]),
        pairs={(a, b): Pair(**pair) for a, b, pair in data["pairs"]},
    )


if __name__ == "__main__":
    main()
