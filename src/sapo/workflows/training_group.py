"""The processes of a training group: started with the run on one machine, on a Ray cluster, or by torchrun.

The process that a person started, or rank 0 of torchrun, is the driver. The others build the model without weights, are
sent their slices of the driver's, and serve (`sapo.training.ranked`). They write what they print to `ranks/NN.log` in
the run's directory, and end when the driver does, however it ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sapo.config import RunConfig
from sapo.config.recipes import parse_recipe
from sapo.data.messages import Message
from sapo.diagnostics.measure import Diagnosis
from sapo.errors import ConfigError, RankError, RunFailure
from sapo.model.context import check_heads
from sapo.model.policy import Policy
from sapo.model.sharding import receive_weights
from sapo.model.skeleton import buffers, build, describe, set_buffers
from sapo.run.trainers import make_rank, trainer_settings
from sapo.training.collective import Collective
from sapo.training.heartbeat import Progress
from sapo.training.ranked import RankedTrainers, serve
from sapo.training.trainer import Trainer
from sapo.training.wire import Wire
from sapo.utils.ray_cluster import RayCluster, use_interface_towards
from sapo.utils.signals import STOPPING, ignore
from sapo.utils.text import first_line
from sapo.workflows.rank_processes import (
    STARTED_BY_US,
    Place,
    RankProcesses,
    StartedRanks,
    is_lost_connection,
    ready_key,
    use_loopback,
)
from sapo.workflows.rank_watch import clear_beats, ranks_directory, watch_driver, watch_ranks
from sapo.workflows.ray_ranks import RayRanks

JOIN_TIMEOUT = timedelta(seconds=30)
"""How long ranks that have said they are there wait for each other to connect."""
COLLECTIVE_TIMEOUT = timedelta(days=1)
"""How long a rank waits for the others within one call. Heartbeats notice a rank that is lost long before."""
IDLE_TIMEOUT = timedelta(days=30)
"""How long a rank waits for the next call: the driver samples and evaluates in between. A driver that ends is noticed
at once, by the connection."""
ENDING_SECONDS = 10.0
"""How long the driver waits for ranks that were told to end, before it ends them."""


def torchrun_ranks() -> int | None:
    """Return how many processes torchrun has started, None without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def is_other_rank() -> bool:
    """Return whether this is one of torchrun's processes that serve the driver."""
    return (torchrun_ranks() or 1) > 1 and os.environ["RANK"] != "0"


def resolve_ranks(config: RunConfig) -> RunConfig:
    """Take the number of ranks from torchrun where it started this process.

    Raises:
        ConfigError: the recipe asks for another number; ranks for which the machine has no device; replicas that do not
            divide them.
    """
    started, train = torchrun_ranks(), config.train
    if started is not None and config.cluster.kind == "ray":
        raise ConfigError(
            "cluster.kind=ray starts the ranks of a run itself; got a process of torchrun; start it with `sapo train`"
        )
    if started is not None and train.ranks not in (1, started):
        raise ConfigError(
            f"train.ranks must be the number of processes that torchrun starts; got {train.ranks} and {started}; leave "
            "train.ranks out"
        )
    on_this_machine = started is None and config.cluster.kind == "none"
    if on_this_machine and config.device.startswith("cuda") and train.ranks > torch.cuda.device_count():
        raise ConfigError(
            f"train.ranks must not exceed the machine's CUDA devices; got {train.ranks} of "
            f"{torch.cuda.device_count()}; lower it, or start the run with torchrun on several machines"
        )
    ranks = started or train.ranks
    if ranks % train.replicas:
        raise ConfigError(
            f"train.replicas must divide the number of ranks; got {train.replicas} and {ranks}; leave it out to shard "
            "over all ranks"
        )
    if ranks % train.context_parallel:
        raise ConfigError(
            f"train.context_parallel must divide the number of ranks; got {train.context_parallel} and {ranks}; leave "
            "it out, or start more ranks"
        )
    if train.context_parallel > 1 and config.model.routing_replay:
        raise ConfigError(
            f"train.context_parallel={train.context_parallel} cannot go with model.routing_replay, whose records are "
            "of whole micro-batches; set model.routing_replay=false, or leave context_parallel out"
        )
    return config.model_copy(update={"train": train.model_copy(update={"ranks": ranks})})


def check_ranks(config: RunConfig, policy: Policy) -> None:
    """Refuse a model that the ranks of a group cannot build.

    Raises:
        ConfigError: it brings code of its own, or its attention heads cannot be shared.
    """
    if config.train.ranks > 1 and not type(policy.model).__module__.startswith("transformers."):
        raise ConfigError(
            f"train.ranks={config.train.ranks} needs a model of transformers' own, which every rank builds from its "
            f"config; got {type(policy.model).__name__}, which brings code of its own; use train.ranks=1"
        )
    settings, sharing = policy.model.config.get_text_config(), config.train.context_parallel
    if sharing == 1:
        return
    if policy.path == "rows":
        raise ConfigError(
            f"train.context_parallel={sharing} needs a model that runs on packed tokens; {type(policy.model).__name__} "
            f"runs in rows ({policy.path_reason}); set train.context_parallel=1"
        )
    heads = getattr(settings, "num_attention_heads", 1)  # Mamba-2 attends nowhere, and is refused for its states
    kv_heads = getattr(settings, "num_key_value_heads", None) or heads
    problem = check_heads(heads, kv_heads, sharing, policy.chunk_tokens > 0)
    if problem is not None:
        raise ConfigError(f"train.context_parallel={sharing} does not fit the model: {problem}")


def start_trainers(
    config: RunConfig,
    directory: Path,
    policy: Policy,
    reference: Policy | None,
    cluster: RayCluster | None = None,
) -> RankedTrainers | None:
    """Start or join the training group of a run and shard its policy; None where one process trains.

    Args:
        config: with its ranks, threads and device resolved.
        directory: of the run.
        policy: the driver's own, whose weights training begins with.
        reference: likewise of the reference.
        cluster: with room for the other ranks; None for processes of this machine, or torchrun's.
    """
    size = config.train.ranks
    if size == 1:
        return None
    progress = Progress()
    clear_beats(directory)
    processes = None if torchrun_ranks() else _start(config, directory, cluster)
    lose = (lambda *_: False) if processes is None else processes.lose
    heartbeat = watch_ranks(directory, config.train, progress, lose)

    def first_failure(error: Exception) -> str | None:
        found = None if processes is None else processes.first_failure()
        return found or (None if isinstance(processes, RankProcesses) else _lost_connection(error))

    def end(told: bool) -> None:
        heartbeat.close()
        if processes is not None:
            processes.end(ENDING_SECONDS if told else 0.0)
        if dist.is_initialized() and (told or processes is not None):  # or the ranks could not be started again
            dist.destroy_process_group()

    try:
        with progress.during("setup"):
            if processes is not None:
                processes.wait_until_ready()
            ranks, wire = _join(0, size, None if processes is None else processes.store, progress)
            setup = _setup(config, policy, reference, directory)
            for rank in range(1, size):
                wire.send(setup, rank)
            own = _make_rank(config, setup, ranks, [p for p in (policy, reference) if p is not None])
    except BaseException as error:
        failure = (
            first_failure(error) if isinstance(error, RuntimeError) and not isinstance(error, RunFailure) else None
        )
        end(told=False)
        if failure is not None:
            raise RankError(failure) from error
        raise

    return RankedTrainers(own, wire, policy, first_failure=first_failure, on_close=end)


def _start(config: RunConfig, directory: Path, cluster: RayCluster | None) -> StartedRanks:
    return RankProcesses(config, directory) if cluster is None else RayRanks(cluster, config, directory)


def serve_rank() -> None:
    """Be a rank other than the driver's, until the driver ends."""
    ignore(*STOPPING)  # whether a run stops is the driver's to say
    progress = Progress()
    place, store = _own_place(progress)
    if place is None:  # torchrun's
        ranks, wire = _join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None, progress)
    else:
        ranks, wire = _join(place.rank, place.size, store, progress)
    _serve(ranks, wire, progress, watching=place is not None)


def serve_hosted_rank(place: str) -> None:
    """Be a rank on a node of a Ray cluster, until the driver ends; Ray ends the process where it has not by itself.

    Args:
        place: a `Place`, as JSON.
    """
    os.environ["LOCAL_RANK"] = "0"  # it sees no device but its own
    found, progress = Place(**json.loads(place)), Progress()
    use_interface_towards(found.host, found.port)
    _serve(*_join(found.rank, found.size, _meet(found, progress), progress), progress, watching=True)


def _serve(ranks: Collective, wire: Wire, progress: Progress, *, watching: bool) -> None:
    """Serve the driver.

    Args:
        watching: this process gives signs of life already.
    """
    message = wire.receive(0)
    assert message.header["call"] == "setup", f"the first call is setup, not {message.header['call']!r}"
    sys.path += [entry for entry in message.header["path"] if entry not in sys.path]
    config = parse_recipe(message.header["config"])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if not watching:
        train, directory = config.train, Path(message.header["directory"])
        watch_driver(directory, ranks.rank, train.rank_timeout, train.stall_timeout, progress)
    with progress.during("setup"):
        trainer = _make_rank(config, message, ranks, None)
    serve(trainer, wire, Diagnosis(config, trainer_settings(config).objective).objectives)
    dist.destroy_process_group()


def _setup(config: RunConfig, policy: Policy, reference: Policy | None, directory: Path) -> Message:
    """Return the first message: all that a rank is built from."""
    built = {name: p for name, p in (("policy", policy), ("reference", reference)) if p is not None}
    return Message(
        {
            "call": "setup",
            "config": config.model_dump(mode="json"),
            "path": sys.path,
            "directory": str(ranks_directory(directory).absolute()),
            "built": {name: describe(p) for name, p in built.items()},
        },
        {f"{name}/{key}": tensor for name, p in built.items() for key, tensor in buffers(p).items()},
    )


def _make_rank(config: RunConfig, setup: Message, ranks: Collective, loaded: list[Policy] | None) -> Trainer:
    """Build, shard and fill the policies of this rank, and make its trainer. A collective.

    Args:
        loaded: on the driver, the policies whose weights all ranks are sent.
    """
    config = _on_own_device(config)
    built = {name: build(description) for name, description in setup.header["built"].items()}
    trainer = make_rank(config, built["policy"], built.get("reference"), ranks)
    for place, (name, policy) in enumerate(built.items()):
        prefix = f"{name}/"
        set_buffers(policy, {k.removeprefix(prefix): t for k, t in setup.tensors.items() if k.startswith(prefix)})
        receive_weights(policy, ranks.group, None if loaded is None else dict(loaded[place].weights()))
    return trainer


def _own_place(progress: Progress) -> tuple[Place | None, dist.Store | None]:
    """Return the place of this process and the store to meet the others at, and give signs of life.

    None of both for a rank of torchrun.
    """
    if STARTED_BY_US not in os.environ:
        return None, None
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_loopback()
    place = Place(**json.loads(os.environ[STARTED_BY_US]))
    return place, _meet(place, progress)


def _meet(place: Place, progress: Progress) -> dist.Store:
    """Give signs of life, and say at the driver's store that this rank is about to join; return the store."""
    watch_driver(Path(place.directory), place.rank, place.rank_timeout, place.stall_timeout, progress)
    store = dist.TCPStore(place.host, place.port, place.size, is_master=False)
    store.set(ready_key(place.rank), "")
    return store


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the driver has ended
    time.sleep(ENDING_SECONDS)
    os._exit(1)


def _join(rank: int, size: int, store: dist.Store | None, progress: Progress) -> tuple[Collective, Wire]:
    if dist.is_initialized():
        raise ConfigError(
            "train.ranks makes a process group of its own; this process has one already; call "
            "torch.distributed.destroy_process_group first"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if store is None:  # torchrun's, from the environment
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=JOIN_TIMEOUT, store=store, rank=rank, world_size=size)
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)
    group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    calls = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
    return Collective(rank, size, group, progress), Wire(calls)


def _on_own_device(config: RunConfig) -> RunConfig:
    if not config.device.startswith("cuda"):
        return config
    own = torch.device(config.device).index if config.cluster.kind == "ray" else None
    place = int(os.environ.get("LOCAL_RANK", own or 0))
    torch.cuda.set_device(place)
    return config.model_copy(update={"device": f"cuda:{place}"})


def _lost_connection(error: Exception) -> str | None:
    """Return the message of an error of a collective, None for any other."""
    return f"a rank was lost: {first_line(error)}" if is_lost_connection(str(error)) else None


if __name__ == "__main__":
    serve_rank()
