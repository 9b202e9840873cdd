"""Completions while they are drawn: tokens as they come, and the text that they surely are.

A token need not be a whole character, and what was just written may begin a stop string. Such text waits until it is
certain, so that what has been shown never has to be taken back.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from sapo.data import Completion
from sapo.model.policy import Policy
from sapo.rollout.drawing import draw
from sapo.rollout.engine import Drawn, Engine, Request, TokenStream
from sapo.rollout.params import SamplingParams

CUT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for part of a character."""


def stream(engine: Engine, requests: Sequence[Request], params: SamplingParams) -> TokenStream:
    """Yield the tokens of every sample as they are drawn; all at once from an engine that cannot stream.

    An engine may take the requests up as soon as this is called, to draw for all streams that are open together.

    Raises:
        ConfigError: as from `draw`.
    """
    streaming = getattr(engine, "stream", None)
    if callable(streaming):
        begun: TokenStream = streaming(requests, params)
        return begun
    return _all_at_once(engine, requests, params)


def _all_at_once(
    engine: Engine, requests: Sequence[Request], params: SamplingParams
) -> Generator[list[Drawn], None, None]:
    drawn = draw(engine, requests, params)
    yield [
        Drawn(place, sample, tuple(c.token_ids.tolist()), tuple(c.logprobs.tolist()), c)
        for place, completions in enumerate(drawn)
        for sample, c in enumerate(completions)
    ]


class TextStream:
    """Give the text of one sample piece by piece; the pieces together are `Completion.text`.

    Args:
        policy: whose tokens they are.
        stop: strings that end the sample and are no part of its text.
        end_tokens: tokens that end it and are no part of its text.
        special: special tokens are spelled out, in place of left out.
    """

    def __init__(
        self,
        policy: Policy,
        stop: Sequence[str] = (),
        end_tokens: frozenset[int] = frozenset(),
        special: bool = False,
    ) -> None:
        self._decode = policy.show if special else policy.decode
        self._stop = [s for s in stop if s]
        self._ends = end_tokens
        self._ids: list[int] = []
        self._from = 0  # tokens from here on are decoded: a decoder may drop the blank that a text begins with
        self._read = 0  # tokens whose text is in `_waiting` or was given away
        self._waiting = ""
        self._given = ""

    def add(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; return the text that has become certain."""
        self._ids += [token for token in token_ids if token not in self._ends]
        before = self._decode(self._ids[self._from : self._read])
        now = self._decode(self._ids[self._from :])
        if len(now) > len(before) and not now.endswith(CUT):
            self._waiting += now[len(before) :]
            self._from, self._read = self._read, len(self._ids)
        return self._give(len(self._waiting) - self._uncertain())

    def finish(self, completion: Completion) -> str:
        """Return what is left of the text of a finished sample."""
        self._waiting = completion.text[len(self._given) :] if completion.text.startswith(self._given) else ""
        return self._give(len(self._waiting))

    def _uncertain(self) -> int:
        """Count the characters at the end that may be, or begin, a stop string."""
        found = [at for s in self._stop if (at := self._waiting.find(s)) >= 0]
        if found:
            return len(self._waiting) - min(found)
        longest = min(len(self._waiting), max(map(len, self._stop), default=1) - 1)
        ends = (n for n in range(longest, 0, -1) if any(s.startswith(self._waiting[-n:]) for s in self._stop))
        return next(ends, 0)

    def _give(self, count: int) -> str:
        text, self._waiting = self._waiting[:count], self._waiting[count:]
        self._given += text
        return text
