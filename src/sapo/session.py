"""From a checked recipe to a finished run: everything around the loop that starts, resumes and stops it.

The Python surface (`sapo.train`, `sapo.resume`) and the command line both come through here.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sapo.coldstart import ColdStartProgress, ensure_coldstart
from sapo.config import RunConfig
from sapo.config.recipes import override_run
from sapo.dry_run import DryRun, rehearse
from sapo.errors import CollapseError, ConfigError, NonFiniteError
from sapo.listener import Listener, Silent
from sapo.loggers import check_loggers
from sapo.loop import StopReason, TrainingRun
from sapo.model.adapters import add_adapter
from sapo.model.loading import load_policy
from sapo.model.policy import Policy
from sapo.preflight import check_prompts, load_tasks
from sapo.rollout.local.cpu.native import kernels_in_use
from sapo.routing_replay import RoutingReplay
from sapo.run_directory import RunDirectory
from sapo.run_state import RunState
from sapo.training.checkpoint import newest_whole, set_broken_aside
from sapo.utils.hashing import seed_for
from sapo.utils.machine import processor_name

RECORDED_PACKAGES = ("sapo-rl", "torch", "transformers", "tokenizers", "safetensors", "numpy")

DECIDING_BITS = ("versions", "processor", "cpu_capability", "mkl_cbwr", "kernels")
"""What of `provenance` has to be the same for the same bits."""


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
        listener: told of progress.
        should_stop: asked wherever work can be left without loss; when it says so a checkpoint is written.
        on_coldstart: told of each evaluation while the starting model is made, if the cache has none.

    Raises:
        ConfigError, ModelError, TaskError: the recipe cannot be run; nothing was written.
        NonFiniteError, CollapseError: the run stopped itself; the message, which failure.json keeps, names step, cause
            and checkpoint.
    """
    config = resolve_machine(config)
    if config.run_dir is None:
        raise ConfigError("run_dir must be given for a recipe that has no file to take its name from; got null")
    RunDirectory.check_free(Path(config.run_dir))
    check_loggers(config)
    tasks = load_tasks(config)
    policy = _starting_policy(config, on_coldstart, should_stop)
    check_prompts(config, policy, tasks)
    reference = _reference_policy(config, should_stop)
    _check_same_tokens(policy, reference)
    directory = RunDirectory.create(config.model_copy(update={"provenance": provenance()}))
    return _finish(TrainingRun(config, directory, policy, tasks, None, listener, should_stop, reference))


def dry_run(config: RunConfig) -> DryRun:
    """Load and check everything a run would, and say what it would do; nothing is written.

    Raises:
        ConfigError, ModelError, TaskError: the recipe cannot be run.
    """
    config = resolve_machine(config)
    if config.run_dir is not None:
        RunDirectory.check_free(Path(config.run_dir))
    check_loggers(config)
    return rehearse(
        config,
        load=lambda c: _starting_policy(c, lambda _: None, lambda: False),
        load_reference=lambda c: _reference_policy(c, lambda: False),
    )


def resume(
    run: str | Path,
    overrides: list[str] | None = None,
    *,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Take a run up again from its newest whole checkpoint; on the same machine it goes on bit for bit.

    Args:
        run: the run directory.
        overrides: `key=value` for the few settings that may change in mid-run (`train.steps`, ...).

    Raises:
        ConfigError: not a run directory, or an override that would make it another run.
    """
    directory, config = RunDirectory.open(run)
    try:
        training = _resumed(directory, config, str(run), overrides or [], listener or Silent(), should_stop)
    except BaseException:
        directory.close()
        raise
    return _finish(training)


def _resumed(
    directory: RunDirectory,
    config: RunConfig,
    run: str,
    overrides: list[str],
    listener: Listener,
    should_stop: Callable[[], bool],
) -> TrainingRun:
    """The run at its newest whole checkpoint; its files are changed only when nothing can be refused any more."""
    config = resolve_machine(override_run(config.model_copy(update={"run_dir": run}), overrides))
    _warn_of_another_machine(config, listener)
    check_loggers(config)
    tasks = load_tasks(config)
    checkpoint = newest_whole(
        directory.checkpoints, on_broken=lambda error: listener.warning(f"checkpoint not used: {error}")
    )
    state = None
    if checkpoint is None:
        listener.warning(f"{run} has no checkpoint yet: the run starts over from its first step")
        policy = _starting_policy(config, lambda _: None, should_stop)
    else:
        listener.resumed(checkpoint)
        policy = load_policy(
            checkpoint.path,
            config.model.dtype,
            config.device,
            trust_remote_code=config.model.trust_remote_code,
        )
        state = RunState.from_json(checkpoint.state())
    reference = _reference_policy(config, should_stop)
    _check_same_tokens(policy, reference)
    directory.rewind(state.metrics_bytes if state else 0, state.step if state else 0)
    training = TrainingRun(config, directory, policy, tasks, state, listener, should_stop, reference)
    if checkpoint is not None:
        training.trainer.optimizer.load_state_tensors(checkpoint.optimizer_tensors())
    set_broken_aside(directory.checkpoints, checkpoint)
    if overrides:
        directory.write_config(config)
    return training


def _warn_of_another_machine(config: RunConfig, listener: Listener) -> None:
    """Bit for bit holds on one machine with one set of versions: say when these are others."""
    before, now = config.provenance or {}, provenance()
    for key in DECIDING_BITS:
        if key in before and before[key] != now[key]:
            listener.warning(f"{key}: {before[key]} before, {now[key]} now: the run goes on, but not bit for bit")


def newest_model(path: Path) -> Path:
    """The model directory meant by a path: itself, or the newest whole checkpoint of a run.

    Raises:
        ConfigError: a run without a checkpoint.
    """
    if not (path / "config.yaml").is_file():
        return path
    checkpoint = newest_whole(path / "checkpoints", on_broken=lambda _: None)
    if checkpoint is None:
        raise ConfigError(f"the run {path} has no whole checkpoint whose model could be used; resume it first")
    return checkpoint.path


def run_of(model: Path) -> Path | None:
    """The run directory that a path is, or is a checkpoint of."""
    checkpoint_of = model.resolve().parent.parent if model.resolve().parent.name == "checkpoints" else None
    return next((d for d in (model, checkpoint_of) if d is not None and (d / "config.yaml").is_file()), None)


def load_model(model: str | Path, dtype: str | None = None, device: str = "auto") -> tuple[Policy, Path]:
    """A model by path or hub id, or the newest whole checkpoint of a run, loaded as the run's own recipe says.

    Args:
        dtype: that of a run's recipe, else float32, when None.

    Returns:
        The policy and where it was found.

    Raises:
        ConfigError, ModelError: it cannot be used.
    """
    run = run_of(Path(model))
    config = None if run is None else RunDirectory.read_config(run).model
    if dtype is None:
        dtype = "float32" if config is None else config.dtype
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype must be float32 or bfloat16; got {dtype!r}")
    directory = newest_model(Path(model))
    trusted = config is not None and config.trust_remote_code
    return load_policy(directory, dtype, resolve_device(device), trust_remote_code=trusted), directory


def resolve_device(device: str) -> str:
    """`auto` to what the machine has.

    Raises:
        ConfigError: a device that is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for but this machine has no CUDA device; use cpu or auto")
    return device


def resolve_machine(config: RunConfig) -> RunConfig:
    """Settle threads and device, and apply the threads: another count is another rounding.

    Raises:
        ConfigError: a device that is not there, or CUDA graphs on one that has none.
    """
    threads = config.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    device = resolve_device(config.device)
    if config.rollout.cuda_graphs is True and not device.startswith("cuda"):
        raise ConfigError(
            f"rollout.cuda_graphs=true needs a CUDA device; got device {device}; auto leaves them out there"
        )
    return config.model_copy(update={"threads": threads, "device": device})


def provenance() -> dict[str, Any]:
    """Versions, commit and machine, for config.yaml."""
    return {
        "versions": {name: metadata.version(name) for name in RECORDED_PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl_cbwr": os.environ.get("MKL_CBWR"),
        "kernels": kernels_in_use(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Commit of the source checkout, with a mark when it has been changed; None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10
        )
        changed = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    if tracked.returncode:  # some other repository that we happen to be installed under
        return None
    return commit + ("+changes" if changed else "")


def _starting_policy(
    config: RunConfig, on_coldstart: Callable[[ColdStartProgress], None], should_stop: Callable[[], bool]
) -> Policy:
    policy = _starting_model(config, on_coldstart, should_stop)
    if (lora := config.model.lora) is not None:
        seed = seed_for(config.seed, "adapter")
        add_adapter(policy, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed)
    RoutingReplay.of(config, policy)  # refused before anything is written
    return policy


def _starting_model(
    config: RunConfig, on_coldstart: Callable[[ColdStartProgress], None], should_stop: Callable[[], bool]
) -> Policy:
    if config.model.coldstart is not None:
        path = ensure_coldstart(config, on_coldstart, should_stop)[0]
        return load_policy(path, config.model.dtype, config.device)
    assert config.model.path is not None
    policy = load_policy(config.model.path, config.model.dtype, config.device, **config.model.load_options)
    if policy.adapter is not None and config.model.lora is not None:
        raise ConfigError(f"{config.model.path} is an adapter already; leave model.lora out to train it further")
    return policy


def _reference_policy(config: RunConfig, should_stop: Callable[[], bool]) -> Policy | None:
    """What a KL penalty keeps close to; None when there is none, or when switching an adapter off gives it."""
    kl = config.objective.kl
    if kl is None or (config.model.lora is not None and kl.reference is None):
        return None
    if kl.reference is not None:
        trusted = config.model.trust_remote_code
        reference = load_policy(kl.reference, config.model.dtype, config.device, trust_remote_code=trusted)
    else:
        reference = _starting_model(config, lambda _: None, should_stop)
    for parameter in reference.model.parameters():
        parameter.requires_grad_(False)
    return reference


def _check_same_tokens(policy: Policy, reference: Policy | None) -> None:
    """Refuse a reference to which the same ids are other text: log pi_ref would be of another completion."""
    if reference is not None and policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise ConfigError(
            f"objective.kl.reference must have the tokens of the trained model; {reference.source} has "
            f"{len(reference.tokenizer)} and the model {len(policy.tokenizer)}, or the same number of others"
        )


def _finish(training: TrainingRun) -> Run:
    try:
        stopped = training.run()
        return Run(training.directory.path, training.config, training.summary(), stopped)
    except (NonFiniteError, CollapseError) as error:
        training.directory.write_failure(str(error))
        raise
    finally:
        training.loggers.close()
        training.directory.close()
