"""Start the engine of a run where its recipe says: in the run's process, in a thread of it, or in a child process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sapo.config import RunConfig
from sapo.model.policy import Policy
from sapo.rollout.engine import Engine
from sapo.rollout.local.twin import Twin
from sapo.rollout.registry import make_engine, prove_engine
from sapo.rollout.remote.building import check_describable, hello_message
from sapo.rollout.remote.channel import Channel
from sapo.rollout.remote.engine import RemoteEngine
from sapo.rollout.remote.process import ProcessChannel


def start_engine(
    config: RunConfig,
    policy: Policy,
    on_restart: Callable[[str], None] = lambda _: None,
    channels: Sequence[Channel] | None = None,
) -> Engine:
    """Start the engine that `rollout.engine` names, where `rollout.run_in` says.

    Args:
        on_restart: given a sentence on what died, each time an engine is started again.
        channels: to engines that were started on a cluster; None for an engine on this machine.

    Raises:
        ConfigError, ModelError: it cannot run this model there.
        EngineError: its process ended while it started.
    """
    prove_engine(policy, config.rollout)
    match config.rollout.run_in:
        case "driver":
            return make_engine(policy, config.rollout)
        case "thread" if config.rollout.servers is not None:
            return make_engine(policy, config.rollout)  # its weights are copies already
        case "thread":
            # Modules of its own: training puts hooks on those of the policy, and takes them off, as it draws.
            return make_engine(Twin(policy).policy, config.rollout)
    check_engine_policy(config, policy)
    return RemoteEngine(
        channels or [ProcessChannel(0)],
        hello_message(policy, config.rollout),
        timeout=config.rollout.timeout,
        max_restarts=config.train.max_restarts,
        on_restart=on_restart,
        way_out=f"`sapo resume {config.run_dir}` goes on from the newest checkpoint",
    )


def check_engine_policy(config: RunConfig, policy: Policy) -> None:
    """Refuse a model that the engine's process cannot build.

    Raises:
        ConfigError: it brings code of its own.
    """
    if config.rollout.run_in == "process":
        check_describable(config, policy)


def log_to(engine: Engine, directory: Path) -> None:
    """Have what an engine's process prints go to a directory: engines/ of the run."""
    if isinstance(engine, RemoteEngine):
        for channel in engine.channels:
            channel.log_to(directory)
