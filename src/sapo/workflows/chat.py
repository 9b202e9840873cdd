"""A conversation with a model, turn by turn: what `sapo chat` leads."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from sapo.data import Prompt
from sapo.workflows.serving.served import MOST_SEED, Begun, Order, ServedModel


class Conversation:
    """A chat that remembers its turns; a model without a chat template gets each message as a question of its own.

    Args:
        served: the model.
        order: how answers are drawn; its prompts are the conversation's.
        system: system message; None for the run's own, if it has one.
        thinking: the chat template's switch; None leaves it alone.
        seed: of the first answer, the next number of the next; None to draw anew each time.
    """

    def __init__(
        self,
        served: ServedModel,
        order: Order,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        seed: int | None = None,
    ) -> None:
        self.served, self.thinking = served, thinking
        self._order, self._seed, self._answers = order, seed, 0
        self._turns: list[dict[str, str]] = []
        self.system = system

    @property
    def remembers(self) -> bool:
        """Tell whether the model sees the turns before."""
        return self.served.policy.has_chat_template

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self._turns = []

    def say(self, text: str) -> Iterator[str]:
        """Yield the answer to a message, piece by piece. An answer that is left or fails is forgotten with its message.

        Raises:
            TooLongError: the conversation has become longer than the model.
            ModelError: the message cannot be encoded.
        """
        asked = [*self._turns, {"role": "user", "content": text}]
        answer = ""
        seed = secrets.randbelow(MOST_SEED) if self._seed is None else self._seed + self._answers
        order = replace(self._order, prompts=lambda served: [self._prompt(asked)], seed=seed)
        with closing(self.served.draw(order)) as drawn:
            for step in drawn:
                for piece in () if isinstance(step, Begun) else step:
                    answer += piece.text
                    if piece.text:
                        yield piece.text
        self._answers += 1
        self._turns = [*asked, {"role": "assistant", "content": answer}]

    def _prompt(self, turns: list[dict[str, str]]) -> Prompt:
        if not self.remembers:
            return self.served.question(turns[-1]["content"])
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.served.chat_prompt([*system, *turns], self.thinking)
