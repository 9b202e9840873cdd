"""A Ray cluster: reach it, reserve room on its nodes, start processes there, notice that one has died.

Ray does no more than that. What the processes of a run tell each other does not go through this module.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from sapo.errors import ClusterError
from sapo.utils.text import first_line

PROBE_SECONDS = 5.0
"""How long an address may take to answer. Ray itself would try for more than a minute."""
START_SECONDS = 120.0
"""How long a placed process may take to start: its node may have to read Python's packages from a slow disk."""
CLIENT_SERVER_FAILED = "Starting Ray client server failed"
"""What a head says whose fork of a server for us has died: its gRPC threads and the fork got in each other's way."""
CLIENT_SERVER_ATTEMPTS = 3
OBJECT_STORE_BYTES = 2**30
"""Shared memory of a cluster that a run starts for itself: messages to engines pass through it, one at a time."""
PASSED_ON = ("PYTHONPATH", "SAPO_", "HF_", "OMP_", "MKL_", "KMP_", "CUBLAS_", "NCCL_", "TORCH_", "TOKENIZERS_")
"""Environment variables of the driver that its processes get, by how they begin."""


class RayCluster:
    """A cluster, with room reserved for the processes of one run.

    Args:
        address: see `ClusterConfig.address`.
        room: resources of each process, as in {"CPU": 1, "GPU": 1}.
        wait_seconds: how long the cluster may take to free or add them.
        own_gpu: reserve a GPU on the driver's node for the driver as well.

    Raises:
        ClusterError: Ray is not installed, the cluster does not answer, or it has no room. Nothing is left of it.
    """

    def __init__(
        self, address: str, room: Sequence[Mapping[str, float]], *, wait_seconds: float, own_gpu: bool = False
    ) -> None:
        require_ray()
        self._environment = _passed_on()
        self._closes = _connect(address, sum(int(r.get("CPU", 0)) for r in room))
        try:
            self.host = _own_address(address)
            self._own = [_room_here(self.host)] if own_gpu else []
            everything = [*self._own, *map(dict, room)]
            self._group: Any = _reserve(everything, address, wait_seconds) if everything else None
            self.own_device = f"cuda:{self._own_gpu()}" if own_gpu else None
        except BaseException:
            self.close()
            raise

    def start(self, place: int, name: str, log: Path | None = None) -> Hosted:
        """Start a process in the room that was reserved for it, as the first in it or after one that died.

        Args:
            place: in `room`.
            name: for messages.
            log: file that takes what it prints.
        """
        return Hosted(self._actor(len(self._own) + place, name), name, log)

    def _actor(self, bundle: int, name: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from sapo.utils.hosted import HostedProcess

        room = self._group.bundle_specs[bundle]
        options = ray.remote(concurrency_groups={"beside": 1})(HostedProcess).options(
            num_cpus=room.get("CPU", 0),
            num_gpus=room.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
            runtime_env={"env_vars": self._environment},
        )
        return options.remote(name)

    def _own_gpu(self) -> int:
        """Return which of the driver's CUDA devices is the one that Ray has reserved for it."""
        self._holder = Hosted(self._actor(0, "the driver's GPU"), "the driver's GPU", None)
        given = self._holder.gpus()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        return seen.split(",").index(given) if seen else int(given)

    def close(self) -> None:
        """End all processes that were started, give back the room, and leave the cluster, or end one of our own."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if (group := getattr(self, "_group", None)) is not None:
            with suppress(Exception):  # of a cluster that is gone
                remove_placement_group(group)
            self._group = None
        if self._closes:
            self._closes = False
            with _handlers_kept():
                ray.shutdown()


class Hosted:
    """A process on a node, as the driver sees it. Others may be started before it is waited for."""

    def __init__(self, actor: Any, name: str, log: Path | None) -> None:
        self.name = name
        self.log = log
        self._actor = actor
        self._whereabouts = actor.whereabouts.remote()
        self._run: Any = None

    def wait_until_started(self) -> str | None:
        """Wait until it has started; return what went wrong, if it has not.

        Raises:
            ClusterError: its node does not reach the directory of its log.
        """
        import ray

        try:
            self.node, self.process = ray.get(self._whereabouts, timeout=START_SECONDS)
            if self.log is not None:
                self.log_to(self.log)
        except (ray.exceptions.RayError, ChildProcessError) as error:
            return f"{self.name} did not start on the cluster: {_reason(error) or first_line(error)}"
        return None

    def log_to(self, log: Path) -> None:
        """Have it print to a file from now on.

        Raises:
            ClusterError: its node does not reach the file's directory.
            ChildProcessError: the process is gone.
        """
        import ray

        self.log = log
        told = self._actor.log_to.remote(str(log.absolute()))
        try:
            reached = ray.get(told, timeout=START_SECONDS)
        except ray.exceptions.RayError as error:
            raise ChildProcessError(first_line(error)) from error
        if not reached:
            raise ClusterError(
                f"the run's directory must be reachable under one path from every node; node {self.node} has no "
                f"{log.absolute().parent}; put run_dir on a file system that all nodes share"
            )

    def gpus(self) -> str:
        """Return the CUDA devices that Ray has given to it, as in CUDA_VISIBLE_DEVICES."""
        import ray

        found: str = ray.get(self._actor.gpus.remote(), timeout=START_SECONDS)
        return found

    def run(self, target: str, *arguments: Any) -> None:
        """Begin to call a function there, named as module:function. Arguments are numbers and text."""
        self._run = self._actor.run.remote(target, *arguments)

    def build(self, target: str) -> None:
        """Make the object there that answers `call`, of a class named as module:class."""
        self._run = self._actor.build.remote(target)

    def call(self, number: int, *data: bytes) -> None:
        """Begin a call of that object, which `answer` waits for."""
        self._run = self._actor.call.remote(number, *data)

    def answer(self, seconds: float) -> tuple[bytes, ...] | None:
        """Return what the last call has given, None if it has not ended within some seconds.

        Raises:
            ChildProcessError: the process is gone, or the call has failed; the message says which.
        """
        import ray

        if not ray.wait([self._run], timeout=seconds)[0]:
            return None
        if (how := self._failure()) is not None:
            raise ChildProcessError(how)
        found: tuple[bytes, ...] = ray.get(self._run)
        return found

    def stop(self, number: int) -> None:
        """Ask the object to leave its work at a call."""
        self._actor.stop.remote(number)

    def ended(self) -> str | None:
        """Return how it ended, None while it lives and calls."""
        import ray

        if self._run is None or not ray.wait([self._run], timeout=0)[0]:
            return None
        return self._failure() or f"{self.described} ended"

    @property
    def described(self) -> str:
        """Name it for a message."""
        return f"{self.name} (process {self.process} on node {self.node})"

    def _failure(self) -> str | None:
        """Return how a call that has ended failed, None for one that did not."""
        import ray

        try:
            ray.get(self._run)
        except ray.exceptions.RayTaskError as error:
            return f"{self.described} failed: {first_line(error.cause)}"
        except ray.exceptions.RayActorError as error:
            return f"{self.described} died{' with its node' if 'node' in _reason(error) else ''}"
        except ray.exceptions.RayError as error:
            return f"{self.described} was ended by Ray: {first_line(error)}"
        return None

    def wait(self, seconds: float) -> None:
        """Wait until its call has ended, at most so many seconds."""
        import ray

        if self._run is not None:
            ray.wait([self._run], timeout=seconds)

    def kill(self) -> None:
        """End it at once."""
        import ray

        ray.kill(self._actor)


def require_ray() -> None:
    """Refuse a machine without Ray.

    Raises:
        ClusterError: the way out.
    """
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:  # a directory that is called ray is a package without an origin
        raise ClusterError(
            "cluster.kind=ray needs the package ray, which is not installed; pip install 'sapo-rl[ray]', or set "
            "cluster.kind=none"
        )


def use_interface_of(address: str) -> None:
    """Have gloo speak over the network interface with this address, unless told otherwise."""
    for name, found in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def use_interface_towards(host: str, port: int) -> None:
    """Have gloo speak over the network interface that reaches a listening port, unless told otherwise."""
    use_interface_of(_address_towards(host, port))


def _address_towards(host: str, port: int) -> str:
    with closing(socket.create_connection((host, port), PROBE_SECONDS)) as connection:
        return str(connection.getsockname()[0])


def _connect(address: str, cpus: int) -> bool:
    """Join a cluster, or start one; return whether it is for us to leave.

    Raises:
        ClusterError: it does not answer, or refuses us.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run reports to nobody
    import ray

    if ray.is_initialized():  # by a program that calls us
        return False
    given = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    _probe(given)
    # The CPUs of a cluster of our own are as many as it is asked for: ranks share the cores of one machine anyway.
    own: dict[str, Any] = {
        "num_cpus": max(os.cpu_count() or 1, cpus),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    for _ in range(CLIENT_SERVER_ATTEMPTS):
        try:
            with _handlers_kept():
                ray.init(address=given, **quiet, **(own if given == "local" else {}))
            return True
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            said, cause = " ".join(str(error).split()) or type(error).__name__, error
        if CLIENT_SERVER_FAILED not in said:
            raise ClusterError(
                f"no Ray cluster answers at cluster.address={address}: {said}; start one with `ray start "
                "--head`, or set cluster.address=local for one of this machine"
            ) from cause
    raise ClusterError(
        f"cluster.address={address} answers, and failed {CLIENT_SERVER_ATTEMPTS} times to start a client server for "
        "this machine; start its head with GRPC_ENABLE_FORK_SUPPORT=0 in the environment, or submit the run as a job"
    ) from cause


def _probe(address: str) -> None:
    """Refuse an address of a cluster that takes no connections."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"cluster.address must be that of a Ray cluster; {address} does not answer ({first_line(error)}); start "
            "one with `ray start --head`, or set cluster.address=local for one of this machine"
        ) from error


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keep our handlers of signals, which Ray would replace: a run that is told to stop writes a checkpoint first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _own_address(address: str) -> str:
    """Return the driver's address in the network of the cluster."""
    import ray

    if not address.startswith("ray://"):
        return str(ray.util.get_node_ip_address())
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return _address_towards(host, int(port))


def _room_here(host: str) -> dict[str, float]:
    return {"GPU": 1, f"node:{host}": 0.001}


def _reserve(room: list[dict[str, float]], address: str, wait_seconds: float) -> Any:
    """Reserve room for all processes at once.

    Raises:
        ClusterError: there is none within the time; what is needed and what there is.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(room, strategy="PACK")
    if group.wait(wait_seconds):
        return group
    has, free = ray.cluster_resources(), ray.available_resources()
    remove_placement_group(group)
    needed = {kind: sum(r.get(kind, 0) for r in room) for kind in ("GPU", "CPU")}
    raise ClusterError(
        f"the run needs {_amounts(needed)} for its processes; the Ray cluster at {address} has {_amounts(has)}, of "
        f"which {_amounts(free)} are free{_of_the_driver(room)}; ask for less, or raise cluster.wait_seconds "
        f"({wait_seconds:g})"
    )


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(kind, 0):g} {kind}s" for kind in ("GPU", "CPU"))


def _of_the_driver(room: list[dict[str, float]]) -> str:
    pinned = any(key.startswith("node:") for key in room[0])
    return ", and one GPU must be on the driver's own node" if pinned else ""


def _passed_on() -> dict[str, str]:
    found = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    if "PYTHONPATH" in found:
        paths = [str(Path(entry).absolute()) for entry in found["PYTHONPATH"].split(os.pathsep) if entry]
        found["PYTHONPATH"] = os.pathsep.join(paths)
    return found


def _reason(error: Exception) -> str:
    """Return the line of Ray's message that says why an actor is dead."""
    lines = [line for line in str(error).splitlines() if "dead because" in line or "died because" in line]
    return lines[0].split(".")[0] if lines else ""
