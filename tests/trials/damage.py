"""Damaged files: every file that a run, an evaluation or a comparison leaves, in every way that a file can be wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from support.runs import REWARD, write_recipe
from trials.harness import Outcome, Tally, call

SMALL = {
    "train__steps": 2,
    "train__minibatches": 2,
    "checkpoint__every": 1,
    "eval__every": 0,
    "rollout__max_new_tokens": 4,
    "log__rollouts_every": 1,
}


def _write(content: bytes) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        _clear(file)
        file.write_bytes(content)

    return damage


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _half(file: Path) -> None:
    if file.is_file():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _directory(file: Path) -> None:
    _clear(file)
    (file / "inside").mkdir(parents=True)


def _dangling(file: Path) -> None:
    _clear(file)
    file.symlink_to("nowhere")


def _values(replacement: object) -> Callable[[Path], None]:
    """Replace every value of a JSON or YAML file's top level, line by line for JSON lines."""

    def damage(file: Path) -> None:
        if file.suffix == ".jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            file.write_text("".join(json.dumps(dict.fromkeys(line, replacement)) + "\n" for line in lines))
        elif file.suffix in (".json", ".yaml"):
            value = yaml.safe_load(file.read_text())
            file.write_text(json.dumps(dict.fromkeys(value, replacement)))
        else:
            _write(b"x")(file)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a list": _write(b"[]"),
    "null": _write(b"null"),
    "an empty object": _write(b"{}"),
    "a number": _write(b"7\n"),
    "a text": _write(b'"x"\n'),
    "a list of one": _write(b"[1]\n"),
    "not UTF-8": _write(b"\xff\xfe{\x00"),
    "empty": _write(b""),
    "binary": _write(bytes(range(256)) * 8),
    "deep": _write(b"[" * 100_000),
    "contains itself": _write(b"a: &a [*a]\nkind: x\n"),
    "half": _half,
    "a directory": _directory,
    "a dangling link": _dangling,
    "values null": _values(None),
    "values lists": _values([]),
    "values texts": _values("x"),
    "values negative": _values(-1),
    "gone": _clear,
}


@dataclass(frozen=True)
class Subject:
    """Something that the command line leaves, and what reads it."""

    directory: Path
    """Its name in the place where it is made."""
    files: tuple[str, ...]
    calls: tuple[tuple[str, ...], ...]


def make(place: Path) -> list[Subject]:
    """Make a run with two checkpoints, an evaluation and a comparison."""
    (place / "rewards_of_a_test.py").write_text(REWARD)
    recipe = write_recipe(place, **SMALL, run_dir="run")
    for command in (
        ("train", str(recipe)),
        ("eval", "run", "--problems", "2", "--samples", "2", "--out", "evaluation", "--no-constant"),
        ("eval", "run", "--problems", "2", "--samples", "2", "--out", "other", "--no-constant", "--seed", "3"),
        (
            *("compare", str(recipe), "--objectives", "sapo,grpo", "--seeds", "2", "--jobs", "1"),
            *("--out", "comparison", "train.steps=1"),
        ),
    ):
        outcome = call(*command, patience=300)
        assert outcome.code == 0, (command, outcome)
    newest = "checkpoints/step-000002"
    of_a_run = [
        *("config.yaml", "inputs.json", "metrics.jsonl", "summary.json", ".lock", "rollouts", "checkpoints"),
        *(newest, f"{newest}/manifest.json", f"{newest}/state.json", f"{newest}/config.json"),
        *(f"{newest}/model.safetensors", f"{newest}/optimizer.safetensors", f"{newest}/batches.safetensors"),
        *(f"{newest}/tokenizer.json", f"{newest}/tokenizer_config.json", f"{newest}/generation_config.json"),
        "rollouts/step-000001.jsonl",
    ]
    resume = ("resume", "run", "train.steps=3")
    evaluate = ("eval", "run", "--problems", "2", "--samples", "2", "--out", "new", "--no-constant")
    again = ("eval", "run", "--problems", "2", "--samples", "2", "--out", "evaluation", "--no-constant")
    generate = ("generate", "run", "1+1=", "--max-new-tokens", "2")
    one = "runs/sapo-lr1e-3-seed0"
    return [
        Subject(
            Path("run"),
            tuple(of_a_run),
            (resume, ("export", "run", "exported"), ("report", "run", "--out", "page.html"), evaluate, generate),
        ),
        Subject(
            Path("evaluation"),
            ("config.json", "results.json", "completions.jsonl", "index.html", ".lock", "progress.jsonl"),
            (again, ("eval-compare", "evaluation", "other")),
        ),
        Subject(
            Path("comparison"),
            (
                *("comparison.yaml", "results.json", "table.md", "runs", "logs", ".lock"),
                *(f"{one}/config.yaml", f"{one}/metrics.jsonl", f"{one}/summary.json", f"{one}/failure.json"),
            ),
            (("compare", "comparison"), ("report", "comparison", "--out", "page.html")),
        ),
    ]


def remanifest(checkpoint: Path) -> None:
    """Write the manifest anew, as if the damage had been there when the checkpoint was written."""
    import hashlib

    files = [f for f in checkpoint.rglob("*") if f.is_file() and f.name != "manifest.json"]
    manifest = {
        str(f.relative_to(checkpoint)): {
            "size": f.stat().st_size,
            "sha256": hashlib.sha256(f.read_bytes()).hexdigest(),
        }
        for f in files
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def cases(subjects: list[Subject]) -> Iterator[tuple[Subject, str, str, bool, tuple[str, ...]]]:
    """Yield every case: subject, file, damage, whether the manifest is written anew, call."""
    for subject in subjects:
        for file in subject.files:
            for damage in DAMAGES:
                anew = [False, True] if "step-000002/" in file and not file.endswith("manifest.json") else [False]
                for written_anew in anew:
                    for command in subject.calls:
                        yield subject, file, damage, written_anew, command


def run(place: Path, *, share: float = 1.0, seed: int = 0, tally: Tally | None = None) -> Tally:
    """Try a share of all cases in a directory.

    Args:
        place: empty; the process works in it.
        share: part of the cases, drawn by `seed`.
    """
    tally = tally or Tally()
    os.chdir(place)
    subjects = make(place)
    whole = place.parent / f"{place.name}-whole"
    shutil.copytree(place, whole, symlinks=True)
    drawn = random.Random(seed)
    for subject, file, damage, anew, command in cases(subjects):
        if drawn.random() >= share:
            continue
        target = place / subject.directory / file
        # The files of a run whose end cannot be one of a file that is not there.
        if (not target.exists() and damage in ("half", "gone")) or _unfit(target, damage):
            continue
        DAMAGES[damage](target)
        if anew:
            remanifest(target.parent)
        outcome: Outcome = call(*command)
        name = f"{subject.directory}/{file} {damage}{' (manifest anew)' if anew else ''}: {' '.join(command)}"
        tally.add(name, outcome)
        _restore(whole, place)
    return tally


def _unfit(target: Path, damage: str) -> bool:
    return damage.startswith("values") and (not target.is_file() or target.suffix not in (".json", ".jsonl", ".yaml"))


def _restore(whole: Path, place: Path) -> None:
    for entry in place.iterdir():
        if entry.name not in ("model", "__pycache__", "prompts.jsonl"):
            _clear(entry)
    for entry in whole.iterdir():
        target = place / entry.name
        if not os.path.lexists(target):
            shutil.copytree(entry, target, symlinks=True) if entry.is_dir() else shutil.copy2(entry, target)
