"""Every command times bad arguments: refused in a line with exit code 2, nothing written, nothing changed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

from support.runs import REWARD, write_recipe
from trials.damage import SMALL
from trials.harness import Tally, call, changes, everything

LONG = "a" * 300
PATHS = (
    "",
    LONG,
    "missing",
    "/proc/x",
    "/dev/null/x",
    "dangling",
    "loop",
    "run/config.yaml",
    "/",
    "not\nthere",
    "x/../y",
)
NUMBERS = ("nan", "inf", "-1", "0", "1e400", "9" * 40, "x", "", "true", "1e308", "-0.0", "1e-320")
OUTPUTS = ("", "/proc/x", f"{LONG}/x", LONG, "dangling/x", "loop", "/dev/full/x", "run", "run/config.yaml")


def commands() -> Iterator[tuple[str, ...]]:
    """Yield every call."""
    for path in PATHS:
        begun = path == "run/config.yaml"  # a recipe, which would be trained
        yield from ((command, path) for command in ("resume", "coldstart", "eval", "report"))
        yield from ((command, path) for command in ("train", "compare") if not begun)
        yield from (
            ("generate", path, "1+1="),
            ("export", path, "out"),
            ("diagnose", path),
            ("eval-compare", path, path),
        )
        yield ("conformance", path)
        yield ("resume", "run", "--accept-changes", path or ",")
        yield ("eval", "run", "--task", path or "x", "--problems", "2")
        yield ("train", "recipe.yaml", f"run_dir={path or 'run'}", "--dry-run")
        yield ("train", "recipe.yaml", f"model.path={path or 'x'}", "--dry-run")
        yield ("train", "recipe.yaml", f"tasks.0.path={path or 'x'}", "--dry-run")
    for number in NUMBERS:
        for option in ("--problems", "--samples", "--k", "--threshold", "--max-new-tokens", "--temperature", "--top-p"):
            yield ("eval", "run", option, number, "--out", "new", "--no-constant")
        yield ("eval", "run", "--seed", number, "--problems", "2", "--out", "new", "--no-constant")
        for option in ("--max-new-tokens", "--temperature", "--top-p", "--seed", "--samples"):
            yield ("generate", "run", "1+1=", option, number)
        for option in ("--seeds", "--jobs", "--learning-rates", "--objectives", "--baseline", "--arms"):
            yield ("compare", "recipe.yaml", option, number or "x", "--out", "/proc/x")
        yield ("report", "run", "--tokens", number, "--out", "page.html")
        for key in ("train.steps", "train.learning_rate", "seed", "rollout.temperature", "rollout.max_new_tokens"):
            yield ("train", "recipe.yaml", f"{key}={number}", "--dry-run", "run_dir=/proc/x")
        for option in ("--problems", "--samples", "--batches", "--seed"):
            yield ("diagnose", "run", option, number)
        yield ("resume", "run", f"train.steps={number}")
    for out in OUTPUTS:
        yield ("report", "run", "--out", out)
        yield ("report", "run", "--out", "page.html", "--png", out)
        yield ("export", "run", out)
        yield ("eval", "run", "--problems", "2", "--samples", "1", "--no-constant", "--out", out)
        yield ("conformance", "trl", "--markdown", out)
        yield ("compare", "recipe.yaml", "--out", out, "--jobs", "x")
        yield ("train", "recipe.yaml", f"run_dir={out}", "train.steps=x")
    for override in ("a", "=", "a=&a [*a]", "train=1", "tasks.x=1", "tasks.9.name=x", "model={", "seed=[", "a.b.c=1"):
        yield from (
            ("train", "recipe.yaml", override, "--dry-run", "run_dir=/proc/x"),
            ("resume", "run", override),
            ("eval", "run", override, "--task", "arithmetic"),
            ("compare", "recipe.yaml", override, "--out", "/proc/x"),
            ("conformance", override),
        )


def make(place: Path) -> None:
    """Make a run, and links that lead nowhere."""
    (place / "rewards_of_a_test.py").write_text(REWARD)
    outcome = call("train", str(write_recipe(place, **SMALL, run_dir="run")), patience=300)
    assert outcome.code == 0, outcome
    (place / "dangling").symlink_to("nowhere")
    (place / "loop").symlink_to("loop")
    (place / "recursive.yaml").write_text("a: &a [*a]\n")


def run(place: Path, *, share: float = 1.0, seed: int = 0, tally: Tally | None = None) -> Tally:
    """Try a share of all calls. A call that is refused must leave every file as it was."""
    tally = tally or Tally()
    os.chdir(place)
    make(place)
    before = everything(place)
    drawn = random.Random(seed)
    for command in [
        *commands(),
        ("train", "recursive.yaml"),
        ("compare", "recursive.yaml"),
        ("report", "recursive.yaml"),
    ]:
        if drawn.random() >= share:
            continue
        outcome = call(*command)
        after = everything(place)
        left = [name for name in changes(before, after) if not name.startswith("__pycache__")]
        fault = f"refused, and left {', '.join(left)[:200]}" if outcome.code == 2 and left else None
        tally.add(" ".join(word if len(word) < 60 else f"{word[:20]}..." for word in command), outcome, fault)
        before = after
    return tally
