"""Answer a collapse: keep the last healthy checkpoint, and stop the run or roll it back to that checkpoint.

A checkpoint is healthy when three things hold. It was written by schedule, not on a stop: a run that was stopped and
resumed then rolls back to the same checkpoint as one that was not. No rule about the policy was broken when it was
written. And none was broken in the step after it, whose completions are the first to show what the last updates before
the checkpoint did. The rules are in diagnostics/warnings.py.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from sapo.config import RunConfig
from sapo.diagnostics import Warning
from sapo.diagnostics.warnings import OF_THE_SET_UP
from sapo.errors import CheckpointError, CollapseError, NonFiniteError
from sapo.model.loading import load_policy
from sapo.model.policy import Policy
from sapo.run.directory import RunDirectory
from sapo.run.state import RunState
from sapo.training.checkpoint import Checkpoint, list_checkpoints
from sapo.training.ranks import Trainers

KEPT_FOR_ROLLBACKS = 3
"""Number of healthy checkpoints that are kept under `on_collapse: rollback`: a second collapse rolls back further."""


def note_warning(state: RunState, warning: Warning) -> None:
    """Keep the last healthy checkpoint of a policy that goes wrong, and remember a collapse until the step's end.

    Kept for good are the one before the first warning and the one before the last: a run may be warned of often.
    """
    if warning.cause not in OF_THE_SET_UP and state.healthy_steps:
        state.kept_steps = list(dict.fromkeys([*state.kept_steps[:1], state.healthy_steps[-1]]))
    if warning.collapse and state.collapse is None:
        state.collapse = asdict(warning)


def note_non_finite(state: RunState, config: RunConfig, directory: RunDirectory, error: NonFiniteError) -> Warning:
    """Note a loss, gradient or log-probability that is not finite as a collapse of the present step.

    Raises:
        NonFiniteError: the recipe only warns of collapses; or no update was made yet, so that a lower learning rate
            would end the same way. It names step, cause and the checkpoint to resume from.
    """
    warning = Warning(state.step + 1, "non_finite", None, None, f"update {state.update}: {error}", collapse=True)
    if config.warnings.on_collapse != "warn" and (state.step or state.update):
        note_warning(state, warning)
        return warning
    checkpoints = list_checkpoints(directory.checkpoints)
    resume = (
        f"`sapo resume {directory.path} train.learning_rate=...` goes on from {checkpoints[0].label}"
        if checkpoints
        else "there is no checkpoint yet: start again with a lower train.learning_rate"
    )
    if not (state.step or state.update):
        resume = "no update was made yet: look at the model the run starts from, and at its rewards"
    raise NonFiniteError(f"step {warning.step}, {warning.text}; {resume}") from error


def note_checkpoint(state: RunState, config: RunConfig) -> None:
    """Note, before a checkpoint is written, whether it may turn out to be a healthy one."""
    every = config.checkpoint.every
    at_the_start = state.step == 0 and config.warnings.on_collapse == "rollback"
    scheduled = at_the_start or (every > 0 and state.step > 0 and state.step % every == 0)
    if not scheduled or state.update or state.groups is not None or state.step in state.healthy_steps:
        return
    if state.step == 0:
        state.healthy_steps = [0]  # nothing has been updated yet
    elif state.health.healthy:
        state.candidate_step = state.step


def note_step(state: RunState, config: RunConfig) -> None:
    """Note, after a step, that the checkpoint before it is healthy if the step has broken no rule."""
    if state.candidate_step is not None and state.health.healthy:
        most = KEPT_FOR_ROLLBACKS if config.warnings.on_collapse == "rollback" else 1
        state.healthy_steps = [*state.healthy_steps, state.candidate_step][-most:]
    state.candidate_step = None


def kept_checkpoints(state: RunState) -> set[int]:
    """Return the steps whose checkpoints are not pruned."""
    return {*state.kept_steps, *state.healthy_steps, *(() if state.candidate_step is None else (state.candidate_step,))}


def answer_collapse(
    config: RunConfig, directory: RunDirectory, policy: Policy, trainers: Trainers, state: RunState
) -> RunState:
    """Return the state to go on with after a collapse: the run's own, or that of its last healthy checkpoint.

    For a rollback, weights and optimizer are those of that checkpoint, the learning rate is scaled down, and what came
    after leaves metrics.jsonl and rollouts/ for rolled-back/; tokens and seconds stay counted. The same prompts come
    again. The caller writes a checkpoint of the state at once; a run that is killed before that rolls back again.

    Raises:
        CollapseError: the recipe says stop, there have been enough rollbacks, or there is no healthy checkpoint. The
            newest checkpoint is then the healthy one, if there is one.
    """
    assert state.collapse is not None
    warning = Warning(**state.collapse)
    if config.warnings.on_collapse == "warn":
        state.collapse = None
        return state
    checkpoint = _healthy_checkpoint(directory, state)
    if checkpoint is None:
        raise CollapseError(
            f"{warning.line}; there is no healthy checkpoint yet: start again with a lower train.learning_rate"
        )
    set_collapsed_aside(directory, checkpoint)
    if config.warnings.on_collapse == "stop" or state.rollbacks >= config.warnings.max_rollbacks:
        after = f" after {state.rollbacks} rollbacks" if config.warnings.on_collapse == "rollback" else ""
        raise CollapseError(
            f"{warning.line}; stopped{after}; `sapo resume {directory.path} train.learning_rate=...` goes on from the "
            f"last healthy checkpoint, {checkpoint.label}"
        )
    restored = restore(checkpoint, config, policy, trainers)
    restored = replace(
        restored,
        rollbacks=state.rollbacks + 1,
        learning_rate_scale=state.learning_rate_scale * config.warnings.rollback_learning_rate,
        tokens=state.tokens,
        seconds=state.seconds,
        healthy_steps=[s for s in state.healthy_steps if s <= restored.step],
        candidate_step=None,
        tried_steps=[*state.tried_steps, restored.step],
        kept_steps=[s for s in state.kept_steps if s <= restored.step],
    )
    directory.take_back(restored.metrics_bytes, restored.step, restored.rollbacks)
    directory.append_metrics(warning.to_json())
    return restored


def rollback_record(collapsed: RunState, restored: RunState) -> dict[str, Any]:
    """Return the line of metrics.jsonl that records a rollback."""
    assert collapsed.collapse is not None
    return {
        "kind": "rollback",
        "step": collapsed.collapse["step"],
        "to": restored.step,
        "cause": collapsed.collapse["cause"],
        "rollbacks": restored.rollbacks,
        "learning_rate_scale": restored.learning_rate_scale,
    }


def restore(checkpoint: Checkpoint, config: RunConfig, policy: Policy, trainers: Trainers) -> RunState:
    """Restore the weights and the optimizer's state of a checkpoint, and return the run's state that it holds."""
    kept = load_policy(
        checkpoint.path,
        config.model.dtype,
        config.device,
        trust_remote_code=config.model.trust_remote_code,
        text_only=not config.model.vision.load,
    )
    weights = dict(kept.model.named_parameters())
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            parameter.copy_(weights[name])
    trainers.take_weights(policy)
    trainers.restore_optimizer(checkpoint.path)
    return RunState.deserialise(checkpoint.state(), checkpoint.batches())


def set_collapsed_aside(directory: RunDirectory, healthy: Checkpoint) -> None:
    """Rename checkpoints after the healthy one to collapsed-*, so that no resume takes them up."""
    for checkpoint in list_checkpoints(directory.checkpoints):
        if (checkpoint.step, checkpoint.update) <= (healthy.step, healthy.update):
            return
        target = checkpoint.path.with_name(f"collapsed-{checkpoint.path.name}")
        shutil.rmtree(target, ignore_errors=True)
        checkpoint.path.rename(target)


def _healthy_checkpoint(directory: RunDirectory, state: RunState) -> Checkpoint | None:
    """Return the last healthy checkpoint that no rollback has used yet, else the oldest one; it is verified.

    A run that collapses again after a rollback shows that its checkpoint could not be saved, healthy as it was by the
    rules.
    """
    whole = {}
    for checkpoint in list_checkpoints(directory.checkpoints):
        if checkpoint.step in state.healthy_steps and not checkpoint.update:
            with suppress(CheckpointError):
                checkpoint.verify()
                whole[checkpoint.step] = checkpoint
    untried = [step for step in whole if step not in state.tried_steps]
    return whole[max(untried)] if untried else whole[min(whole)] if whole else None
