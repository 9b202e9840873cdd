"""Measure what a token costs outside the model, on two trees in turn: `python -m bench.token_data [BASE] [HEAD]`.

Three things happen to every sampled token besides arithmetic: it is kept in a `Completion`, it is packed into a batch,
and while its batch waits it is written to each checkpoint and read back by a resume. Each round starts a fresh process
for each side; seconds are CPU seconds of that process, so that other load on the machine counts little. The table has
median and range of the rounds.

Completions are built as the engine and the trainer build them: fresh numbers from rows of a tensor, with log-probs of
the sampler (`logprobs`) and of the trainer (`old_logprobs`). Their texts are empty.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from bench.same_results import REPOSITORY, source_tree

VOCABULARY = 150_000
PROMPT_LENGTH = 200
RESPONSE_LENGTHS = (1500, 2500)
SAMPLES = 8
PACKED_PROMPTS = 32
PENDING_TOKENS = 1_000_000

HOMES = {
    "pack": ("sapo.training.batch", "sapo.batch"),
    "RunState": ("sapo.run.state", "sapo.run_state"),
    "RolloutBatch": ("sapo.run.state", "sapo.run_state"),
}
"""Where a name may live, newest first; what a package's face offers is imported from there."""


MEASURES = {
    "traced": "memory of a Completion, allocated, bytes a token",
    "resident": "memory of a Completion, resident, bytes a token",
    "pack": "`pack`, CPU us a token",
    "write": "checkpoint, write, CPU s a million tokens",
    "size": "checkpoint, size of the state, MB a million tokens",
    "read": "checkpoint, read back, CPU s a million tokens",
}

GOALS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "traced": ("at most 16", lambda base, head: head <= 16),
    "resident": ("at most 16", lambda base, head: head <= 16),
    "pack": ("10 times as fast", lambda base, head: head * 10 <= base),
    "write": ("below 0.5", lambda base, head: head < 0.5),
}
"""What HEAD is to reach, in words and as a test of the medians of both sides."""


class NotOfferedError(Exception):
    """A tree lacks what a measurement needs."""


def offered(name: str) -> Any:
    """Import a name from the first of its homes that the tree has."""
    for home in HOMES[name]:
        with suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(home), name)
    raise NotOfferedError(f"{name} is in none of {', '.join(HOMES[name])}")


def as_token_data(row: torch.Tensor) -> Any:
    """Return a row of an engine's buffer as completions of this tree take it: a tuple, or an array that they copy."""
    from sapo.data import Completion

    return tuple(row.tolist()) if Completion.__annotations__["token_ids"].startswith("tuple") else row.numpy()


@dataclass(frozen=True)
class Rows:
    """Buffers as an engine fills them, and how much of each row is used."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    counts: list[int]

    @classmethod
    def draw(cls, count: int, seed: int = 0) -> Rows:
        """Draw rows of about 2000 tokens each."""
        generator = torch.Generator().manual_seed(seed)
        shape = (count, RESPONSE_LENGTHS[1])
        counts = torch.randint(RESPONSE_LENGTHS[0], RESPONSE_LENGTHS[1] + 1, (count,), generator=generator)
        token_ids = torch.randint(0, VOCABULARY, shape, generator=generator)
        logprobs = -torch.rand(shape, generator=generator).exp()
        return cls(token_ids, logprobs, logprobs + 1e-4, counts.tolist())

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.counts)

    def completions(self) -> Iterator[Any]:
        """Build the completions one after the other, rewards in turn 0 and 1."""
        from sapo.data import Completion, Score

        for row, count in enumerate(self.counts):
            yield Completion(
                token_ids=as_token_data(self.token_ids[row, :count]),
                logprobs=as_token_data(self.logprobs[row, :count]),
                old_logprobs=as_token_data(self.old_logprobs[row, :count]),
                finish_reason="stop",
                score=Score(float(row % 2)),
            )

    def groups(self) -> list[Any]:
        """Build groups of 8 with advantages."""
        from sapo.data import Group, Prompt

        drawn = self.completions()
        groups: list[Any] = []
        while members := tuple(islice(drawn, SAMPLES)):
            first = len(groups)
            prompt = Prompt(id=first, task="t", text="", token_ids=tuple(range(first, first + PROMPT_LENGTH)))
            groups.append(Group(prompt, members, advantages=tuple(2 * c.score.reward - 1 for c in members)))
        return groups


def resident_bytes() -> int:
    """Read the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(rows: Rows) -> dict[str, float]:
    """Measure bytes a token of completions that are held, by two counts."""
    next(rows.completions())  # imports what it needs
    before = resident_bytes()
    held = list(rows.completions())
    figures = {"resident": (resident_bytes() - before) / rows.num_tokens}
    del held
    gc.collect()
    tracemalloc.start()
    held = list(rows.completions())
    figures["traced"] = tracemalloc.get_traced_memory()[0] / sum(map(len, held))
    tracemalloc.stop()
    return figures


def cpu_timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns and its CPU seconds."""
    started = time.process_time()
    return work(), time.process_time() - started


def measure_pack(rows: Rows) -> dict[str, float]:
    """Measure CPU microseconds a token, the least of three passes over one mini-batch."""
    pack, groups = offered("pack"), rows.groups()
    sizes = {"tokens_per_microbatch": 8192, "max_new_tokens": RESPONSE_LENGTHS[1]}
    passes = [cpu_timed(lambda: pack(groups, normalizer="sequence_mean", **sizes)) for _ in range(3)]
    assert all(packed.num_targets == rows.num_tokens for packed, _ in passes), "tokens were lost on the way"
    return {"pack": min(seconds for _, seconds in passes) / rows.num_tokens * 1e6}


class NoWeights:
    """Stands for a policy whose weights take no time to save."""

    def save(self, directory: Path) -> None:
        """Save the files that a checkpoint must have, and nothing in them."""
        for name in ("config.json", "model.safetensors"):
            (directory / name).write_bytes(b"")


def write_state(directory: Path, state: Any) -> Any:
    """Write a checkpoint without weights by the tree's own function."""
    from sapo.training.checkpoint import save_checkpoint

    policy: Any = NoWeights()
    written = state.serialise() if hasattr(state, "serialise") else (state.to_json(),)
    parts = dict(zip(("state", "batches"), written, strict=False))
    if "save_optimizer" in inspect.signature(save_checkpoint).parameters:
        parts["save_optimizer"] = lambda _: None
    else:
        parts["optimizer_tensors"] = {"step": torch.zeros(1)}
    return save_checkpoint(directory, 1, 0, policy=policy, **parts)


def read_state(checkpoint: Any) -> Any:
    """Verify a checkpoint and read the run's state, as a resume does."""
    checkpoint.verify()
    kind, state = offered("RunState"), checkpoint.state()
    return kind.deserialise(state, checkpoint.batches()) if hasattr(kind, "deserialise") else kind.from_json(state)


def measure_checkpoint(rows: Rows) -> dict[str, float]:
    """Measure CPU seconds and megabytes a million pending tokens."""
    batch = offered("RolloutBatch")(groups=rows.groups(), dropped=[], figures={}, sampled_at=0)
    state = offered("RunState")(step=1, ahead=[batch])
    millions = rows.num_tokens / 1e6
    with tempfile.TemporaryDirectory(prefix="token-data-") as scratch:
        try:
            checkpoint, writing = cpu_timed(lambda: write_state(Path(scratch), state))
            size = sum(f.stat().st_size for f in checkpoint.path.rglob("*") if f.is_file())
            restored, reading = cpu_timed(lambda: read_state(checkpoint))
        except (ImportError, AttributeError, TypeError) as error:
            raise NotOfferedError(f"this tree writes its state in another way: {error}") from error
    if pending_numbers(restored) != pending_numbers(state):
        raise NotOfferedError("the state that was read back does not hold the tokens that were written")
    return {"write": writing / millions, "size": size / 1e6 / millions, "read": reading / millions}


def pending_numbers(state: Any) -> list[list[float]]:
    """List tokens and log-probs of all pending completions."""
    completions = chain.from_iterable(g.completions for batch in state.ahead for g in batch.groups)
    return [[*map(float, numbers)] for c in completions for numbers in (c.token_ids, c.logprobs, c.old_logprobs)]


def measure_side(tree: Path, scale: float) -> dict[str, float]:
    """Measure the tree that this process imports; figures that it does not offer are left out."""
    import sapo.training.checkpoint as imported  # all of it before memory is looked at

    assert Path(imported.__file__).is_relative_to(tree), f"sapo was imported from {imported.__file__}, not from {tree}"
    torch.set_num_threads(1)
    pending = Rows.draw(max(1, int(PENDING_TOKENS / 2000 / SAMPLES * scale)) * SAMPLES)
    packed = Rows.draw(max(1, int(PACKED_PROMPTS * scale)) * SAMPLES, seed=1)
    figures = measure_memory(pending)
    for measure, rows in ((measure_pack, packed), (measure_checkpoint, pending)):
        try:
            figures |= measure(rows)
        except NotOfferedError as error:
            print(f"not measured: {measure.__name__} of {tree}: {error}", file=sys.stderr)
    return figures


def run_side(tree: Path, scale: float) -> dict[str, float]:
    """Measure a tree in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.token_data", "--side", str(tree), "--scale", str(scale)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring {tree} failed:\n{done.stderr}")
    # Libraries say things of their own on standard error.
    print(*(line + "\n" for line in done.stderr.splitlines() if line.startswith("not measured")), sep="", end="")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_round(trees: list[Path], scale: float, reverse: bool) -> list[dict[str, float]]:
    """Measure both trees, the second first in every other round."""
    figures = [run_side(tree, scale) for tree in (trees[::-1] if reverse else trees)]
    return figures[::-1] if reverse else figures


def shown(values: list[float]) -> str:
    """Write median and range."""
    if not values:
        return "not measured"
    return f"{statistics.median(values):.3g} ({min(values):.3g} .. {max(values):.3g})"


def table_row(key: str, rounds: list[list[dict[str, float]]]) -> str:
    """Write a line of the table; the ratio is the median over rounds."""
    base, head = ([figures[side][key] for figures in rounds if key in figures[side]] for side in (0, 1))
    ratio, (goal, reached) = "", GOALS.get(key, ("", None))
    if base and head:
        ratio = f"{statistics.median(old / new for old, new in zip(base, head, strict=True)):.3g}"
        if reached is not None:
            goal += ": met" if reached(statistics.median(base), statistics.median(head)) else ": missed"
    return f"| {MEASURES[key]} | {shown(base)} | {shown(head)} | {ratio} | {goal} |"


def main(arguments: list[str] | None = None) -> None:
    """Measure both sides in turn and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.token_data", description="What a token costs as data.")
    parser.add_argument("base", metavar="BASE", nargs="?", default="92f144a", help="a commit or a directory")
    parser.add_argument("head", metavar="HEAD", nargs="?", default=str(REPOSITORY), help="default: the working tree")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the tokens; below 0.1 is for a look only")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side is not None:
        print(json.dumps(measure_side(options.side, options.scale)))
        return
    with tempfile.TemporaryDirectory(prefix="token-data-") as scratch:
        trees = [source_tree(n, Path(scratch, side)) for side, n in (("base", options.base), ("head", options.head))]
        rounds = [measure_round(trees, options.scale, number % 2 == 1) for number in range(options.rounds)]
    print("| measure | BASE | HEAD | BASE / HEAD | goal of HEAD |\n|---|---|---|---|---|")
    for key in MEASURES:
        print(table_row(key, rounds))


if __name__ == "__main__":
    main()
