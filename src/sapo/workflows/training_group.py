"""The processes of a training group: started with the run on one machine, or by torchrun on any number.

The process that a person started, or rank 0 of torchrun, is the driver. The others build the model without weights, are
sent their slices of the driver's, and serve (`sapo.training.ranked`). They write what they print to `ranks/NN.log` in
the run's directory, and end when the driver does, however it ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sapo.config import RunConfig
from sapo.config.recipes import parse_recipe
from sapo.diagnostics.measure import Diagnosis
from sapo.errors import ConfigError, RankError, RunFailure
from sapo.model.context import check_heads
from sapo.model.policy import Policy
from sapo.model.sharding import receive_weights
from sapo.model.skeleton import buffers, build, describe, set_buffers
from sapo.run.trainers import make_rank, trainer_settings
from sapo.training.collective import Collective
from sapo.training.ranked import RankedTrainers, serve
from sapo.training.trainer import Trainer
from sapo.training.wire import Message, Wire
from sapo.utils.text import first_line

STARTED_BY_US = "SAPO_RANK_OF_PORT"
"""In the environment of a rank that was started with the run: "RANK SIZE PORT"."""

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others within one call: longer than any pass over a micro-batch."""
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
    if started is not None and train.ranks not in (1, started):
        raise ConfigError(
            f"train.ranks must be the number of processes that torchrun starts; got {train.ranks} and {started}; leave "
            "train.ranks out"
        )
    if started is None and config.device.startswith("cuda") and train.ranks > torch.cuda.device_count():
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
    settings, sharing = policy.model.config, config.train.context_parallel
    heads = settings.num_attention_heads
    problem = check_heads(heads, getattr(settings, "num_key_value_heads", None) or heads, sharing)
    if sharing > 1 and problem is not None:
        raise ConfigError(f"train.context_parallel={sharing} does not fit the model: {problem}; use a divisor")


def start_trainers(
    config: RunConfig, directory: Path, policy: Policy, reference: Policy | None
) -> RankedTrainers | None:
    """Start or join the training group of a run and shard its policy; None where one process trains.

    Args:
        config: with its ranks, threads and device resolved.
        directory: of the run.
        policy: the driver's own, whose weights training begins with.
        reference: likewise of the reference.
    """
    size = config.train.ranks
    if size == 1:
        return None
    processes = None if torchrun_ranks() else RankProcesses(size, directory)

    def first_failure(error: Exception) -> str | None:
        return processes.first_failure() if processes is not None else _lost_connection(error)

    try:
        if processes is not None:
            processes.wait_until_ready()
        ranks, wire = _join(0, size, None if processes is None else processes.store)
        setup = _setup(config, policy, reference)
        for rank in range(1, size):
            wire.send(setup, rank)
        own = _make_rank(config, setup, ranks, [p for p in (policy, reference) if p is not None])
    except BaseException as error:
        failure = (
            first_failure(error) if isinstance(error, RuntimeError) and not isinstance(error, RunFailure) else None
        )
        if processes is not None:
            processes.end(0.0)
        if dist.is_initialized():  # or the ranks could not be started again
            dist.destroy_process_group()
        if failure is not None:
            raise RankError(failure) from error
        raise

    def end() -> None:
        if processes is not None:
            processes.end(ENDING_SECONDS)
        dist.destroy_process_group()

    return RankedTrainers(own, wire, policy, first_failure=first_failure, on_close=end)


class RankProcesses:
    """The other ranks of a group, as child processes of the driver on this machine.

    Args:
        size: ranks, the driver's own counted.
        directory: of the run; ranks/NN.log in it takes what they print.
    """

    def __init__(self, size: int, directory: Path) -> None:
        _use_loopback()
        self.store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        self._logs = directory / "ranks"
        self._logs.mkdir(exist_ok=True)
        self._processes = {rank: self._start(rank, size) for rank in range(1, size)}

    def _start(self, rank: int, size: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, STARTED_BY_US: f"{rank} {size} {self.store.port}", "LOCAL_RANK": str(rank)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with self._log(rank).open("ab") as log:
            # In a session of its own, a Ctrl-C in the terminal is the driver's to answer. Its standard input is a pipe
            # that nobody writes to: it closes when the driver ends, however that is.
            return subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until every process has been imported and is about to join.

        Raises:
            RankError: one has ended before that; joining would wait for it in vain.
        """
        waiting = set(self._processes)
        while waiting:
            if any(process.poll() is not None for process in self._processes.values()):
                raise RankError(self.first_failure())
            waiting = {rank for rank in waiting if not self.store.check([_ready(rank)])}
            time.sleep(0.02)

    def first_failure(self) -> str | None:
        """Return what happened to the first rank that ended, None where all live; it may take a moment to be seen."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            for rank, process in self._processes.items():
                if (code := process.poll()) is not None:
                    return f"rank {rank} (process {process.pid}) {_how_it_ended(code)}; {self._last_words(rank)}"
            time.sleep(0.05)
        return None

    def end(self, seconds: float) -> None:
        """Wait for the processes to end, and end those that have not after some seconds."""
        deadline = time.monotonic() + seconds
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()

    def _log(self, rank: int) -> Path:
        return self._logs / f"{rank:02d}.log"

    def _last_words(self, rank: int) -> str:
        lines = [line for line in self._log(rank).read_text(errors="replace").splitlines() if line.strip()]
        return f"{self._log(rank)} ends with: {lines[-1].strip()}" if lines else f"{self._log(rank)} is empty"


def serve_rank() -> None:
    """Be a rank other than the driver's, until the driver ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # whether a run stops is the driver's to say
    rank, size, store = _own_place()
    ranks, wire = _join(rank, size, store)
    message = wire.receive(0)
    assert message.header["call"] == "setup", f"the first call is setup, not {message.header['call']!r}"
    sys.path += [entry for entry in message.header["path"] if entry not in sys.path]
    config = parse_recipe(message.header["config"])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    trainer = _make_rank(config, message, ranks, None)
    serve(trainer, wire, Diagnosis(config, trainer_settings(config).objective).objectives)
    dist.destroy_process_group()


def _setup(config: RunConfig, policy: Policy, reference: Policy | None) -> Message:
    """Return the first message: all that a rank is built from."""
    built = {name: p for name, p in (("policy", policy), ("reference", reference)) if p is not None}
    return Message(
        {
            "call": "setup",
            "config": config.model_dump(mode="json"),
            "path": sys.path,
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


def _own_place() -> tuple[int, int, dist.Store | None]:
    """Return rank and size of this process, and the store to meet the others at (None: torchrun's)."""
    if STARTED_BY_US not in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _use_loopback()
    rank, size, port = map(int, os.environ[STARTED_BY_US].split())
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    store.set(_ready(rank), "")
    return rank, size, store


def _ready(rank: int) -> str:
    return f"ready/{rank}"


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the driver has ended
    time.sleep(ENDING_SECONDS)
    os._exit(1)


def _join(rank: int, size: int, store: dist.Store | None) -> tuple[Collective, Wire]:
    if dist.is_initialized():
        raise ConfigError(
            "train.ranks makes a process group of its own; this process has one already; call "
            "torch.distributed.destroy_process_group first"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if store is None:  # torchrun's, from the environment
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, store=store, rank=rank, world_size=size)
    group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    calls = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
    return Collective(rank, size, group), Wire(calls)


def _on_own_device(config: RunConfig) -> RunConfig:
    if not config.device.startswith("cuda"):
        return config
    place = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(place)
    return config.model_copy(update={"device": f"cuda:{place}"})


def _use_loopback() -> None:
    """Have gloo speak over the loopback interface, unless told otherwise: a host's own name may not resolve."""
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _lost_connection(error: Exception) -> str | None:
    """Return the message of an error of a collective, None for any other."""
    signs = ("Connection closed", "Connection reset", "Read error", "Broken pipe", "Timed out", "NCCL")
    return f"a rank was lost: {first_line(error)}" if any(sign in str(error) for sign in signs) else None


if __name__ == "__main__":
    serve_rank()
