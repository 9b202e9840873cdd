"""A model that is asked by others: their prompts to tokens, and what is drawn to text, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from sapo.config import RolloutConfig
from sapo.data import Prompt
from sapo.errors import ModelError
from sapo.model.policy import Policy
from sapo.rollout.engine import Drawn, Engine, Likeliest, Request
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.rollout.registry import make_engine, require
from sapo.rollout.streaming import TextStream, stream
from sapo.rollout.weights import loaded

MOST_SEED = 2**63 - 1


class TooLongError(ModelError):
    """A prompt, or a prompt and its completion, that the model has no positions for."""


@dataclass(frozen=True)
class Token:
    """A drawn token and its log-probability in the distribution it was drawn from.

    >>> Token(" the", -0.1).text
    ' the'
    """

    text: str
    logprob: float
    likeliest: tuple[Token, ...] = ()
    """The likeliest tokens in its place, where the order asks for them."""


@dataclass(frozen=True)
class Piece:
    """Hold what is new of one completion.

    >>> Piece(choice=0, text="4", tokens=(Token("4", -0.1),)).finish is None
    True
    """

    choice: int
    text: str
    tokens: tuple[Token, ...]
    """Drawn tokens without the one that ends the completion. Their text may come with a later piece."""
    drawn: int = 0
    """Number of tokens drawn, the end token counted."""
    finish: str | None = None
    """stop or length, in the last piece."""


@dataclass(frozen=True)
class Begun:
    """Tell that the prompts are encoded: the first thing that `ServedModel.draw` yields."""

    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class Order:
    """Say what is to be drawn.

    >>> Order(prompts=lambda served: [], max_new_tokens=8).samples
    1
    """

    prompts: Callable[[ServedModel], list[Prompt]]
    """Makes the prompts, in the thread that the model belongs to."""
    max_new_tokens: int | None
    """None for the served model's own limit, or what there is room for."""
    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = field(default=())
    top_logprobs: int = 0
    """Likeliest tokens that are shown beside each drawn one."""

    def sampling(self, max_new_tokens: int) -> SamplingParams:
        """Return the settings of an engine.

        Raises:
            ValueError: one is out of its range.
        """
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
        )


class ServedModel:
    """A policy and the engine that draws from it.

    Args:
        name: what callers call it.
        policy: the model.
        engine: holds the policy's weights; made by `serving_engine`.
        form: how the run it comes from puts its questions; None for a model that is of no run.
        max_new_tokens: longest completion of an order that gives none.
    """

    def __init__(
        self, name: str, policy: Policy, engine: Engine, form: PromptFormat | None = None, max_new_tokens: int = 1024
    ) -> None:
        self.name, self.policy, self.engine, self.form = name, policy, engine, form or PromptFormat()
        self.max_new_tokens = max_new_tokens

    @property
    def interleaves(self) -> bool:
        """Tell whether several orders can be drawn at once."""
        return bool(getattr(self.engine, "interleaves", False))

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """Encode a chat; a run's system message and switch of thinking hold where the chat has none.

        Args:
            tools: functions that the template shows to the model.

        Raises:
            ModelError: no chat template, one without a place for tools, or one that refuses the messages.
        """
        if not self.policy.has_chat_template:
            raise ModelError(
                f"{self.name} has no chat template; it completes plain text: use /v1/completions, or `sapo generate`"
            )
        if tools and "tools" not in str(self.policy.tokenizer.chat_template):
            raise ModelError(f"{self.name}: its chat template has no place for tools; leave tools out")
        form = self.form
        turns = [dict(m) for m in messages]
        if form.system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": form.system}, *turns]
        ids = self.policy.encode_messages(turns, form.thinking if thinking is None else thinking, tools)
        return self._prompt(ids)

    def question(self, text: str) -> Prompt:
        """Encode one question as the run asks it.

        Raises:
            ModelError: it has no token for a part of it.
        """
        return self.form.encode(self.policy, [Prompt(0, "serve", text)], keep=False)[0]

    def plain_prompt(self, text: str | Sequence[int]) -> Prompt:
        """Encode a text as it is, or take token ids.

        Raises:
            ModelError: it has no token for a part of it, or an id is none of its tokens.
        """
        if isinstance(text, str):
            return replace(self._prompt(self.policy.encode(text)), stop=(), special_tokens=False)
        rows = self.policy.model.get_input_embeddings().weight.shape[0]
        if not text or min(text) < 0 or max(text) >= rows:
            raise ModelError(f"token ids must be one or more from 0 to {rows - 1}; got {list(text)[:8]}")
        return replace(self._prompt(tuple(text)), stop=(), special_tokens=False)

    def _prompt(self, token_ids: tuple[int, ...]) -> Prompt:
        return Prompt(0, "serve", "", token_ids=token_ids, stop=self.form.stop, special_tokens=self.form.special_tokens)

    @property
    def shows_likeliest(self) -> bool:
        """Tell whether the likeliest tokens can be shown beside each drawn one."""
        return self.engine.capabilities.top_logprobs

    def draw(self, order: Order) -> Generator[Begun | list[Piece], None, None]:
        """Yield what is drawn, step by step: `Begun`, then pieces. Closing the iterator ends it.

        Orders that are open together share the steps of an engine that can (`StreamingEngine.interleaves`).

        Raises:
            TooLongError: the model has no room for it.
            ModelError, ConfigError: a prompt cannot be encoded, or the engine cannot do it.
        """
        prompts = [
            replace(p, id=number, stop=tuple(dict.fromkeys((*p.stop, *order.stop))))
            for number, p in enumerate(order.prompts(self))
        ]
        longest = max(len(p.token_ids) for p in prompts)
        params = order.sampling(self._room(longest, order.max_new_tokens))
        params = replace(params, stop_token_ids=self.policy.stop_token_ids)
        requests = [Request(p, order.samples, top_logprobs=order.top_logprobs) for p in prompts]
        texts = [
            TextStream(self.policy, p.stop, params.stop_token_ids, p.special_tokens)
            for p in prompts
            for _ in range(order.samples)
        ]
        # Begun before the first step is taken, so that orders which have waited together are drawn together.
        with closing(stream(self.engine, requests, params)) as steps:
            yield Begun(sum(len(p.token_ids) for p in prompts))
            for step in steps:
                pieces = (self._piece(new, texts, order.samples, params.stop_token_ids) for new in step)
                yield [piece for piece in pieces if piece.drawn or piece.finish]

    def _room(self, prompt: int, asked: int | None) -> int:
        limit = self.policy.max_length
        if limit is None:
            return asked or self.max_new_tokens
        room = limit - prompt
        if room < 1 or (asked or 0) > room:
            raise TooLongError(
                f"prompt and completion must fit the model's {limit} positions; got a prompt of {prompt} tokens and "
                f"{'no room for a completion' if asked is None else f'max_tokens {asked}'}; shorten one of them"
            )
        return asked or min(self.max_new_tokens, room)

    def _piece(self, new: Drawn, texts: Sequence[TextStream], samples: int, ends: frozenset[int]) -> Piece:
        choice = new.request * samples + new.sample
        text = texts[choice].add(new.token_ids)
        finish = None
        if new.completion is not None:
            text += texts[choice].finish(new.completion)
            finish = new.completion.finish_reason
        likeliest = new.likeliest or ((),) * len(new.token_ids)
        tokens = tuple(
            self._token(token, logprob, others)
            for token, logprob, others in zip(new.token_ids, new.logprobs, likeliest, strict=True)
            if token not in ends
        )
        return Piece(choice, text, tokens, len(new.token_ids), finish)

    def _token(self, token: int, logprob: float, likeliest: Likeliest) -> Token:
        def show(other: int) -> str:
            return self.policy.show((other,))

        # The drawn token's own is the same number in both places, to the bit.
        others = tuple(Token(show(other), logprob if other == token else p) for other, p in likeliest)
        return Token(show(token), logprob, others)


@contextmanager
def serving_engine(policy: Policy, name: str) -> Iterator[Engine]:
    """Make an engine that holds a policy's weights for the duration of the block.

    Args:
        name: as `rollout.engine` gives it.

    Raises:
        ConfigError: it is not installed, or cannot end completions at strings.
    """
    require(name, "stop_strings", "serving", "use the engine local")
    made = make_engine(policy, RolloutConfig(engine=name))
    with closing(made) as engine, loaded(engine, policy.weights(), version=0):
        yield engine
