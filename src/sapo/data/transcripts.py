"""An episode as a person reads it: who said what, in order.

Texts are those that were drawn and said, whatever is in them. Who shows them escapes them (`sapo.utils.text.visible`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapo.data.rollouts import Completion, Observation

POLICY, ENVIRONMENT, HISTORY = "policy", "environment", "history"
"""Who speaks. A tool is `tool NAME`; `history` says that the model sees less of what came before."""

Said = tuple[str, str]
"""Who said something, and what."""


@dataclass(frozen=True)
class Heard:
    """What the model read before one of its turns.

    >>> Heard(at=3, said=(("tool calculator", "1924"),), forgot=0).said[0][1]
    '1924'
    """

    at: int
    """How many of the policy's own tokens come before it."""
    said: tuple[Said, ...]
    forgot: int
    """Tokens of what came before that the model sees no more."""

    @property
    def entries(self) -> tuple[Said, ...]:
        """Return it as entries of a transcript."""
        words = f"forgot {self.forgot:,} token{'s' * (self.forgot != 1)}"
        return ((HISTORY, words), *self.said) if self.forgot else self.said


def heard(observations: Iterable[Observation], prompt_length: int, show: Callable[[Sequence[int]], str]) -> list[Heard]:
    """Return what the model read between its turns, part by part.

    Args:
        show: spells token ids out, for what was said without a text.

    >>> said = Observation(2, (5, 6), "12", keep=3)
    >>> heard([said], prompt_length=4, show=str)
    [Heard(at=2, said=(('environment', '12'),), forgot=3)]
    """
    found, seen, own = [], prompt_length, 0
    for observation in observations:
        seen += observation.at - own
        own = observation.at
        kept = seen if observation.keep is None else min(observation.keep, seen)
        found.append(Heard(own, _parts(observation, show), seen - kept))
        seen = kept + len(observation.token_ids)
    return found


def transcript(completion: Completion, prompt_length: int, show: Callable[[Sequence[int]], str]) -> tuple[Said, ...]:
    """Return who said what in an episode; empty for a single turn.

    Args:
        prompt_length: tokens of its prompt.
        show: spells token ids out, special tokens by their names.

    >>> two = Completion((7, 1, 8), (-0.1,) * 3, "stop", observations=(Observation(2, (5, 6), "12"),))
    >>> transcript(two, 4, lambda ids: "-".join(map(str, ids)))
    (('policy', '7-1'), ('environment', '12'), ('policy', '8'))
    """
    if not completion.observations:
        return ()
    said: list[Said] = []
    turns = iter(completion.turns)
    between = iter(heard(completion.observations, prompt_length, show))
    following = next(between, None)
    for start, stop in turns:
        while following is not None and following.at <= start:
            said += following.entries
            following = next(between, None)
        said.append((POLICY, show(completion.token_ids[start:stop].tolist())))
    while following is not None:
        said += following.entries
        following = next(between, None)
    return tuple(said)


def in_one_text(said: Sequence[Said]) -> str:
    r"""Return a transcript as one text for a log, what the policy did not say in brackets. Further lines of what others
    said begin with a bar, so that none of them reads as the policy's.

    >>> print(in_one_text([("policy", "37*52="), ("environment", "1924;\n#1"), ("policy", "#1924")]))
    37*52=
    [environment: 1924;
    | #1]
    #1924
    """
    return "\n".join(text if who == POLICY else _bracketed(who, text) for who, text in said)


def _bracketed(who: str, text: str) -> str:
    """Return what another than the policy said, its name on one line and every further line marked."""
    first, *more = text.splitlines() or [""]  # wherever some screen begins a line
    return "\n| ".join([f"[{' '.join(who.split())}: {first}", *more]) + "]"


def speakers_of(messages: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, int], ...]:
    """Return who speaks in messages, and in how many characters of their contents; empty where no tool does.

    >>> speakers_of([{"role": "tool", "name": "add", "content": "3"}, {"role": "user", "content": "on"}])
    (('tool add', 1), ('environment', 2))
    """
    found = []
    for message in messages:
        is_tool = message.get("role") == "tool"
        who = f"tool {message.get('name', '')}".rstrip() if is_tool else ENVIRONMENT
        found.append((who, len(str(message.get("content", "")))))
    return tuple(found) if any(who != ENVIRONMENT for who, _ in found) else ()


def _parts(observation: Observation, show: Callable[[Sequence[int]], str]) -> tuple[Said, ...]:
    """Return what was said by speaker. Their texts are joined by line ends in the observation's."""
    if not observation.text:
        return ((ENVIRONMENT, show(observation.token_ids)),) if observation.token_ids else ()
    if sum(length + 1 for _, length in observation.speakers) - 1 != len(observation.text):
        return ((ENVIRONMENT, observation.text),)
    parts, start = [], 0
    for who, length in observation.speakers:
        parts.append((who, observation.text[start : start + length]))
        start += length + 1
    return tuple(parts)
