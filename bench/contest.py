"""A contest: several sides with the same work, each a process of its own, in turn: A B C, A B C, ...

Ratios are taken round by round, so that a machine whose speed drifts does not decide; a process each, so that no side's
memory, threads or caches are another's. Each contest has the machine itself among its sides (sides/machine.py): its
limits are of the same minutes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class SideError(RuntimeError):
    """A side that did not start or did not answer; the message ends with the last it said."""


@dataclass(frozen=True)
class SideSpec:
    """What to start.

    >>> SideSpec("generate float32", "hf", {"role": "generate", "dtype": "float32"}).module
    'hf'
    """

    name: str
    module: str
    """One of bench/sides."""
    settings: dict[str, Any]
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    rounds: int | None = None
    """Fewer rounds than the contest's, for a side that takes minutes."""

    @property
    def is_ours(self) -> bool:
        """Whether it is held against the others."""
        return self.name.startswith("sapo")


class Side:
    """A side's process, from `ready` until the context ends."""

    def __init__(self, spec: SideSpec, settings: dict[str, Any], scratch: Path, timeout: float) -> None:
        self.spec = spec
        self.timeout = timeout
        place = Path(tempfile.mkdtemp(prefix="side-", dir=scratch))
        file, self._log = place / "settings.json", place / "stderr.txt"
        file.write_text(json.dumps({**settings, **spec.settings, "scratch": str(place)}))
        threads = str(settings["threads"])
        self._stderr = self._log.open("w")
        self._process = subprocess.Popen(
            [spec.python, "-m", "bench.sides", spec.module, str(file)],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": os.pathsep.join(sys.path if spec.python == sys.executable else [str(ROOT)]),
                **spec.environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            start_new_session=True,
        )
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, do: str) -> dict[str, Any]:
        """One round.

        Raises:
            SideError: it ended, or took longer than `timeout` seconds.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer says what happened
            self._process.stdin.write(json.dumps({"do": do}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        watchdog = threading.Timer(self.timeout, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            self._process.wait(timeout=10)
            raise SideError(f"{self.spec.name} ended with code {self._process.returncode}: {self._last_words()}")
        return dict(json.loads(line))

    def _last_words(self) -> str:
        lines = [s.strip() for s in self._log.read_text(errors="replace").splitlines() if s.strip()]
        errors = [s for s in lines if "Error" in s]
        return (errors or lines or ["it said nothing"])[-1][:300]

    def close(self) -> None:
        """Hang up; whatever is left of it a few seconds later is ended."""
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its group, which is its own
        self._process.wait()
        self._stderr.close()


@dataclass(frozen=True)
class Contest:
    """Sides and the work they share.

    `settings` is what every side is told: from `workloads.settings_of`, or whatever the sides of this contest read.
    """

    name: str
    title: str
    unit: str
    sides: tuple[SideSpec, ...]
    settings: Callable[[Path], dict[str, Any]]
    rounds: int
    limit: str | None = None
    """Which of bench/limits.py says how fast the machine could be."""


@dataclass(frozen=True)
class Machine:
    """What is the same for every side of a run.

    >>> Machine(threads=1, device="cpu").timeout
    1200.0
    """

    threads: int
    device: str
    timeout: float = 1200.0
    """Seconds after which a side that has not answered is given up."""


def run_contest(
    contest: Contest, machine: Machine, scratch: Path, rounds: int | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """All rounds of all sides.

    A peer that cannot run is left out, with its reason; ours failing is an error.

    Returns:
        Name, title, unit, the settings that matter, and for each side `seconds` (one a round), `work`, `peak` bytes,
        `facts`, `backends` and, where it could not run, `error`.

    Raises:
        SideError: one of our sides failed.
        ValueError: two sides did not do the same work.
    """
    settings = {**contest.settings(scratch), "threads": machine.threads, "device": machine.device}
    record: dict[str, dict[str, Any]] = {s.name: {"seconds": [], "facts": []} for s in contest.sides}
    limits = SideSpec("machine", "machine", {})
    with ExitStack() as stack:
        running: dict[str, Side] = {}
        for spec in (*contest.sides, limits):
            say(f"{contest.name}: starting {spec.name}")
            with _reported(spec, record):
                running[spec.name] = stack.enter_context(_started(spec, settings, scratch, machine.timeout))
        machine_facts = []
        for number in range(rounds or contest.rounds):
            for spec in contest.sides:
                done = spec.rounds is not None and number >= spec.rounds
                if done or spec.name not in running or "error" in record[spec.name]:
                    continue
                with _reported(spec, record):
                    answer = running[spec.name].ask("run")
                    _note(record[spec.name], answer)
                    say(f"{contest.name}: round {number + 1}, {spec.name}: {answer['seconds']:.2f} s")
            machine_facts.append(running["machine"].ask("run")["facts"])
        for name, side in running.items():
            if name in record:
                record[name] |= {k: v for k, v in side.about.items() if k != "ready"}
    check_same_work(contest.name, record)
    shown = ("shape", "prompt_lengths", "limits", "minibatches", "tokens", "hidden", "vocabulary")
    return {
        "name": contest.name,
        "title": contest.title,
        "unit": contest.unit,
        "limit": contest.limit,
        "settings": {k: settings[k] for k in shown if k in settings},
        "machine": machine_facts,
        "sides": record,
    }


@contextmanager
def _started(spec: SideSpec, settings: dict[str, Any], scratch: Path, timeout: float) -> Iterator[Side]:
    side = Side(spec, settings, scratch, timeout)
    try:
        yield side
    finally:
        side.close()


@contextmanager
def _reported(spec: SideSpec, record: dict[str, dict[str, Any]]) -> Iterator[None]:
    """A peer's failure is part of the table; ours, or the machine's, is ours to mend."""
    try:
        yield
    except (SideError, FileNotFoundError) as error:
        if spec.is_ours or spec.name not in record:
            raise
        record[spec.name]["error"] = f"{error}"


def _note(record: dict[str, Any], answer: dict[str, Any]) -> None:
    record["seconds"].append(answer["seconds"])
    record["work"] = answer["work"]
    record["peak"] = answer["peak"]
    record["facts"].append(answer["facts"])


TOLERANCE = 5e-3
"""Largest difference of two losses or gradient norms, relative to the larger."""
FIRST_TOLERANCE = 5e-2
"""The same where a side computes in bfloat16, of the first loss only: later ones are of ratios that its 8 bits blur."""


def check_same_work(name: str, record: dict[str, dict[str, Any]]) -> None:
    """Hold the sides' facts of the first round together: tokens exactly, losses and gradient norms nearly.

    Raises:
        ValueError: naming the two sides and what differs.
    """
    ran = [(side, r["facts"][0], r["work"]) for side, r in record.items() if r.get("facts")]
    if not ran:
        return
    first, known, work = ran[0]
    for side, facts, its_work in ran[1:]:
        if its_work != work or facts.get("tokens") != known.get("tokens"):
            raise ValueError(
                f"{name}: every side must do the same work; {first} did {work} ({known.get('tokens')} tokens), "
                f"{side} {its_work} ({facts.get('tokens')})"
            )
        blurred = "bfloat16" in first + side
        for fact in ("losses", "norms", "loss", "norm"):
            if fact in known and fact in facts and not _near(known[fact], facts[fact], blurred):
                raise ValueError(f"{name}: {fact} of {first} and {side} differ: {known[fact]} and {facts[fact]}")


def _near(a: Any, b: Any, blurred: bool) -> bool:
    pairs = list(zip(a, b, strict=True)) if isinstance(a, list) else [(a, b)]
    tolerance = FIRST_TOLERANCE if blurred else TOLERANCE
    return all(abs(x - y) <= tolerance * max(abs(x), abs(y)) for x, y in (pairs[:1] if blurred else pairs))
