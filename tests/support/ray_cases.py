"""What the tests of a Ray cluster share: a mark, a cluster of two nodes on this machine, and its processes."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import psutil
import pytest

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: make test-ray")

STORE = 80 * 2**20
"""Bytes of shared memory of a node: the least Ray takes, about."""


class TwoNodes:
    """A cluster of two raylets of one CPU each on this machine; the second can be killed and replaced."""

    def __init__(self, **head: Any) -> None:
        from ray.cluster_utils import Cluster

        self._client_port = head.get("ray_client_server_port")
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # gRPC's handlers around a fork let the head's client server die now and then: docs/scaling.md.
        os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
        settings = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={**settings, **head})
        self.add_node()

    @property
    def address(self) -> str:
        return self.cluster.address

    @property
    def client(self) -> str:
        """Address of the client server, where one was asked for."""
        return f"ray://{self.address.split(':')[0]}:{self._client_port}"

    def add_node(self) -> None:
        self.second = self.cluster.add_node(num_cpus=1, object_store_memory=STORE)

    def kill_node(self) -> None:
        """SIGKILL the raylet of the second node; its processes end by themselves."""
        (raylet,) = self.second.all_processes["raylet"]
        psutil.Process(raylet.process.pid).kill()


@contextmanager
def two_nodes(**head: Any) -> Iterator[TwoNodes]:
    before = of_ray()
    nodes = TwoNodes(**head)
    seen = [process for process in of_ray() if process not in before]
    try:
        yield nodes
    finally:
        nodes.cluster.shutdown()
        _, alive = psutil.wait_procs(seen, timeout=30)
        assert not alive, f"left behind: {alive}"


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def of_ray(session: int | None = None) -> list[psutil.Process]:
    """The processes of Ray below this one, or in a session."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            mine = os.getpid() in [p.pid for p in process.parents()]
            if (mine if session is None else os.getsid(process.pid) == session) and is_of_ray(process):
                found.append(process)
    return found


def is_of_ray(process: psutil.Process) -> bool:
    line = " ".join(process.cmdline())
    return "ray::" in line or "/ray/" in line


def rank_in(log: str) -> tuple[str, int]:
    """The node and the process number that the newest rank of a log has written."""
    first = [line for line in log.splitlines() if " on node " in line][-1]
    name, _, process = first.partition(", process ")
    return name.split(" on node ")[1], int(process)
