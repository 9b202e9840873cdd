"""A model for tests of environments: it answers with what it was given, turn by turn."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sapo.data import Prompt, Score
from sapo.environments import Answer, Messages, OutOfBudget, Turn


class Scripted:
    """An `ask` whose model says the texts of a list and remembers what it was shown; then the budget is out."""

    def __init__(self, *texts: str, cut: bool = False, seed: int = 0) -> None:
        self.texts = list(texts)
        self.cut = cut
        """Whether the last turn is cut by a limit."""
        self.seed = seed
        self.shown: list[Any] = []

    async def __call__(self, observation: str | Messages = "", *, max_tokens: int | None = None) -> Turn:
        await asyncio.sleep(0)
        self.shown.append(observation)
        if not self.texts:
            raise OutOfBudget("no turns are left")
        text = self.texts.pop(0)
        return Turn(text, (1,), "length" if self.cut and not self.texts else "stop")


def play(environment: Any, prompt: Prompt, *texts: str, cut: bool = False) -> tuple[Score, Sequence[Any]]:
    """Play one episode; return its score and what the model was shown."""
    ask = Scripted(*texts, cut=cut)
    returned = asyncio.run(environment.play(prompt, ask))
    if isinstance(returned, Answer):  # as the driver does once all episodes have ended
        score = environment.verify(returned.text, prompt)
        returned = replace(score, figures={**score.figures, **returned.figures})
    return returned, ask.shown
