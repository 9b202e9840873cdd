"""The cluster of a run: which processes it has, and the room that they need there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from sapo.config import RunConfig
from sapo.errors import EngineError
from sapo.rollout.remote.channel import Channel, ChannelError
from sapo.rollout.remote.ray import RayChannel
from sapo.utils.ray_cluster import RayCluster


@contextmanager
def joined_cluster(config: RunConfig) -> Iterator[tuple[RunConfig, RayCluster | None]]:
    """Join the cluster of a recipe, with room for its processes; leave it afterwards, and end them.

    Args:
        config: with its ranks and device resolved.

    Yields:
        The recipe with the driver's own device, and the cluster; None for a run without one.

    Raises:
        ClusterError: Ray is not installed, the cluster does not answer, or it has no room.
    """
    if config.cluster.kind == "none":
        yield config, None
        return
    settings = config.cluster
    # A driver outside the cluster has a device of its own; one on a node must not share a rank's.
    own_gpu = config.device.startswith("cuda") and not settings.address.startswith("ray://")
    cluster = RayCluster(settings.address, room(config), wait_seconds=settings.wait_seconds, own_gpu=own_gpu)
    with closing(cluster):
        yield config.model_copy(update={"device": cluster.own_device or config.device}), cluster


def engine_channels(config: RunConfig, cluster: RayCluster | None) -> list[Channel] | None:
    """Start the engines of a recipe on its cluster, and return the channels to them; None where it has none there.

    Raises:
        EngineError: one did not start.
    """
    if cluster is None or not config.cluster.engines:
        return None
    first = config.train.ranks - 1
    try:
        return [RayChannel(cluster, first + number, number) for number in range(config.cluster.engines)]
    except ChannelError as error:
        raise EngineError(str(error)) from error


def room(config: RunConfig) -> list[dict[str, float]]:
    """Return the resources of each process: the ranks but the driver's, then the engines.

    >>> room(RunConfig(model={"path": "m"}, tasks=[{"name": "arithmetic"}], train={"steps": 1, "ranks": 2}))
    [{'CPU': 1}]
    """
    gpu: dict[str, float] = {"GPU": 1} if config.device.startswith("cuda") else {}
    return [{"CPU": 1, **gpu} for _ in range(config.train.ranks - 1 + config.cluster.engines)]
