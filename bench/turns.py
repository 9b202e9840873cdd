"""What turns cost: 64 tokens of each sample drawn in 1, 4 and 8 turns, in place and anew. `python -m bench.turns`.

The driver of episodes plays an environment that answers each turn with a few tokens at once, with the local engine:
anew, as with an engine that remembers nothing (`conversation.Waves`, each turn a prefill of its whole history), and in
place. Both are timed in turn, round by round, in CPU seconds of this process; both must draw the same tokens.
`--model 135m` takes SmolLM2-135M in place of a tiny model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.contest import Machine
from bench.machine import describe_machine
from bench.report import quick_or
from bench.workloads import SMOLLM2
from sapo.config.rollout import TurnsConfig
from sapo.data import Prompt, Score
from sapo.environments import Ask
from sapo.model.loading import load_policy, prepare_policy
from sapo.model.policy import Policy
from sapo.model.sources import model_directory
from sapo.model.tiny import character_tokenizer, tiny_model
from sapo.rollout.episodes.driver import EpisodeDriver
from sapo.rollout.episodes.live import Play
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams

FILE = Path(__file__).parent / "results" / "turns.json"
TOKENS = 64
TURNS = (1, 4, 8)


@dataclass(frozen=True)
class Case:
    """A model, and who plays.

    >>> Case("tiny", 32, 8, "12345*678+" * 10, "1234567;").samples
    8
    """

    model: str
    prompts: int
    samples: int
    text: str
    """What all prompts end with."""
    observation: str


CASES = {
    "tiny": Case("tiny", 32, 8, "*7+" + "12345*678+" * 10, "1234567;"),
    "135m": Case("135m", 4, 4, " This is a long story of a calculator." * 20, " The tool says 42."),
}


class Talker:
    """An environment that answers each turn but the last with the same words."""

    name, stop = "talker", ()

    def __init__(self, turns: int, observation: str) -> None:
        self.turns, self.tokens, self.observation = turns, TOKENS // turns, observation

    def train_prompt(self, index: int) -> Prompt:
        """Return the prompt of an index."""
        return Prompt(index, self.name, str(index))

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first prompts."""
        return [self.train_prompt(i) for i in range(count)]

    async def play(self, prompt: Prompt, ask: Ask) -> Score:
        """Ask for all turns."""
        await ask(max_tokens=self.tokens)
        for _ in range(self.turns - 1):
            await ask(self.observation, max_tokens=self.tokens)
        return Score(0.0)


class Forgetful(LocalEngine):
    """The local engine without `converse`."""

    converse = None  # type: ignore[assignment]


def policy_of(case: Case) -> Policy:
    """Load the model, or make that of the quick start, untrained."""
    if case.model == "135m":
        return load_policy(model_directory(SMOLLM2))
    tokenizer = character_tokenizer("0123456789+-*%=;#")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model("qwen3", len(tokenizer), seed=0, hidden_size=64, layers=2, max_length=512, **ends)
    return prepare_policy(model, tokenizer)


def play(policy: Policy, engine: LocalEngine, case: Case, turns: int) -> tuple[float, list[list[int]]]:
    """Return CPU seconds and the tokens of all samples."""
    texts = [f"{i}{case.text}" for i in range(case.prompts)]
    prompts = [Prompt(i, "talker", text, token_ids=policy.encode(text)) for i, text in enumerate(texts)]
    params = SamplingParams(max_new_tokens=TOKENS, seed=1)
    driver = EpisodeDriver(policy, engine, params, TurnsConfig(max=max(TURNS)))
    begin = time.process_time()
    played = driver.play([Play(Talker(turns, case.observation), p, case.samples) for p in prompts])
    seconds = time.process_time() - begin
    return seconds, [c.token_ids.tolist() for completions in played for c in completions]


def measure(case: Case, rounds: int, turns: Sequence[int] = TURNS) -> dict[str, Any]:
    """Time each number of turns both ways, in turn."""
    policy = policy_of(case)
    sides = {"anew": Forgetful(policy), "in place": LocalEngine(policy)}
    seconds: dict[str, dict[str, list[float]]] = {name: {str(n): [] for n in turns} for name in sides}
    same: dict[str, float] = {}
    for engine in sides.values():
        play(policy, engine, case, turns[-1])  # warm
    for _ in range(rounds):
        for n in turns:
            drawn = []
            for name, engine in sides.items():
                taken, tokens = play(policy, engine, case, n)
                seconds[name][str(n)].append(taken)
                drawn.append(tokens)
            one, other = drawn
            assert {len(t) for tokens in drawn for t in tokens} == {TOKENS}, "every sample draws all its tokens"
            # A draw within rounding of a border falls either way, and its episode goes on otherwise.
            same[str(n)] = sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
    prompt = len(policy.encode(f"0{case.text}"))
    observed = len(policy.encode(case.observation))
    return {"seconds": seconds, "same": same, "prompt": prompt, "observation": observed}


def spread(values: Sequence[float]) -> str:
    """Median and range.

    >>> spread([1.0, 3.0, 2.0])
    '2.00 (1.00..3.00)'
    """
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def print_table(case: Case, result: dict[str, Any], console: Console) -> None:
    """Show the medians and ranges, and how many times as long the other side takes, round by round."""
    turns = list(result["seconds"]["anew"])
    rows = f"{case.prompts * case.samples} rows, prompt {result['prompt']}, observation {result['observation']}"
    table = Table("CPU seconds", *(f"{n} x {TOKENS // int(n)}" for n in turns), title=f"{case.model}, {rows}")
    for name, seconds in result["seconds"].items():
        table.add_row(name, *(spread(seconds[n]) for n in turns))
    pairs = {n: zip(*(result["seconds"][name][n] for name in ("anew", "in place")), strict=True) for n in turns}
    table.add_row("anew / in place", *(spread([a / b for a, b in pairs[n]]) for n in turns))
    table.add_row("episodes alike", *(f"{result['same'][n]:.3f}" for n in turns))
    console.print(table)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(CASES), default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="in small, to see that it works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as is recorded
    case = CASES[arguments.model]
    if arguments.quick:
        case = Case(case.model, 2, 2, case.text, case.observation)
    result = measure(case, 1 if arguments.quick else arguments.rounds)
    print_table(case, result, Console(width=120))
    place = quick_or(FILE, quick=arguments.quick)
    found = json.loads(place.read_text()) if place.exists() else {}
    found[case.model] = {"machine": describe_machine(Machine(threads=1, device="cpu")), **result}
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
