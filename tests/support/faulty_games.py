"""Environments that fail in every way: functions that tests play here, and a class for processes of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sapo.data import Prompt, Score
from sapo.environments import Ask
from sapo.environments.clock import off_the_clock


async def chatty(prompt: Prompt, ask: Ask) -> Score:
    """Ask three times, with observations of another length in every sample."""
    turn = await ask(max_tokens=3)
    for k in range(2):
        turn = await ask(f"{k};" * (1 + len(turn.token_ids)), max_tokens=2 + k)
    return Score(float(sum(turn.token_ids) % 2))


async def endless(prompt: Prompt, ask: Ask) -> Score:
    while True:
        await ask("1", max_tokens=2)


async def greedy_of_reward(prompt: Prompt, ask: Ask) -> Score:
    try:
        while True:
            await ask("1", max_tokens=2)
    except Exception:
        return Score(1.0)


async def good(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=2)
    await asyncio.sleep(0.001)
    await ask("7;", max_tokens=2)
    return Score(1.0)


async def pauses_while_it_asks(prompt: Prompt, ask: Ask) -> Score:
    """Let the clock stand still beside a turn that is open."""

    async def other() -> None:
        with off_the_clock():
            await asyncio.sleep(0.05)

    await asyncio.gather(ask(max_tokens=2), other())
    await ask("7;", max_tokens=2)
    return Score(1.0)


async def raises(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    raise KeyError("board")


async def raises_first(prompt: Prompt, ask: Ask) -> Score:
    raise ValueError("no docker")


async def exits(prompt: Prompt, ask: Ask) -> Score:
    raise SystemExit(3)


async def hangs(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    await asyncio.sleep(99)
    return Score(1.0)


async def clings(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    while True:
        try:
            await asyncio.sleep(99)
        except asyncio.CancelledError:
            continue


async def blocks(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    time.sleep(0.5)
    return Score(1.0)


async def blocks_and_asks(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    time.sleep(0.5)
    await ask(max_tokens=1)
    return Score(1.0)


async def blocks_for_long(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    time.sleep(600)
    return Score(1.0)


async def no_score(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    return "yes"  # type: ignore[return-value]


async def not_a_number(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    return Score(float("nan"))


async def says_bytes(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    await ask(b"12")  # type: ignore[arg-type]
    return Score(1.0)


async def says_what_cannot_be_encoded(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    await ask("\N{SNOWMAN}")
    return Score(1.0)


async def sends_messages(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    await ask([{"role": "user", "content": "1"}])
    return Score(1.0)


async def never_asks(prompt: Prompt, ask: Ask) -> Score:
    return Score(1.0)


async def asks_twice_at_once(prompt: Prompt, ask: Ask) -> Score:
    await asyncio.gather(ask("1", max_tokens=1), ask("2", max_tokens=1))
    return Score(1.0)


async def cancels_itself(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    raise asyncio.CancelledError


async def says_too_much(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    await ask("1" * 2**23)
    return Score(1.0)


# What only a process of its own survives.


async def says_a_gigabyte(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    await ask("1" * 2**30)
    return Score(1.0)


async def leaves(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    os._exit(3)


async def is_killed(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    os.kill(os.getpid(), signal.SIGKILL)
    return Score(1.0)


async def changes_its_mind_and_dies(prompt: Prompt, ask: Ask) -> Score:
    await ask(f"{os.getpid()}", max_tokens=1)
    os.kill(os.getpid(), signal.SIGKILL)
    return Score(1.0)


async def scribbles(prompt: Prompt, ask: Ask) -> Score:
    """Write to every descriptor that it finds."""
    await ask(max_tokens=1)
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"scribbled")
        except OSError:
            continue
    return Score(1.0)


# What costs nothing, not even its own episode.


async def dies_once(prompt: Prompt, ask: Ask) -> Score:
    """Die in the second turn of its first life."""
    life = Path(prompt.metadata["directory"]) / f"life-{prompt.id}"
    await ask(max_tokens=2)
    if not life.exists():
        life.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    await ask("7;", max_tokens=2)
    return Score(1.0)


async def prints(prompt: Prompt, ask: Ask) -> Score:
    print("{" * 5000)
    sys.stdout.flush()
    return await good(prompt, ask)


async def leaves_a_process(prompt: Prompt, ask: Ask) -> Score:
    """Fork a process that leaves its session and its parent."""
    command = [sys.executable, "-c", "import os, time; os.fork() and os._exit(0); time.sleep(600)", str(prompt.id)]
    command.append(prompt.metadata["directory"])
    subprocess.run(command, start_new_session=True, check=True)
    return await good(prompt, ask)


async def ends_its_child(prompt: Prompt, ask: Ask) -> Score:
    """Fork, and come back twice."""
    score = await good(prompt, ask)
    os.fork()
    return score


async def spoils_its_module(prompt: Prompt, ask: Ask) -> Score:
    """What later episodes would find, were they played in the same process."""
    score = await good(prompt, ask)
    Faulty.play = None  # type: ignore[assignment, method-assign]
    return score


async def tells_its_environment(prompt: Prompt, ask: Ask) -> Score:
    await ask(max_tokens=1)
    return Score(1.0, answer=" ".join(sorted(os.environ)))


async def draws(prompt: Prompt, ask: Ask) -> Score:
    import random

    await ask(max_tokens=1)
    return Score(random.random())


async def closes(prompt: Prompt, ask: Ask) -> Score:
    try:
        await ask(max_tokens=1)
        await asyncio.sleep(99)
    finally:
        (Path(prompt.metadata["directory"]) / f"closed-{prompt.id}").touch()
    return Score(1.0)


class MadeBy:
    """An object in a prompt's metadata that a call makes in the process that reads it."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._made = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._made


class Faulty:
    """Plays the function that the prompt's metadata names."""

    name, stop = "faulty", ("=",)

    def __init__(self, refuses: bool = False) -> None:
        if refuses and "PYTEST_CURRENT_TEST" not in os.environ:  # which a process of episodes is not given
            raise KeyError("SECRET")

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(index, self.name, f"{index % 10}+1")

    def held_out(self, count: int) -> list[Prompt]:
        return [self.train_prompt(i) for i in range(count)]

    async def play(self, prompt: Prompt, ask: Ask) -> Score:
        score: Score = await globals()[prompt.metadata["play"]](prompt, ask)
        return score
