"""The other ranks of a training group on the nodes of a Ray cluster."""

from __future__ import annotations

import time
from pathlib import Path

from sapo.config import RunConfig
from sapo.errors import RankError
from sapo.utils.ray_cluster import Hosted, RayCluster, use_interface_of
from sapo.workflows.rank_processes import PROGRAM, StartedRanks


class RayRanks(StartedRanks):
    """The other ranks on the nodes of a Ray cluster.

    Args:
        cluster: with room for them, first of all its processes.
        config: of the run.
        directory: of the run, which every node reaches.

    Raises:
        RankError: one did not start.
        ClusterError: its node does not reach the run's directory.
    """

    def __init__(self, cluster: RayCluster, config: RunConfig, directory: Path) -> None:
        use_interface_of(cluster.host)
        super().__init__(config, directory, cluster.host)
        self._hosted: dict[int, Hosted] = {}
        for rank in self.ranks:
            self._hosted[rank] = cluster.start(rank - 1, f"rank {rank}", self.log(rank))
        try:
            for rank, hosted in self._hosted.items():
                if (failure := hosted.wait_until_started()) is not None:
                    raise RankError(failure)
                hosted.run(f"{PROGRAM}:serve_hosted_rank", self.place(rank))
        except BaseException:
            self.end(0.0)
            raise

    def ended(self, rank: int) -> str | None:
        """Return how a rank has ended, None while it lives."""
        return self._hosted[rank].ended()

    def kill(self, rank: int) -> None:
        """End a rank at once."""
        self._hosted[rank].kill()

    def end(self, seconds: float) -> None:
        """Wait for the ranks to end, and end those that have not after some seconds."""
        deadline = time.monotonic() + seconds
        for hosted in self._hosted.values():
            hosted.wait(max(0.0, deadline - time.monotonic()))
            hosted.kill()
