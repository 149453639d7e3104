"""What both torchft contestants share: a lighthouse on host 0, and one replica group of one process on every host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .task import Host

TIMEOUT = timedelta(seconds=120)  # for a collective on a slow line; torchft's default is 60 s


@contextmanager
def manager(host: Host, store: dist.Store, **options: Any) -> Iterator[Any]:
    """A ``torchft.Manager`` of this host's replica. Every replica must be there for a step to count, as for the others.

    Addresses are numbers: by default a manager is announced by its host's name, which a home network does not know.
    """
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer

    lighthouse = None
    if host.rank == 0:
        lighthouse = LighthouseServer(bind=f"[::]:{host.port + 1}", min_replicas=host.world, join_timeout_ms=60_000)
        store.set("lighthouse", "1")
    store.wait(["lighthouse"])
    own = dist.TCPStore(host.address, host.port + 10 + host.rank, is_master=True, wait_for_workers=False)
    made = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        min_replica_size=host.world,
        timeout=TIMEOUT,
        quorum_timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr=host.address,
        store_port=own.port,
        lighthouse_addr=f"http://{host.peers[0]}:{host.port + 1}",
        replica_id=f"host_{host.rank}",
        hostname=host.address,
        port=host.port + 40 + host.rank,
        init_sync=False,  # all begin with the same weights
        **options,
    )
    try:
        yield made
    finally:
        made.shutdown(wait=False)
        if lighthouse is not None:
            lighthouse.shutdown()
