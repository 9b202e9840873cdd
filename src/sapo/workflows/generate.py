"""Completions of one prompt of the user's own: what `sapo generate` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sapo.config import RolloutConfig
from sapo.data import Completion, Picture, Prompt
from sapo.errors import ConfigError
from sapo.model.policy import Policy
from sapo.rollout.drawing import draw
from sapo.rollout.engine import Engine, Request
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.rollout.registry import make_engine, require
from sapo.rollout.streaming import TextStream, stream
from sapo.rollout.weights import loaded
from sapo.run.directory import RunDirectory
from sapo.tasks import make_task


@dataclass(frozen=True)
class Generation:
    """A prompt and its completions.

    >>> prompt = Prompt(0, "generate", "1+1=", token_ids=(1, 10, 1, 14))
    >>> completion = Completion((2, 17), (-0.1, -0.2), "stop", "2")
    >>> Generation(prompt, "1+1=", (completion,), (("2", "<eos>"),)).to_json()["completions"][0]["text"]
    '2'
    """

    prompt: Prompt
    seen: str
    """The prompt as the model saw it, special tokens included."""
    completions: tuple[Completion, ...]
    token_texts: tuple[tuple[str, ...], ...]
    """Each completion's tokens one by one, special ones by their names."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {
            "prompt": self.seen,
            "prompt_token_ids": list(self.prompt.token_ids),
            "completions": [
                {
                    "text": c.text,
                    "finish_reason": c.finish_reason,
                    "token_ids": c.token_ids.tolist(),
                    "tokens": list(texts),
                    "logprobs": c.logprobs.tolist(),
                }
                for c, texts in zip(self.completions, self.token_texts, strict=True)
            ],
        }


def format_of_run(run: Path) -> PromptFormat | None:
    """Return how a run asks the questions of its first task; None for a directory that is not a run.

    Raises:
        ConfigError, TaskError: its recipe or its task cannot be read.
    """
    if not (run / "config.yaml").is_file():
        return None
    config = RunDirectory.read_config(run)
    first = config.tasks[0]
    return PromptFormat.of(first.prompt or config.prompt, make_task(first.name, seed=config.eval.seed, **first.options))


def generate(
    policy: Policy,
    text: str,
    params: SamplingParams,
    *,
    samples: int = 1,
    style: Literal["auto", "plain", "chat"] = "auto",
    system: str | None = None,
    stop: tuple[str, ...] = (),
    form: PromptFormat | None = None,
    shorten: bool = False,
    engine: str = "local",
    pictures: Sequence[Picture] = (),
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Draw completions of a text.

    Args:
        text: the question; put into the tokenizer's chat template when style is chat, or auto and there is one.
        params: of sampling; the model's own stop tokens are added.
        stop: strings that end a completion.
        form: format of the text, in place of style, system and stop.
        shorten: lower max_new_tokens to what the model has room for.
        engine: what draws, as `rollout.engine` names it.
        pictures: shown where the text has a marker, or before it.
        on_text: called with each piece of the text of the only sample, as it is drawn.

    Raises:
        ModelError: a chat with a model that has no template, text it has no tokens for, or pictures it cannot see.
        TaskError: another number of markers than pictures.
        ConfigError: prompt and completion do not fit the model's positions, or an engine that cannot do it.
    """
    form = form or PromptFormat(style=style, system=system, stop=stop, prefers_chat=True)
    if form.stop:
        require(engine, "stop_strings", "a stop string", "leave it out")
    prompt = form.encode(policy, [Prompt(0, "generate", text, pictures=tuple(pictures))])[0]
    length, limit = params.max_new_tokens, policy.max_length
    if shorten and limit is not None:
        length = max(1, min(length, limit - len(prompt.token_ids)))
    if limit is not None and len(prompt.token_ids) + length > limit:
        raise ConfigError(
            f"prompt and completion must fit the model's {limit} positions; got a prompt of {len(prompt.token_ids)} "
            f"tokens and max_new_tokens {length}; shorten one of them"
        )
    stops = params.stop_token_ids | policy.stop_token_ids
    params = replace(params, max_new_tokens=length, stop_token_ids=stops)
    made = make_engine(policy, RolloutConfig(engine=engine))
    with closing(made) as drawer, loaded(drawer, policy.weights(), version=0):
        if on_text is None:
            [completions] = draw(drawer, [Request(prompt, samples)], params)
        else:
            assert samples == 1, "one text can be shown as it is drawn, and not several"
            completions = (_streamed(drawer, policy, prompt, params, on_text),)

    def decode(ids: tuple[int, ...]) -> str:
        shown: str = policy.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return shown

    texts = tuple(tuple(decode((i,)) for i in c.token_ids.tolist()) for c in completions)
    return Generation(prompt, policy.show_prompt(prompt), completions, texts)


def _streamed(
    engine: Engine, policy: Policy, prompt: Prompt, params: SamplingParams, on_text: Callable[[str], None]
) -> Completion:
    """Draw one completion, and tell its text as it comes."""
    text = TextStream(policy, prompt.stop, params.stop_token_ids, prompt.special_tokens)
    whole = None
    for new in (new for step in stream(engine, [Request(prompt, 1)], params) for new in step):
        whole = new.completion
        piece = text.add(new.token_ids) + ("" if whole is None else text.finish(whole))
        if piece:
            on_text(piece)
    assert whole is not None, "a stream ends with its completion"
    return whole
