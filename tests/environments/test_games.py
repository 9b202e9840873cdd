"""The games: what they answer, what they reward, and what they hold out."""

from __future__ import annotations

import asyncio

import pytest

from sapo.data import Prompt, Status
from sapo.environments import Turn
from sapo.environments.games import Calculator, Guess


class Scripted:
    """An `ask` that answers with given turns."""

    seed = 0

    def __init__(self, *texts: str) -> None:
        self.texts, self.heard = list(texts), []

    async def __call__(self, observation="", **_):

        self.heard.append(observation)
        return Turn(self.texts.pop(0), (1,), "stop")


@pytest.mark.parametrize("game", [Calculator(), Calculator(digits=1, seed=3), Guess(), Guess(n=2, turns=1)])
def test_worked_episodes_earn_their_reward_and_hear_what_they_say_they_hear(game) -> None:
    for index in range(30):
        prompt, said = game.worked_example(index)
        assert prompt == game.train_prompt(index)
        ask = Scripted(*(text for who, text in said if who == "policy"))
        assert asyncio.run(game.play(prompt, ask)).reward == 1.0
        assert ask.heard == ["", *(text for who, text in said if who == "environment")]


def test_a_calculator_answers_calls_and_judges_what_is_none() -> None:
    game = Calculator(calls=2)
    prompt = Prompt(0, "calculator", "37*52+18=", answer="1942")
    for texts, reward, status in (
        (("37*52=", "1924+18=", "#1942"), 1.0, Status.SCORED),
        (("#1942",), 1.0, Status.SCORED),
        (("37*52=", "#1924"), 0.0, Status.SCORED),
        (("1942",), 0.0, Status.UNPARSEABLE),
        (("1+1=", "1+1=", "1+1="), 0.0, Status.UNPARSEABLE),
    ):
        score = asyncio.run(game.play(prompt, Scripted(*texts)))
        assert (score.reward, score.status) == (reward, status)


def test_held_out_problems_of_the_calculator_are_distinct_and_never_trained_on() -> None:
    game = Calculator(digits=1)
    held_out = [p.text for p in game.held_out(150)]
    assert len(set(held_out)) == len(held_out) == 150
    assert not {game.train_prompt(i).text for i in range(1000)} & set(held_out)
    assert [p.text for p in Calculator(digits=1, seed=9).held_out(150)] == held_out
