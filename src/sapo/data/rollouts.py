"""The data that packages hand to each other: a prompt, its completions with their scores, the group they form.

The packed batch is in packed.py; docs/architecture.md shows the way of a step. Token ids travel; text is made once, for
the verifier and the log, and never turned back into ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from sapo.data.pictures import Picture, PictureTokens
from sapo.utils.rewards import all_equal

# For the annotations only: the processes that judge answers need the text, not an array library.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


class Status(StrEnum):
    """What happened when a completion was scored. A wrong answer is `SCORED` with reward 0; the others are not answers.

    >>> Status.TRUNCATED.value, Status.TRUNCATED.failed, Status.VERIFIER_ERROR.failed
    ('truncated', False, True)
    """

    SCORED = "scored"
    UNPARSEABLE = "unparseable"
    TRUNCATED = "truncated"
    VERIFIER_ERROR = "verifier_error"
    ENVIRONMENT_ERROR = "environment_error"

    @property
    def failed(self) -> bool:
        """Return whether the reward says nothing of the completion, because whoever should give it failed.

        Such a completion leaves the loss, its denominators and the baseline of its group.
        """
        return self in (Status.VERIFIER_ERROR, Status.ENVIRONMENT_ERROR)


@dataclass(frozen=True)
class Score:
    """A verifier's judgement of one completion.

    >>> Score(reward=1.0, answer="46").status.value
    'scored'
    """

    reward: float
    status: Status = Status.SCORED
    detail: str = ""
    """Why the status is not `scored`: the parse failure or the exception, for the log."""
    answer: str | None = None
    """What the verifier took as the answer, in the form in which equal answers are equal text: what a majority counts.
    None when it found none, or does not say."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Further figures of this completion, as the share of right cells of a puzzle; logged as means."""
    turn_rewards: tuple[float, ...] = ()
    """What each turn of an episode earned, in order; `reward` is their sum. Empty where the episode was judged as a
    whole, and where there is one turn."""


NOT_SCORED = Score(0.0)
"""The score of a completion that no verifier has seen."""


@dataclass(frozen=True)
class Prompt:
    """One question, as text with the pictures it is about, and as the token ids the model sees.

    >>> prompt = Prompt(id=7, task="arithmetic", text="12+34=", token_ids=(3, 4, 12, 5, 6, 15), answer="46")
    >>> prompt.answer
    '46'
    """

    id: int
    """Names the prompt to the sampler's counter: the same (seed, id, sample) draws the same noise. 64 bits."""
    task: str
    text: str
    token_ids: tuple[int, ...] = ()
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    """Strings that end its completions, beside the model's end tokens; set with the token ids."""
    special_tokens: bool = False
    """The text of its completions has special tokens in it, spelled out, but the one that ends a completion."""
    pictures: tuple[Picture, ...] = ()
    """What the question shows, in the order of their markers in the text."""
    picture_tokens: PictureTokens | None = None
    """Which token ids stand for the pictures; set with the token ids. None without pictures."""

    @property
    def identity(self) -> str:
        """Return what makes two prompts the same question: the text and the content of the pictures.

        >>> Prompt(id=7, task="arithmetic", text="12+34=").identity
        '12+34='
        """
        return "\x1f".join([self.text, *(picture.sha256 for picture in self.pictures)])

    @property
    def likeness(self) -> str:
        """Return what prompts share that differ in blanks and case alone.

        >>> Prompt(id=7, task="sums", text="What is 2 + 2?").likeness
        'whatis2+2?'
        """
        return "".join(self.identity.casefold().split())

    @property
    def next_position(self) -> int:
        """Return the position of a completion's first token."""
        found = None if self.picture_tokens is None else self.picture_tokens.next_position
        return len(self.token_ids) if found is None else found


@dataclass(frozen=True)
class RoutedExperts:
    """The experts that some tokens went through in each layer of a mixture, in the order the router chose them.

    Bytes rather than numbers: a long response in a large model has millions of choices.

    Two tokens, two layers, two experts each; the first token went to experts 3 and 1, then to 0 and 2:

    >>> experts = RoutedExperts(bytes([3, 1, 0, 2, 3, 2, 0, 1]), layers=2, per_token=2)
    >>> experts.num_tokens
    2
    """

    indices: bytes
    """By token, layer and place; one byte each, or two, the lower first, when `wide`."""
    layers: int
    """Layers with a router."""
    per_token: int
    """Experts a token goes through in a layer."""
    wide: bool = False
    """A layer has more than 256 experts."""

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens recorded."""
        return len(self.indices) // (self.layers * self.per_token * (1 + self.wide))


@dataclass(frozen=True)
class Observation:
    """What an environment said between two turns of the policy: tokens that it read and did not draw.

    >>> Observation(at=3, token_ids=(5, 6), text="12").keep is None
    True
    """

    at: int
    """How many of the policy's own tokens come before it; 0 opens this sample."""
    token_ids: tuple[int, ...]
    text: str = ""
    """For logs only."""
    keep: int | None = None
    """How many tokens of all that came before, the prompt's counted, the policy still sees; None for all. A template
    that drops the thinking of earlier turns, or a summary in place of the history, keeps fewer."""
    speakers: tuple[tuple[str, int], ...] = ()
    """Who speaks in `text`, and in how many characters, where tools do; a line end joins the parts. For logs only."""


@dataclass(frozen=True, init=False, eq=False)
class Completion:
    """One sampled response: what the engine emitted, token by token, and what the verifier said of it.

    In an episode of several turns, `token_ids` and all that goes with them, and the length, are of the policy's own
    tokens, all turns in their order. What the environment said lies in `observations`, between them:

    >>> turns = Completion((7, 1, 8, 1), (-0.1,) * 4, "stop", observations=(Observation(2, (5, 6), "12"),))
    >>> len(turns), turns.sequence.tolist(), turns.turns
    (4, [7, 1, 5, 6, 8, 1], ((0, 2), (2, 4)))

    `logprobs[t]` is the log-probability of `token_ids[t]` under the distribution it was sampled from (after
    temperature and truncation of the tail). The stop token, when one came, is the last token and carries loss.

    Token data may be given as any sequence of numbers and is kept in read-only arrays, which `arrays.read_only` copies
    unless they are read-only already. Completions are equal when their arrays are, byte by byte, and all else is.

    >>> c = Completion(token_ids=(7, 9, 1), logprobs=(-0.1, -0.2, -0.01), finish_reason="stop", text="46")
    >>> len(c), c.token_ids.dtype.name, c.logprobs.dtype.name, c.score.status.value
    (3, 'int32', 'float32', 'scored')
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish_reason: FinishReason
    text: str
    score: Score
    old_logprobs: NDArray[np.float32]
    """log pi_old when the trainer recomputed it at the weights that sampled; empty when `logprobs` are log pi_old."""
    reference_logprobs: NDArray[np.float32]
    """log pi_ref of each token; empty without a reference policy."""
    experts: RoutedExperts | None
    """With routing replay, of its sequence but the last token, which is no input; None where nothing was recorded."""
    versions: tuple[tuple[int, int], ...]
    """Runs of (tokens, updates made by the weights that drew them), in order; empty where one version drew the batch,
    which is the batch's own."""
    observations: tuple[Observation, ...]
    """What the environment said between its tokens, in order; empty for a single turn."""

    def __init__(
        self,
        token_ids: Sequence[int] | NDArray[np.integer],
        logprobs: Sequence[float] | NDArray[np.floating],
        finish_reason: FinishReason,
        text: str = "",
        score: Score = NOT_SCORED,
        old_logprobs: Sequence[float] | NDArray[np.floating] = (),
        reference_logprobs: Sequence[float] | NDArray[np.floating] = (),
        experts: RoutedExperts | None = None,
        versions: tuple[tuple[int, int], ...] = (),
        observations: tuple[Observation, ...] = (),
    ) -> None:
        from sapo.data.arrays import LOGPROBS, TOKEN_IDS, read_only  # numpy, which is not loaded before it is needed

        put = object.__setattr__  # the class is frozen
        put(self, "token_ids", read_only(token_ids, TOKEN_IDS))
        put(self, "logprobs", read_only(logprobs, LOGPROBS))
        put(self, "finish_reason", finish_reason)
        put(self, "text", text)
        put(self, "score", score)
        put(self, "old_logprobs", read_only(old_logprobs, LOGPROBS))
        put(self, "reference_logprobs", read_only(reference_logprobs, LOGPROBS))
        put(self, "experts", experts)
        put(self, "versions", versions)
        put(self, "observations", observations)
        places = [0, *(o.at for o in observations), len(self)]
        if places != sorted(places):
            raise ValueError(
                f"observations must lie between a completion's {len(self)} tokens, in their order; got the places "
                f"{places[1:-1]}; count the policy's own tokens before each"
            )

    def __len__(self) -> int:
        return len(self.token_ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Completion):
            return NotImplemented
        own, theirs = ((c._bytes(), c.score, c.experts, c.versions, c.observations) for c in (self, other))
        return own == theirs

    def __hash__(self) -> int:
        return hash(self._bytes())  # without the score, whose figures may be a dict

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and unpickle through the constructor: numpy's own way gives arrays that may be written to."""
        return Completion, tuple(getattr(self, f.name) for f in fields(self))

    @property
    def spans(self) -> list[tuple[bool, NDArray[np.int32]]]:
        """Return the runs of tokens after the prompt, and whether the policy drew them; none is empty."""
        from sapo.data.arrays import TOKEN_IDS, read_only

        spans, start = [], 0
        for observation in self.observations:
            spans += [(True, self.token_ids[start : observation.at])]
            spans += [(False, read_only(observation.token_ids, TOKEN_IDS))]
            start = observation.at
        spans += [(True, self.token_ids[start:])]
        return [(own, ids) for own, ids in spans if len(ids)]

    @property
    def sequence(self) -> NDArray[np.int32]:
        """Return all tokens after the prompt as they came about, observations in their places.

        Where an observation keeps less than all, what it dropped is in it too.
        """
        if not self.observations:
            return self.token_ids
        import numpy as np

        return np.concatenate([self.token_ids[:0], *(ids for _, ids in self.spans)])

    @property
    def turns(self) -> tuple[tuple[int, int], ...]:
        """Return for each turn its first own token and one past its last; a turn in which none was drawn is left out.

        >>> Completion((7, 1), (-0.1, -0.2), "stop").turns
        ((0, 2),)
        """
        ends = [0, *(o.at for o in self.observations), len(self)]
        return tuple((start, stop) for start, stop in pairwise(ends) if start < stop)

    def _bytes(self) -> tuple[bytes | str, ...]:
        arrays = (self.token_ids, self.logprobs, self.old_logprobs, self.reference_logprobs)
        return (self.finish_reason, self.text, *(a.tobytes() for a in arrays))


@dataclass(frozen=True)
class Group:
    """The G completions of one prompt with their advantages A_i (equation 2).

    >>> prompt = Prompt(id=0, task="arithmetic", text="1+1=", token_ids=(1, 2, 1, 3), answer="2")
    >>> good = Completion((2, 0), (-0.7, -0.1), "stop", "2", Score(1.0))
    >>> bad = Completion((3, 0), (-0.9, -0.1), "stop", "3", Score(0.0))
    >>> group = Group(prompt, (good, bad), advantages=(0.7071, -0.7071))
    >>> group.rewards, group.zero_variance
    ((1.0, 0.0), False)
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    advantages: tuple[float, ...] = ()
    shaped_rewards: tuple[float, ...] = ()
    """What the advantages are made of where it is not the verifier's reward alone; empty otherwise."""
    masked: tuple[bool, ...] = ()
    """Completions that carry no loss and leave every denominator: failed ones, and truncated ones where that was asked
    for; empty where there are none."""
    prompt_experts: RoutedExperts | None = None
    """With routing replay, of the prompt's tokens, which all completions share; None where nothing was recorded."""
    turn_advantages: tuple[tuple[float, ...], ...] = ()
    """By completion, the advantage of each of its turns, where the rewards of turns were told apart; empty otherwise.
    `advantages` are then those of whole episodes, for logs."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """Return R_1 .. R_G, as the verifier gave them."""
        return tuple(c.score.reward for c in self.completions)

    @property
    def scored_rewards(self) -> tuple[float, ...]:
        """Return the verifier's rewards of the completions whose verifier and environment did not fail."""
        return tuple(c.score.reward for c in self.completions if not c.score.status.failed)

    @property
    def training_rewards(self) -> tuple[float, ...]:
        """Return R_1 .. R_G, as the advantages take them."""
        return self.shaped_rewards or self.rewards

    @property
    def counted(self) -> tuple[bool, ...]:
        """Return whether each completion counts in the loss and its denominators: those that are not masked."""
        return tuple(not m for m in self.masked) or (True,) * len(self.completions)

    @property
    def zero_variance(self) -> bool:
        """Return whether the group has no gradient: the rewards of completions that did not fail are all equal, so that
        every advantage is 0, or all its completions are masked. Where turns have advantages of their own, those of all
        completions that are not masked are 0."""
        if self.turn_advantages:
            counted = zip(self.turn_advantages, self.counted, strict=True)
            return not any(any(by_turn) for by_turn, counts in counted if counts)
        scored = zip(self.training_rewards, self.completions, strict=True)
        rewards = [reward for reward, completion in scored if not completion.score.status.failed]
        return not any(self.counted) or not rewards or all_equal(rewards)
