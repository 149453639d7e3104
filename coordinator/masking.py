"""Network addresses out of texts that everybody may read: a worker's error may quote where it dialled."""

from __future__ import annotations

import re

MASK = "[address]"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_IPV4 = rf"(?<![\w.]){_OCTET}(?:\.{_OCTET}){{3}}(?![\w.]*\w)(?::\d{{1,5}})?"
_GROUPS = r"(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{1,4}|:|(?:\d{1,3}\.){3}\d{1,3})?"
_IPV6 = rf"\[?(?<![\w:]){_GROUPS}(?![\w:])(?:%\w+)?(?:\](?::\d{{1,5}})?)?"
_MULTIADDR = r"/(?:ip4|ip6|dns|dns4|dns6|dnsaddr)/[^\s,;'\"]+"
_NAMED = r"(?<![\w.-])(?:[A-Za-z0-9-]+\.)*[A-Za-z][A-Za-z0-9-]*:\d{2,5}(?![\d.])"
_BRACKETS = re.compile(r"%5([BD])", re.IGNORECASE)  # as gRPC writes them
_ADDRESS = re.compile(f"{_MULTIADDR}|{_IPV6}|{_IPV4}|{_NAMED}")


def masked(text: str) -> str:
    """``text`` with ``[address]`` for everything that looks like one: IPv4, IPv6, HOST:PORT, multiaddrs."""
    return _ADDRESS.sub(MASK, _BRACKETS.sub(lambda found: "[" if found[1] in "Bb" else "]", text))
