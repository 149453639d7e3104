"""A process that is to workers what a coordinator is: it has a relay, and tries the addresses that they name."""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Any

from potluck.coordinator.addresses import confirmed
from potluck.coordinator.relay import Relay
from potluck.protocol.relay import Spot
from potluck.protocol.tls import Certificate, join_address, start_server

from .talk import obey

RUN, SECRET = "nat", "a secret of the benchmark"


class Hub:
    def __init__(self) -> None:
        certificate = Certificate.generate()
        self._certificate, self.relay = certificate, Relay(RUN, SECRET, certificate.fingerprint)

    async def start(self, host: str) -> str:
        """The relay's spot, as text."""
        self._server, port = await start_server(host, 0, self.relay.handlers(), self._certificate)
        return str(Spot(join_address(host, port), self._certificate.fingerprint))

    async def confirm(self, addresses: list[str], key: str) -> tuple[str, ...]:
        """As a coordinator does it; every address of the lab is one of a private network."""
        return await confirmed(addresses, bytes.fromhex(key), RUN, lan=True)

    async def state(self) -> dict[str, Any]:
        """Of this process: ``cpu`` seconds so far, ``memory`` is the most bytes that it has had."""
        return {
            "attached": self.relay.attached,
            "calls": self.relay.calls,
            "cpu": time.process_time(),
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "nbytes": sum(usage.sent_nbytes for usage in self.relay.usage.values()),
        }


async def main() -> None:
    hub = Hub()
    await obey({"start": hub.start, "confirm": hub.confirm, "state": hub.state})


if __name__ == "__main__":
    asyncio.run(main())
