"""Sums that stand in a picture: the question in text is the same for all of them. Or the same sums in text.

A drawing is a pure function of (seed, index). What is held out are drawings, whose inks and shifts no training picture
has; with operands of one digit there are only a hundred sums, and all of them are trained on. In text a sum has one
form alone, so that the held-out sums of `shown=text` are trained on as well: it measures what was learnt, not what
generalises. `sums` and `arithmetic` keep problems of text apart.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal, get_args

from sapo.data import Prompt, Score, Status
from sapo.data.picture_files import picture_of
from sapo.errors import TaskError
from sapo.tasks.base import check_index
from sapo.tasks.generated.drawing import draw_text
from sapo.utils.hashing import hashed_integer

MAX_DIGITS = 3
MAX_JITTER = 3
CELL = 16

Shown = Literal["picture", "text"]

_INTEGER = re.compile(r"0|[1-9][0-9]*")


class PictureSumsTask:
    """Sums of two operands, drawn.

    Args:
        shown: picture, or text: "3+4=" with no picture.
        digits: digits of both operands; 1 means 0..9.
        jitter: most pixels that a character is moved from the middle of its cell of 16 x 16 pixels.
        seed: random seed of the drawings. The held-out ones do not depend on it.
        name: name of the task in logs. Default: picture_sums1, text_sums1 and so on.

    Raises:
        TaskError: an option is out of range.

    >>> task = PictureSumsTask()
    >>> prompt = task.train_prompt(0)
    >>> prompt.text, prompt.pictures[0].size, task.verify(prompt.answer, prompt).reward
    ('=', (48, 16), 1.0)
    """

    prefers_chat = False

    def __init__(
        self,
        *,
        shown: Shown = "picture",
        digits: int = 1,
        jitter: int = 0,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        if shown not in get_args(Shown):
            raise TaskError(f"shown must be picture or text; got {shown!r}; choose one of these")
        for option, value, low, high in (("digits", digits, 1, MAX_DIGITS), ("jitter", jitter, 0, MAX_JITTER)):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise TaskError(f"{option} must be a whole number in {low}..{high}; got {value!r}; choose one of these")
        self.name = name if name is not None else f"{shown}_sums{digits}"
        self.seed = seed
        self.shown, self.digits, self.jitter = shown, digits, jitter

    def train_prompt(self, index: int) -> Prompt:
        """Return the drawing of `index`."""
        check_index(index)
        return replace(self._drawn("train", self.seed, index), id=index)

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first `count` of the held-out drawings; of text, the distinct sums among so many."""
        drawn = (self._drawn("held_out", 0, index) for index in range(count))
        distinct = {prompt.identity: prompt for prompt in drawn}
        return [replace(prompt, id=index) for index, prompt in enumerate(distinct.values())]

    def worked_example(self, index: int) -> tuple[Prompt, str]:
        """Return the drawing of `index` and its answer."""
        prompt = self.train_prompt(index)
        return prompt, str(prompt.answer)

    def verify(self, text: str, prompt: Prompt) -> Score:
        """Give reward 1 where the text is the answer: canonical digits, with blanks around them allowed."""
        answer = text.strip()
        if not _INTEGER.fullmatch(answer):
            return Score(0.0, Status.UNPARSEABLE, f"not an integer and nothing else: {answer[:40]!r}")
        return Score(float(answer == prompt.answer), answer=answer)

    def _drawn(self, side: str, seed: int, index: int) -> Prompt:
        import numpy as np

        generator = np.random.Generator(np.random.PCG64(hashed_integer("picture_sums", side, seed, index) % 2**64))
        low, high = (0, 10) if self.digits == 1 else (10 ** (self.digits - 1), 10**self.digits)
        a, b = generator.integers(low, high, 2).tolist()
        subject = {"subject": "add"}
        if self.shown == "text":
            return Prompt(0, self.name, f"{a}+{b}=", answer=str(a + b), metadata=subject)
        picture = picture_of(draw_text(f"{a}+{b}", generator, cell=CELL, jitter=self.jitter))
        return Prompt(0, self.name, "=", answer=str(a + b), pictures=(picture,), metadata=subject)
