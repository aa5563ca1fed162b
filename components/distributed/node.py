"""NodeSpec: what a launcher knows of its node and of the rendezvous of all nodes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from torch.distributed.elastic.rendezvous import RendezvousParameters

from components.distributed.membership import Patience, own_address
from components.distributed.worker import LAUNCH_ID

RENDEZVOUS_TIMEOUT_SECONDS = 900
"""Time that the nodes of a run wait for each other: the slowest may first have to set up its environment."""


@dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """This node, and the address of the rendezvous."""

    processes: int
    """Number of worker processes on this node."""
    nodes: int = 1
    """The largest number of nodes."""
    min_nodes: int = 0
    """The smallest number of nodes that the run continues with; 0: all of them."""
    rank: int | None = 0
    """Index of this node. Node 0 listens on `address`:`port`, and the others connect to it. None: the node whose
    machine has that address listens."""
    address: str = "127.0.0.1"
    port: int = 29500
    max_restarts: int = 0
    """Number of times that all workers are restarted after one of them failed, or a node was lost."""
    hang_timeout_seconds: float | None = None
    """Time without progress after which the workers are restarted; None: never."""
    patience: Patience = field(default_factory=Patience)

    @property
    def is_elastic(self) -> bool:
        """Whether nodes may leave and join."""
        return 0 < self.min_nodes < self.nodes

    @property
    def run_id(self) -> str:
        """The identifier of this run at a rendezvous address that several runs use in turn."""
        return os.environ.get(LAUNCH_ID) or "powertrain"

    @property
    def is_host(self) -> bool | None:
        """Whether this node listens; None: if the host name of this machine has the address, and the port is free."""
        if self.rank is None:
            return True if own_address() == self.address else None
        return self.rank == 0

    def rendezvous(self) -> RendezvousParameters:
        """Return the rendezvous parameters: any free port for a single node, `address`:`port` for several."""
        alone = self.nodes == 1
        return RendezvousParameters(
            backend="c10d",
            endpoint="127.0.0.1:0" if alone else f"{self.address}:{self.port}",
            run_id=self.run_id,
            min_nodes=self.min_nodes or self.nodes,
            max_nodes=self.nodes,
            local_addr="127.0.0.1" if alone else own_address() or (self.address if self.rank == 0 else None),
            is_host=self.is_host,
            join_timeout=RENDEZVOUS_TIMEOUT_SECONDS,
            read_timeout=RENDEZVOUS_TIMEOUT_SECONDS,
            last_call_timeout=self.patience.first_call,
            keep_alive_interval=self.patience.heartbeat,
        )
