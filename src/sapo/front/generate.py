"""`sapo.generate`: completions of a prompt, or of several, by a model, a run or a model object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sapo.front.evaluate import as_model
from sapo.front.settings import refuse_unknown
from sapo.model.policy import Policy
from sapo.rollout.params import SamplingParams
from sapo.run.models import load_model, run_of
from sapo.workflows import generate as generating
from sapo.workflows.generate import Generation, format_of_run


def generate(
    model: Any,
    prompt: str | Sequence[str],
    *,
    samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    system: str | None = None,
    stop: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "auto",
    **unknown: Any,
) -> list[str] | list[list[str]]:
    """Draw completions, and return their texts: a list for one prompt, a list for each of several.

    Args:
        model: see `sapo.evaluate`. A run asks as it was trained to.
        prompt: the question, or several.
        samples: completions of each prompt.
        max_new_tokens: longest completion in tokens; less where the model has room for less.
        temperature, top_p, top_k: of sampling; temperature 0 is greedy.
        seed: random seed.
        system: system message of a chat.
        stop: strings that end a completion.
        dtype: float32 or bfloat16; that of the run, else float32, when None.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ConfigError, ModelError: it cannot be done as asked, or an argument is unknown.
    """
    refuse_unknown(unknown, generate)
    policy, form = load_for_generation(model, dtype, device, own_form=system is None and not stop)
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)

    def draw(text: str) -> Generation:
        return generating.generate(
            policy, text, params, samples=samples, system=system, stop=tuple(stop), form=form, shorten=True
        )

    if isinstance(prompt, str):
        return [c.text for c in draw(prompt).completions]
    return [[c.text for c in draw(text).completions] for text in prompt]


def load_for_generation(model: Any, dtype: str | None, device: str, *, own_form: bool) -> tuple[Policy, Any]:
    """Return a model as a policy, with the format of a run's questions where that is wanted."""
    model = as_model(model)
    if isinstance(model, Policy):
        return model, None
    policy, _ = load_model(model, dtype, device)
    run = run_of(Path(model))
    return policy, format_of_run(run) if own_form and run is not None else None
