"""The processes of a peer under accelerate, asked for FSDP2: the side itself is rank 0, and starts the others.

On CPUs accelerate 1.15 does not heed that, and wraps the model in DDP.

What `accelerate launch` sets in the environment is set here, since a side is a process that the parent speaks to.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from typing import Any

from bench.sides.serve import Commands

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2` says, with every layer of the decoder sharded by itself."""


class SharedCommands(Commands):
    """The parent's commands on every rank: rank 0 reads and answers, the others are told.

    Args:
        of_first: rank 0's own end of the wire.
    """

    def __init__(self, of_first: Commands, rank: int) -> None:
        self._first, self._rank = of_first, rank
        self.settings = of_first.settings

    def imported(self) -> None:
        """See `Commands.imported`."""
        if self._rank == 0:
            self._first.imported()

    def ready(self, **about: Any) -> None:
        """See `Commands.ready`."""
        if self._rank == 0:
            self._first.ready(**about)

    def __next__(self) -> str:
        import torch.distributed as dist

        told: list[str | None] = [next(self._first, None) if self._rank == 0 else None]
        dist.broadcast_object_list(told, src=0)
        if told[0] is None:
            raise StopIteration
        return told[0]

    def reply(self, seconds: float, work: float, **facts: Any) -> None:
        """See `Commands.reply`."""
        if self._rank == 0:
            self._first.reply(seconds, work, **facts)


def join_ranks(commands: Commands) -> Commands:
    """Start the other ranks if this is the first, and join them; return commands that all of them hear."""
    import torch.distributed as dist

    size = commands.settings["ranks"]
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ |= FSDP | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if commands.settings["device"] == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        for rank in range(size):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if rank:
                subprocess.Popen([sys.executable, "-m", "bench.sides", *sys.argv[1:]], stdin=subprocess.DEVNULL)
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    if not dist.is_initialized():
        backend = "gloo" if commands.settings["device"] == "cpu" else "nccl"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return SharedCommands(commands, int(os.environ["RANK"]))
