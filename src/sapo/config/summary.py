"""A recipe in plain sentences: how its sampler differs from the policy, and its routing replay."""

from __future__ import annotations

from typing import Literal

from sapo.config import ExperimentsConfig, RunConfig


def sampler_sentences(config: RunConfig) -> list[str]:
    """Describe the sampler in one sentence for each way in which it is not the policy; none for a plain run.

    >>> from sapo.config.recipes import load_recipe
    >>> sampler_sentences(load_recipe("quickstart"))
    []
    >>> print(sampler_sentences(load_recipe("quickstart", ["rollout.staleness=6"]))[0])
    Every batch is 6 updates (1.5 steps) old at its first update; those of the run's start are younger.
    """
    rollout = config.rollout
    sentences = []
    if not config.experiments.sampler_is_policy:
        sentences.append(_precision(config.experiments))
    if rollout.staleness:
        steps = rollout.staleness / config.train.minibatches
        ages = f"{rollout.staleness} update{'s' * (rollout.staleness > 1)} ({steps:.3g} step{'s' * (steps != 1)})"
        sentences.append(f"Every batch is {ages} old at its first update; those of the run's start are younger.")
    if rollout.schedule == "free":
        sentences.append(free_sentence(config))
    if sentences or config.objective.tis is not None:
        sentences.append(_log_pi_old(config))
    if config.objective.tis is not None:
        sentences.append(_correction(config))
    return sentences


def free_sentence(config: RunConfig) -> str:
    """Describe the free schedule of a recipe in a sentence."""
    bound = config.max_staleness
    return (
        f"Completions are drawn beside the updates and trained on at most {bound} update{'s' * (bound > 1)} later "
        "(rollout.schedule=free): which weights draw which depends on the clock, so two runs of this recipe differ."
    )


def _precision(experiments: ExperimentsConfig) -> str:
    switch = experiments.sampler_switch
    text = f"Completions are drawn from {_weights(experiments, experiments.sampler_dtype)}"
    if switch is not None:
        text += f", from step {switch.step} on from {_weights(experiments, switch.dtype)}"
    return text + "; the trainer and evaluations keep the policy's own."


def _weights(experiments: ExperimentsConfig, dtype: str | None) -> str:
    if dtype is None:
        return "the policy's weights"
    scaled = {"none": "unscaled", "tensor": "scaled by matrix", "channel": "scaled by row"}[experiments.sampler_scaling]
    vectors = "norms and biases too" if experiments.sampler_vectors else "matrices only"
    return f"weights rounded to {dtype} ({scaled + ', ' if dtype.startswith('float8') else ''}{vectors})"


def _log_pi_old(config: RunConfig) -> str:
    source = config.old_logprobs
    rounded = not config.experiments.sampler_is_policy
    if source == "auto" and (rounded or config.objective.tis is not None):
        source = "trainer"  # whatever the self-check finds
    return {
        "auto": "log pi_old is of the weights that sampled, the engine's own where the self-check finds it equal.",
        "engine": "log pi_old is the engine's"
        + (", so that r holds its rounding as well as the drift." * rounded or "."),
        "trainer": "log pi_old is the trainer's, at the weights that sampled.",
        "current": "log pi_old is the trainer's, at the weights of the batch's first update: no ratio holds its age.",
    }[source]


def _correction(config: RunConfig) -> str:
    assert config.objective.tis is not None
    tis = config.objective.tis.weights
    weight, over = "w = pi_old / mu", "token"
    if tis.mode.startswith("sequence"):
        weight, over = "rho = prod pi_old / mu", "response"
    if tis.mode == "sequence_mean":
        weight = "the geometric mean of pi_old / mu"
    rule = {
        "token": f"at most {tis.cap:g}",
        "sequence": f"at most {tis.cap:g}",
        "sequence_mean": f"at most {tis.cap:g}",
        "icepop": f"0 outside {tis.floor or 0:g}..{tis.cap:g}",
        "sequence_mask": f"0 above {tis.cap:g}",
    }[tis.mode]
    return f"Beside its gate each {over} is weighed by {weight}, {rule}."


ReplayKind = Literal["R2", "R3"]


def replay_kind(config: RunConfig, old_logprobs: str | None) -> ReplayKind | None:
    """Return R2 or R3; None without replay, and while the source of log pi_old is not known.

    Args:
        old_logprobs: engine, trainer or current, once the self-check has decided.
    """
    setting = config.model.routing_replay
    if setting is False or (setting is True and old_logprobs is None):
        return None
    if setting is not True:
        return setting
    return "R3" if old_logprobs == "engine" else "R2"


def replay_sentence(config: RunConfig) -> str | None:
    """Describe the routing replay of a recipe in a sentence; None where it has none.

    Where the recipe says `true`, the self-check of the first step decides between R2 and R3.
    """
    decided = None if config.old_logprobs == "auto" else config.old_logprobs
    recorder = {
        "R2": "the trainer records the experts as it computes log pi_old",
        "R3": "the engine records the experts as it samples",
    }
    ending = "every update goes through them."
    if config.model.routing_replay is False:
        return None
    if (kind := replay_kind(config, decided)) is not None:
        return f"Routing replay {kind}: {recorder[kind]}; {ending}"
    return (
        f"Routing replay R3 ({recorder['R3']}) if the self-check takes log pi_old from it, else R2 ({recorder['R2']}); "
        f"{ending}"
    )
