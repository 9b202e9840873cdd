"""What an environment is, and what it is given: types of texts and numbers, without a tensor library.

An episode is one sample of one prompt. `play` is its whole course: local variables are its state, `await ask(...)`
lets the model answer, and `try ... finally` closes what it opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from sapo.data import Prompt, Score
from sapo.data.rollouts import FinishReason

Messages = Sequence[Mapping[str, Any]]
"""Messages of a chat: objects with `role` and `content`, and what else the model's template reads."""


Said = tuple[Literal["policy", "environment"], str]
"""Who said something in a worked episode, and what. A turn of the policy that no stop string of the environment ends is
followed by the end token."""


class OutOfBudget(Exception):  # noqa: N818 (the end of an episode, not a fault)
    """Raised by `ask` where the episode may go no further: no turns, no tokens or no positions are left.

    The episode is then truncated, whatever `play` returns afterwards. Let it pass, or catch it to close what is open.
    """


class ToolError(Exception):
    """Raised by a tool that cannot do what the model asked for: the model reads its text and goes on."""


@dataclass(frozen=True)
class ToolCall:
    """One call that the model wrote, parsed for the environment. Its text is never written back into the history.

    >>> ToolCall("calculator", {"expression": "37*52"}).arguments["expression"]
    '37*52'
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    """Names the call in the answer to it (`tool_call_id`); empty where the model's format has none."""
    error: str = ""
    """Why it cannot be carried out: it could not be parsed, or its name or arguments are wrong. Empty otherwise."""


@dataclass(frozen=True)
class Answer:
    """What an episode came to, for the task's `verify` to judge: `play` may return it in place of a Score.

    The answers of all episodes are judged together when the last one has ended, as those of a single turn are: in the
    worker processes side by side, and not in the time that an environment has to reply.

    >>> Answer("1942", {"tools/calculator/calls": 2.0}).text
    '1942'
    """

    text: str
    figures: Mapping[str, float] = field(default_factory=dict)
    """Added to those of the verdict."""


@dataclass(frozen=True)
class Turn:
    """What the model answered once.

    >>> Turn("[37*52]", (11, 3, 7), "stop").calls
    ()
    """

    text: str
    """Without the end token; a stop string is part of it."""
    token_ids: tuple[int, ...]
    """As they were drawn, the end token included. They stay in the history as they are."""
    finish_reason: FinishReason
    """`length` where the turn was cut by a limit."""
    calls: tuple[ToolCall, ...] = ()
    """The tool calls in it, for a model whose format has them."""
    logprobs: tuple[float, ...] = ()
    """Log-probability of each token as it was drawn, where whoever drew says them."""


class Ask(Protocol):
    """Lets the model take its next turn."""

    seed: int
    """Of this episode: a function of the run's seed, the prompt and the sample. The only randomness that an environment
    may use, so that a run can be repeated."""

    async def __call__(self, observation: str | Messages = "", *, max_tokens: int | None = None) -> Turn:
        """Show the model an observation and return its answer.

        Args:
            observation: text, or for a chat also messages, that the model reads before it answers. Nothing in the first
                call means that it answers the prompt.
            max_tokens: most tokens of this turn, below the recipe's `turns.tokens_per_turn`.

        Raises:
            OutOfBudget: the episode may go no further.
        """
        ...


class TokenAsk(Ask, Protocol):
    """An `ask` for those who encode what the model reads themselves."""

    async def go_on(self, history: Sequence[int], *, max_tokens: int | None = None) -> Turn:
        """Let the model go on from a history: the ids of all that it is to see, its own turns among them.

        What the history shares with what the model has seen stays as it is; what differs from there on becomes an
        observation, and a rewritten history a branch (`Observation.keep`).

        Raises:
            OutOfBudget: the episode may go no further.
        """
        ...


@dataclass(frozen=True)
class Drawing:
    """What an environment that encodes for itself has to know of the model and of how is drawn.

    >>> Drawing(lambda path: None, 4096, 64, 1.0, (1,)).max_length
    4096
    """

    save_tokenizer: Callable[[str], Any]
    """Writes the model's tokenizer into a directory, in the form of transformers."""
    max_length: int | None
    """Longest episode in tokens; None where nothing limits it."""
    max_new_tokens: int
    """Most tokens that the model draws in an episode."""
    temperature: float
    stop_token_ids: tuple[int, ...]
    """What ends a turn."""


@runtime_checkable
class Environment(Protocol):
    """A task whose answers are played, not judged in one piece; everything else of a task stays the same.

    An environment that needs no `verify` has none. Prompts are a pure function of the index, as of any task.
    """

    name: str

    def train_prompt(self, index: int) -> Prompt:
        """Return the training prompt of `index` = 0, 1, 2, ... Its `id` is the index, its `token_ids` are empty."""
        ...

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first `count` of a fixed list of distinct prompts that are never trained on, or all of them."""
        ...

    async def play(self, prompt: Prompt, ask: Ask) -> Score | Answer:
        """Play one episode of one sample and return its score, or an answer that `verify` judges.

        An exception raised here, a score that is none, or a reward that is no finite number is an error of the
        environment: the episode leaves loss and baseline. It is not an answer of the model's.
        """
        ...


@runtime_checkable
class TokenEnvironment(Environment, Protocol):
    """An environment that encodes what the model reads itself: it is played with a `TokenAsk`."""

    def prepare(self, drawing: Drawing) -> None:
        """Make ready to play with a model. Called before each round of episodes, most often with the same.

        Raises:
            TaskError: it cannot.
        """
        ...


@runtime_checkable
class WorkedEnvironment(Environment, Protocol):
    """An environment that can also write good episodes, which a cold start learns from."""

    def worked_example(self, index: int) -> tuple[Prompt, list[Said]]:
        """Return the training prompt of `index` and an episode that `play` rewards with 1."""
        ...


@runtime_checkable
class JudgedEnvironment(Environment, Protocol):
    """An environment that scores the episodes of one prompt side by side."""

    async def judge(self, prompt: Prompt, episodes: list[Episode]) -> list[Score]:
        """Return a score for each of the episodes, in place of that of `play`.

        Called once all samples of the prompt have ended, with those whose environment did not fail; `episode.sample`
        says which. An exception, another number of scores or a reward that is no finite number is an error of the
        environment in all of them, and in no other prompt's.
        """
        ...


@dataclass(frozen=True)
class Episode:
    """One episode that has been played, as an environment or a judge of a group reads it.

    >>> prompt = Prompt(id=0, task="calculator", text="37*52+18=", answer="1942")
    >>> Episode(prompt, 0, (Turn("#1942", (2, 1), "stop"),), ("",), Score(1.0)).transcript
    ('#1942',)
    """

    prompt: Prompt
    sample: int
    """Which of the prompt's samples, from 0."""
    turns: tuple[Turn, ...]
    observations: tuple[str, ...]
    """What the model read before each turn, as text; empty before the first unless the episode had an opening. One more
    than turns where the last observation got no answer."""
    score: Score

    @property
    def transcript(self) -> tuple[str, ...]:
        """Return observations and turns in their order, without empty observations."""
        said = [text for pair in zip(self.observations, (t.text for t in self.turns), strict=False) for text in pair]
        return tuple(text for text in (*said, *self.observations[len(self.turns) :]) if text)


def is_environment(task: object) -> bool:
    """Return whether a task is played in episodes: whether it has `play`.

    >>> is_environment(object())
    False
    """
    return callable(getattr(task, "play", None))
