"""Make a finished run of a checked recipe: everything around the loop that starts, resumes and stops it.

The Python surface (`sapo.train`, `sapo.resume`) and the command line both come through here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sapo.config import RunConfig
from sapo.conformance.objective_laws import Judgement
from sapo.errors import (
    ClusterError,
    CollapseError,
    ConfigError,
    EngineError,
    NonFiniteError,
    ParityError,
    RankError,
    RunFailure,
    SelfCheckError,
    UserError,
)
from sapo.model.loading import load_policy
from sapo.model.policy import Policy
from sapo.objectives import is_plugin
from sapo.rollout.engine import Engine
from sapo.rollout.registry import check_engine
from sapo.rollout.remote.start import check_engine_policy, log_to, start_engine
from sapo.rollout.servers.engine import ServerEngine
from sapo.rollout.vllm.core import vllm_version
from sapo.run.directory import RunDirectory
from sapo.run.inputs import InputRecord, absolute_paths
from sapo.run.listener import Listener, Silent
from sapo.run.loggers.all import check_loggers
from sapo.run.loop import StopReason, TrainingRun
from sapo.run.machine import DECIDING_BITS, provenance, resolve_machine
from sapo.run.preflight import (
    check_objectives,
    check_prompts,
    limit_prompts,
    load_tasks,
    prompt_warnings,
    try_rewards,
)
from sapo.run.trainers import check_optimizer
from sapo.tasks import notices_of
from sapo.tasks.episodes.pool import close_hosts
from sapo.training.checkpoint import set_broken_aside
from sapo.workflows.cluster import engine_channels, joined_cluster
from sapo.workflows.coldstart import ColdStartProgress
from sapo.workflows.dry_run import DryRun, rehearse
from sapo.workflows.rank_watch import rank_table
from sapo.workflows.rehearsal import rehearse_saving
from sapo.workflows.resuming import Resuming, coldstart_directory
from sapo.workflows.shortage import shortage
from sapo.workflows.start import check_same_tokens, reference_policy, starting_policy, train_vision
from sapo.workflows.training_group import (
    check_ranks,
    is_other_rank,
    resolve_ranks,
    serve_rank,
    start_trainers,
    torchrun_ranks,
)


@dataclass(frozen=True)
class Run:
    """What `train` and `resume` return."""

    directory: Path
    config: RunConfig
    summary: dict[str, Any]
    stopped: StopReason | None
    """None when the run reached its last step."""


def train(
    config: RunConfig,
    *,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_coldstart: Callable[[ColdStartProgress], None] = lambda _: None,
) -> Run:
    """Run a recipe from its start.

    Args:
        config: from `load_recipe`.
        listener: receives the progress.
        should_stop: asked wherever the run can stop without loss; when it returns true a checkpoint is written.
        on_coldstart: called with each evaluation while the starting model is made, if the cache has none.

    Raises:
        ConfigError, ModelError, TaskError: the recipe cannot be run; nothing was written.
        NonFiniteError, CollapseError, ParityError, RankError, EngineError, SelfCheckError: the run stopped itself; the
            message, which failure.json keeps, names the cause and the way out.
    """
    _serve_if_other_rank()
    if config.run_dir is None:
        raise ConfigError("run_dir must be given for a recipe that has no file to take its name from; got null")
    first = partial(_train, config, Path(config.run_dir), listener, should_stop, on_coldstart)
    return _with_restarts(first, config.run_dir, listener, should_stop)


def _train(
    config: RunConfig,
    run_dir: Path,
    listener: Listener | None,
    should_stop: Callable[[], bool],
    on_coldstart: Callable[[ColdStartProgress], None],
) -> Run:
    RunDirectory.check_free(run_dir)
    config = resolve_ranks(resolve_machine(absolute_paths(config)))
    check_loggers(config)
    check_engine(config)
    check_optimizer(config)
    check_objectives(config, _warn_of_design(listener or Silent()))
    with ExitStack() as opened:  # all that was opened is closed, last to first, even where closing one of them fails
        config, cluster = opened.enter_context(joined_cluster(config))
        tasks = load_tasks(config)
        try_rewards(tasks)
        policy = starting_policy(config, on_coldstart, should_stop)
        limit_prompts(policy, tasks)
        check_prompts(config, policy, tasks)
        rehearse_saving(policy)
        warn = (listener or Silent()).warning
        for text in (*notices_of(tasks.train), *prompt_warnings(config, policy, tasks)):
            warn(text)
        reference = reference_policy(config, should_stop)
        check_same_tokens(policy, reference)
        check_ranks(config, policy)
        engine = opened.enter_context(closing(start_engine(config, policy, warn, engine_channels(config, cluster))))
        for text in policy.notices:
            warn(text)
        inputs = InputRecord.of(config, policy, tasks.train, coldstart_directory(config))
        directory = RunDirectory.create(config.model_copy(update={"provenance": _provenance(config)}), inputs)
        opened.enter_context(closing(directory))
        _begin(engine, config, directory, listener or Silent())
        trainers = start_trainers(config, directory.path, policy, reference, cluster)
        if trainers is not None:
            opened.enter_context(closing(trainers))
        return _run_to_its_end(
            TrainingRun(config, directory, policy, tasks, None, listener, should_stop, reference, engine, trainers)
        )


def dry_run(config: RunConfig, *, on_judged: Callable[[Judgement], None] = lambda _: None) -> DryRun:
    """Load and check everything a run would, and describe what it would do; nothing is written.

    Args:
        config: from `load_recipe`.
        on_judged: given the verdicts of the conformance laws on each objective of the user's own, before it is refused.

    Raises:
        ConfigError, ModelError, TaskError: the recipe cannot be run.
    """
    config = resolve_ranks(resolve_machine(config))
    if config.run_dir is not None:
        RunDirectory.check_free(Path(config.run_dir))
    check_loggers(config)
    check_engine(config)
    check_optimizer(config)
    check_objectives(config, on_judged)
    with joined_cluster(config):
        pass
    return rehearse(
        config,
        load=_policy_of_a_dry_run,
        load_reference=lambda c: reference_policy(c, lambda: False),
    )


def _policy_of_a_dry_run(config: RunConfig) -> Policy:
    policy = starting_policy(config, lambda _: None, lambda: False)
    check_ranks(config, policy)
    check_engine_policy(config, policy)
    return policy


def resume(
    run: str | Path,
    overrides: list[str] | None = None,
    *,
    accept_changes: Sequence[str] = (),
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Resume a run from its newest whole checkpoint; on the same machine it continues bit for bit.

    Args:
        run: the run directory.
        overrides: `key=value` for the few settings that may change in mid-run (`train.steps`, ...).
        accept_changes: keys of settings and files that have changed since the run began, to go on with as they are.

    Raises:
        ConfigError: not a run directory; an override that would make it another run; or rows, models, modules or
            settings in its config.yaml that have changed and are not accepted.
    """
    _serve_if_other_rank()
    first = partial(_resume, str(run), overrides or [], accept_changes, listener, should_stop)
    return _with_restarts(first, run, listener, should_stop)


def _resume(
    run: str,
    overrides: list[str],
    accepted: Sequence[str],
    listener: Listener | None,
    should_stop: Callable[[], bool],
) -> Run:
    with ExitStack() as opened:
        directory, config = RunDirectory.open(run)
        opened.enter_context(closing(directory))
        resuming = Resuming(run, directory, config, overrides, accepted, listener or Silent())
        return _run_to_its_end(_resumed(opened, resuming, should_stop))


def _resumed(opened: ExitStack, resuming: Resuming, should_stop: Callable[[], bool]) -> TrainingRun:
    """Make the run at its newest whole checkpoint; its files change only when nothing can be refused any more.

    Args:
        opened: closes what is opened here.
    """
    directory, listener = resuming.directory, resuming.listener
    config = resolve_ranks(resolve_machine(resuming.overridden()))
    _warn_of_another_machine(config, listener)
    check_loggers(config)
    check_engine(config)
    check_optimizer(config)
    check_objectives(config, _warn_of_design(listener))
    config, cluster = opened.enter_context(joined_cluster(config))
    tasks = load_tasks(config)
    checkpoint, state = resuming.newest_checkpoint(config)
    resuming.check_inputs(config, tasks.train, checkpoint)
    resuming.check_pictures(checkpoint, state)
    if checkpoint is None:
        listener.warning(f"{resuming.run} has no checkpoint yet: the run starts over from its first step")
        policy = starting_policy(config, lambda _: None, should_stop)
    else:
        listener.resumed(checkpoint)
        policy = load_policy(
            checkpoint.path,
            config.model.dtype,
            config.device,
            trust_remote_code=config.model.trust_remote_code,
            text_only=not config.model.vision.load,
        )
        train_vision(config, policy)
    resuming.check_model(policy, checkpoint, state)
    limit_prompts(policy, tasks)
    reference = reference_policy(config, should_stop)
    check_same_tokens(policy, reference)
    check_ranks(config, policy)
    engine = opened.enter_context(
        closing(start_engine(config, policy, listener.warning, engine_channels(config, cluster)))
    )
    for text in policy.notices:
        listener.warning(text)
    _begin(engine, config, directory, listener)
    trainers = start_trainers(config, directory.path, policy, reference, cluster)
    if trainers is not None:
        opened.enter_context(closing(trainers))
    training = TrainingRun(config, directory, policy, tasks, state, listener, should_stop, reference, engine, trainers)
    if checkpoint is not None:
        training.trainer.restore_optimizer(checkpoint.path)
    directory.rewind(state.metrics_bytes if state else 0, state.step if state else 0)
    set_broken_aside(directory.checkpoints, checkpoint)
    resuming.write(config)
    return training


def _begin(engine: Engine, config: RunConfig, directory: RunDirectory, listener: Listener) -> None:
    """Start what an engine needs beside this process, and have its logs go to the run's directory."""
    log_to(engine, directory.path / "engines")
    if isinstance(engine, ServerEngine):
        try:
            engine.begin(directory.path / "engines", config.train.max_restarts, config.train.ranks, listener.warning)
        except EngineError as error:
            directory.write_failure(str(error))
            raise


def _serve_if_other_rank() -> None:
    """Serve the driver and end this process, if torchrun started it as another rank."""
    if is_other_rank():
        serve_rank()
        raise SystemExit(0)


def _provenance(config: RunConfig) -> dict[str, Any]:
    """Return versions, commit and machine, the name of an objective that is the user's own, and the version of vLLM.

    A report has the name of the objective from here: it imports no module that a run directory names.
    """
    own = {"objective": config.objective.make().name} if is_plugin(config.objective.name) else {}
    here = config.rollout.engine == "vllm" and config.rollout.servers is None
    engine = {"vllm": vllm_version()} if here else {}
    return provenance(config.device) | own | engine


def _warn_of_design(listener: Listener) -> Callable[[Judgement], None]:
    """Return a function that warns of broken laws which no run relies on."""

    def warn(judged: Judgement) -> None:
        for verdict in judged.broken_by_design:
            listener.warning(
                f"objective {judged.name} breaks the law {verdict}; the run goes on, for it does not rely on this law"
            )

    return warn


def _warn_of_another_machine(config: RunConfig, listener: Listener) -> None:
    """Warn where machine or versions changed: bit for bit holds only on one machine with one set of versions."""
    before, now = config.provenance or {}, provenance(config.device)
    for key in DECIDING_BITS:
        if key in before and before[key] != now.get(key):
            listener.warning(
                f"{key}: {before[key]} before, {now.get(key)} now: the run is resumed, but not bit for bit"
            )


def _with_restarts(
    first: Callable[[], Run], directory: str | Path, listener: Listener | None, should_stop: Callable[[], bool]
) -> Run:
    """Run, and resume as often as the recipe allows where a rank has died; torchrun's ranks are its own to restart."""
    run, restarts = first, 0
    try:
        while True:
            try:
                return run()
            except (RankError, ClusterError) as error:
                if isinstance(error, ClusterError) and not restarts:
                    raise  # nothing was begun
                most = RunDirectory.read_config(Path(directory)).train.max_restarts
                if restarts == most or torchrun_ranks():
                    raise RankError(
                        f"{error}; `sapo resume {directory}` goes on from the newest checkpoint",
                        rank_table(Path(directory)),
                    ) from error
                restarts += 1
                (listener or Silent()).warning(
                    f"{error}; all ranks are started again ({restarts} of at most {most} times)"
                )
            run = partial(_resume, str(directory), [], (), listener, should_stop)
    finally:
        close_hosts()


def _run_to_its_end(training: TrainingRun) -> Run:
    try:
        with closing(training.loggers):
            try:
                stopped = training.run()
            except (NonFiniteError, CollapseError, ParityError, RankError, EngineError, SelfCheckError) as error:
                training.directory.write_failure(str(error))
                raise
        return Run(training.directory.path, training.config, training.summary(), stopped)
    except Exception as error:
        if isinstance(error, UserError | RunFailure) or (failure := shortage(training, error)) is None:
            raise
        raise failure from error
