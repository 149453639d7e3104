"""A hivemind DHT on every host, found through rank 0's store: no public host, no port mapping."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .task import Host

QUIET: dict[str, Any] = {"nat_port_map": False, "use_ipfs": False, "auto_nat": False, "use_relay": False}


def join(host: Host, store: dist.Store, place: int = 0) -> Any:
    """A running ``hivemind.DHT``, the ``place``-th of this host. TCP only: its QUIC drops the end of answers."""
    import hivemind

    where = [f"/ip4/{host.address}/tcp/{host.port + 1 + place * host.world + host.rank}"]
    if host.rank == place == 0:
        dht = hivemind.DHT(host_maddrs=where, start=True, **QUIET)
        store.set("dht", " ".join(str(a) for a in dht.get_visible_maddrs()))
        return dht
    return hivemind.DHT(host_maddrs=where, initial_peers=store.get("dht").decode().split(), start=True, **QUIET)
