"""Routers: what they do to packets in virtual time, and who reaches whom through them, over real UDP and TCP."""

from __future__ import annotations

import json
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from potluck.benchmarks.netlab import NATS, UNLIMITED, Lab, LabError, Nat
from potluck.benchmarks.netlab.nat import INSIDE, TCP, UDP, Chain, Router

OUTSIDE, FAR, OTHER = "10.77.0.9", "10.77.0.1", "10.77.0.2"
KINDS = [kind for kind in NATS if kind != "none"]


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def a_packet(protocol: int, source: tuple[str, int], target: tuple[str, int], body: bytes = b"four") -> bytes:
    ends = socket.inet_aton(source[0]) + socket.inet_aton(target[0])
    if protocol == UDP:
        inner = struct.pack("!4H", source[1], target[1], 8 + len(body), 0) + body
    else:
        inner = struct.pack("!2H2L4H", source[1], target[1], 7, 0, 0x5002, 1000, 0, 0) + body
    at = 6 if protocol == UDP else 16
    sum_of = checksum(ends + struct.pack("!2H", protocol, len(inner)) + inner)
    inner = inner[:at] + struct.pack("!H", sum_of) + inner[at + 2 :]
    header = struct.pack("!2B3H2BH", 0x45, 0, 20 + len(inner), 5, 0, 64, protocol, 0) + ends
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + inner


def ends_of(packet: bytes) -> tuple[tuple[str, int], tuple[str, int]]:
    """Its source and target; both checksums must be right."""
    assert checksum(packet[:20]) == 0
    assert checksum(packet[12:20] + struct.pack("!2H", packet[9], len(packet) - 20) + packet[20:]) == 0
    ports = struct.unpack("!2H", packet[20:24])
    return (socket.inet_ntoa(packet[12:16]), ports[0]), (socket.inet_ntoa(packet[16:20]), ports[1])


def a_chain(kind: str, seed: int = 0) -> Chain:
    return Chain(NATS[kind], outside=OUTSIDE, seed=seed)


@pytest.mark.parametrize("protocol", [UDP, TCP])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_host_sends_has_the_routers_address_and_the_answer_finds_back(kind: str, protocol: int) -> None:
    chain, mapped = a_chain(kind), set()
    for k, far in enumerate([(FAR, 80), (OTHER, 80), (FAR, 81)] * 50):
        sent = chain.out(k / 1000, a_packet(protocol, (INSIDE, 5000), far, k.to_bytes(4)))
        assert sent is not None and sent[-4:] == k.to_bytes(4)
        (address, port), target = ends_of(sent)
        assert (address, target) == (OUTSIDE, far)
        mapped.add((port, far))
        answer = chain.into(k / 1000, a_packet(protocol, far, (OUTSIDE, port)))
        assert answer is not None and ends_of(answer) == (far, (INSIDE, 5000))
    ports = {port for port, _ in mapped}
    assert len(mapped) == 3 and (len(ports) == 3 if kind == "symmetric" else ports == {5000})


@pytest.mark.parametrize("kind", KINDS)
def test_who_may_send_to_a_mapped_port(kind: str) -> None:
    chain = a_chain(kind)
    assert chain.into(0.0, a_packet(UDP, (FAR, 80), (OUTSIDE, 5000))) is None
    sent = chain.out(0.0, a_packet(UDP, (INSIDE, 5000), (FAR, 80)))
    assert sent is not None
    port = ends_of(sent)[0][1]
    came = [chain.into(0.0, a_packet(UDP, source, (OUTSIDE, port))) for source in ((FAR, 80), (FAR, 81), (OTHER, 80))]
    others = kind == "port-keeping"
    assert [packet is not None for packet in came] == [True, others, others]
    assert chain.into(0.0, a_packet(TCP, (FAR, 80), (OUTSIDE, port))) is None


def test_mappings_end_when_nothing_uses_them_and_when_the_router_restarts() -> None:
    chain = Chain([Nat(udp_seconds=10, tcp_seconds=100)], outside=OUTSIDE, seed=0)

    def comes_in(now: float, protocol: int) -> bool:
        return chain.into(now, a_packet(protocol, (FAR, 80), (OUTSIDE, 5000))) is not None

    for protocol in (UDP, TCP):
        chain.out(0.0, a_packet(protocol, (INSIDE, 5000), (FAR, 80)))
    assert comes_in(9.0, UDP) and comes_in(18.0, UDP) and not comes_in(29.0, UDP) and comes_in(99.0, TCP)
    chain.forget()
    assert not comes_in(100.0, TCP)
    chain.out(101.0, a_packet(TCP, (INSIDE, 5000), (FAR, 80)))
    assert comes_in(101.0, TCP)


def test_ports_are_given_to_one_host_port_at_a_time_and_come_from_the_seed() -> None:
    def ports(seed: int) -> list[int]:
        made = Router(NATS["symmetric"][0], inside=INSIDE, outside=OUTSIDE, chance=random.Random(seed))
        sent = [made.out(0.0, a_packet(UDP, (INSIDE, 5000), (FAR, port))) for port in range(1, 3000)]
        return [ends_of(packet)[0][1] for packet in sent if packet]

    assert len(set(ports(1))) == 2999
    assert ports(1) == ports(1) != ports(2)


def test_what_is_no_whole_packet_of_udp_or_tcp_does_not_pass() -> None:
    chain, good = a_chain("port-keeping"), a_packet(UDP, (INSIDE, 5000), (FAR, 80))
    assert chain.out(0.0, good) is not None
    icmp, fragment, later = (bytearray(good) for _ in range(3))
    icmp[9], fragment[6], later[7] = 1, 0x20, 3
    stranger = a_packet(UDP, ("192.168.1.3", 5000), (FAR, 80))
    for wrong in (b"", good[:24], bytes(icmp), bytes(fragment), bytes(later), b"\x65" + good[1:], stranger):
        assert chain.out(0.0, wrong) is None
    without_checksum = good[:26] + b"\0\0" + good[28:]
    sent = chain.out(0.0, without_checksum)
    assert sent is not None and sent[26:28] == b"\0\0"


# Below: a real lab. Hosts 0 and 1 are public, one host behind each kind of router comes after them.

HOSTS = {kind: 2 + k for k, kind in enumerate(KINDS)}
COMMON = """
import json, select, socket, sys

def an_end(kind, port):
    end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    end.bind(("0.0.0.0", port))
    end.settimeout(0.5)
    return end
"""
# Tells whoever asks which address it sees.
MIRROR = (
    COMMON
    + """
udp, tcp = an_end("udp", 7077), an_end("tcp", 7077)
tcp.listen()
print("ready", flush=True)
while True:
    for end in select.select([udp, tcp], (), ())[0]:
        if end is tcp:
            with tcp.accept()[0] as one:
                one.sendall(json.dumps(one.getpeername()).encode())
        else:
            sender = udp.recvfrom(100)[1]
            udp.sendto(json.dumps(sender).encode(), sender)
"""
)
# From one port asks several mirrors: prints the addresses they see, null for who does not answer.
ASK = (
    COMMON
    + """
kind, port, *hosts = sys.argv[1:]
seen = []
end = an_end(kind, int(port)) if kind == "udp" else None
for host in hosts:
    try:
        if kind == "udp":
            end.sendto(b"", (host, 7077))
            answer = end.recv(100)
        else:
            with an_end(kind, int(port)) as one:
                one.connect((host, 7077))
                answer = one.recv(100)
    except OSError:
        answer = b"null"
    seen.append(json.loads(answer))
print(json.dumps(seen), flush=True)
if kind == "udp":  # then says for a while who else sends here
    sys.stdin.readline()
    came = []
    try:
        while True:
            came.append(end.recvfrom(100)[1])
    except OSError:
        print(json.dumps(came))
"""
)
SEND = (
    COMMON
    + """
an_end("udp", int(sys.argv[1])).sendto(b"hello", (sys.argv[2], int(sys.argv[3])))
"""
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    made = Lab([UNLIMITED], hosts=2 + len(KINDS), nats={host: NATS[kind] for kind, host in HOSTS.items()})
    try:
        made.__enter__()
    except LabError as error:
        pytest.skip(f"no lab here: {error}")
    try:
        yield made
    finally:
        made.__exit__()


@contextmanager
def mirrors(lab: Lab, *hosts: int) -> Iterator[None]:
    made = [lab.popen(host, [sys.executable, "-ISc", MIRROR], stdout=subprocess.PIPE, text=True) for host in hosts]
    try:
        for process in made:
            assert process.stdout.readline() == "ready\n"
        yield
    finally:
        for process in made:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("kind", KINDS)
def test_what_others_see_of_a_host_over_udp_and_tcp(lab: Lab, kind: str) -> None:
    host = HOSTS[kind]
    assert lab.run(host, ["ip", "-4", "-o", "addr", "show", "eth0"]).stdout.split()[3] == f"{lab.inside(host)}/24"
    with mirrors(lab, 0, 1):
        for protocol in ("udp", "tcp"):
            argv = [sys.executable, "-ISc", ASK, protocol, "6000", lab.address(0), lab.address(1)]
            seen = json.loads(lab.run(host, argv, stdin=subprocess.DEVNULL).stdout.splitlines()[0])
            assert [address for address, _ in seen] == [lab.address(host)] * 2, (protocol, seen)
            ports = {port for _, port in seen}
            assert len(ports) == 2 and 6000 not in ports if kind == "symmetric" else ports == {6000}, (protocol, seen)


@pytest.mark.parametrize("kind", KINDS)
def test_who_gets_in_over_udp(lab: Lab, kind: str) -> None:
    host = HOSTS[kind]
    with mirrors(lab, 0):
        argv = [sys.executable, "-ISc", ASK, "udp", "6001", lab.address(0)]
        asking = lab.popen(host, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        (seen,) = json.loads(asking.stdout.readline())
        address, port = seen

        def send(sender: int, source_port: int, target: int) -> None:
            lab.run(sender, [sys.executable, "-ISc", SEND, str(source_port), address, str(target)]).check_returncode()

        send(1, 6002, port)  # a stranger
        send(0, 6002, port)  # one that was spoken to, from another port
        send(1, 6002, port % 60_000 + 1024)  # to a port that nobody mapped
        out, _ = asking.communicate("\n", timeout=30)
    came = [tuple(sender) for sender in json.loads(out.splitlines()[-1])]
    strangers = [(lab.address(1), 6002), (lab.address(0), 6002)]
    assert came == (strangers if kind == "port-keeping" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_can_dial_a_host_behind_a_router(lab: Lab, kind: str) -> None:
    with mirrors(lab, 0, HOSTS[kind]):
        argv = [sys.executable, "-ISc", ASK, "tcp", "0"]
        both = [lab.address(0), lab.address(HOSTS[kind])]
        assert [seen is not None for seen in json.loads(lab.run(1, [*argv, *both]).stdout)] == [True, False]
        assert json.loads(lab.run(HOSTS[kind], [*argv, *both]).stdout)[0][0] == lab.address(HOSTS[kind])
