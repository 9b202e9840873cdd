"""Run directories for the tests of reports, written in a moment: made-up figures, ratios that are consistent."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models

from sapo.workflows.comparing.outcomes import RunOutcome
from sapo.workflows.comparing.plan import ComparisonPlan
from sapo.workflows.comparing.results import ComparisonResults

ATTACKS = [
    "</script><script>window.hacked = 'script'</script>",
    "<img src=x onerror=\"window.hacked='image'\">",
    "<svg onload=\"window.hacked='svg'\"></svg>",
    "<!--<script>",
    "javascript:window.hacked=1",
    "\u202egnorw",
    "\x1b[2J\x07bell",
]
WORDS = [*(str(i) for i in range(10)), "\n", " twelve", *ATTACKS]
END = len(WORDS)


def write_tokenizer(file: Path) -> None:
    """One token for each of WORDS, attacks whole, and an end token."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*WORDS, "<end>"])}, unk_token="<end>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))


def settings(seed: int = 0, steps: int = 4, **objective: Any) -> dict[str, Any]:
    """A config.yaml, with what a report reads of it."""
    return {
        "run_dir": "somewhere",
        "seed": seed,
        "model": {"path": None, "coldstart": {"architecture": "qwen3", "hidden_size": 64}},
        "objective": {"name": "sapo", "normalizer": "sequence_mean", "tau_pos": 1.0, "tau_neg": 1.05, **objective},
        "tasks": [{"name": "arithmetic", "digits": 4}],
        "train": {"steps": steps, "minibatches": 2, "learning_rate": 1e-4},
    }


def step_records(steps: int, shift: float = 0.0, extra: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Evaluations at both ends, and a line for each update and step."""

    def evaluation(step: int) -> dict[str, Any]:
        value = 0.25 + 0.1 * step / steps + shift
        figures = {"pass@1": value, "pass@1/low": value - 0.03, "pass@1/high": value + 0.04, "mean@4": value}
        return {"kind": "eval", "step": step, "task": "add4", "problems": 8, "samples": 4, **figures, "timing": {}}

    records = [evaluation(0)]
    for step in range(1, steps + 1):
        for update in range(2):
            drift = update * (0.01 + 0.001 * step) + shift / 100
            figures = {"gate/eur": 1 - drift, "gate/eur_pos": 1 - drift / 2, "gate/eur_neg": 1 - drift, "gate/min": 0.5}
            records.append({"kind": "update", "step": step, "update": update, "skipped": False, **figures})
        figures = {
            "reward/mean": 0.3 + math.sin(step) / 10 + shift,
            "update/entropy": 0.05 + 0.01 / step,
            "groups/zero_variance": 0.1 + 0.01 * step,
            "tokens/generated": 100 + step,
        }
        timing = {"seconds": 1.5, "generate": 1.0, "update": 0.5, "tokens_per_second": 70.0}
        records.append({"kind": "step", "step": step, **figures, **(extra or {}), "timing": timing})
    return [*records, evaluation(steps)]


def rollout_row(
    prompt: int, sample: int, token_ids: list[int], *, update: int | None = 1, **changes: Any
) -> dict[str, Any]:
    """A completion; its ratios are exp of -0.4 .. 0.4 in turn, its weights SAPO's at 1 / 1.05."""
    advantage = 1.0 if sample == 0 else -1.0
    row: dict[str, Any] = {
        "prompt_id": prompt,
        "task": "add4",
        "prompt": f"question {prompt}",
        "answer": str(prompt),
        "sample": sample,
        "text": "".join([*WORDS, ""][i] for i in token_ids),
        "reward": float(sample == 0),
        "status": "scored",
        "detail": "",
        "advantage": advantage,
        "finish_reason": "stop",
        "prompt_token_ids": [1],
        "token_ids": token_ids,
        "logprobs": [-0.125] * len(token_ids),
        "old_logprobs": [-0.125] * len(token_ids),
    }
    if update is not None:
        tau = 1.0 if advantage > 0 else 1.05
        z = [0.1 * (t % 9 - 4) * (update > 0) for t in range(len(token_ids))]
        row |= {
            "update": update,
            "log_ratio": z,
            "gate_weight": [1 / math.cosh(tau * (math.exp(v) - 1) / 2) ** 2 for v in z],
            "entropy": [0.01 * (t + 1) for t in range(len(token_ids))],
        }
    return row | changes


def default_rows() -> list[dict[str, Any]]:
    """Four prompts of two samples: the first three were measured, each attack is a token of some sample."""
    rows = []
    for prompt in range(4):
        for sample in range(2):
            attacks = [10 + 2 + (2 * prompt + sample) % len(ATTACKS)]
            ids = [prompt, 3, 10, 11, *attacks, 5, 6, 7, 8, 9, END]
            update = None if prompt == 3 else prompt % 2
            rows.append(rollout_row(prompt, sample, ids, update=update))
    return rows


def write_run(
    path: Path,
    *,
    config: dict[str, Any] | None = None,
    records: list[dict[str, Any]] | None = None,
    rollouts: dict[int, list[dict[str, Any]]] | None = None,
    finished: bool = True,
    tokenizer: bool = True,
) -> Path:
    """A run directory of four steps, the second and the fourth with their completions."""
    config = config or settings()
    steps = config["train"]["steps"]
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    records = step_records(steps) if records is None else records
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for step, rows in ({2: default_rows(), 4: default_rows()} if rollouts is None else rollouts).items():
        (path / "rollouts").mkdir(exist_ok=True)
        file = path / "rollouts" / f"step-{step:06d}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    if tokenizer:
        write_tokenizer(path / "checkpoints" / f"step-{steps:06d}" / "tokenizer.json")
    if finished:
        write_summary(path, steps)
    return path


def write_summary(path: Path, steps: int, **more: Any) -> None:
    """summary.json of a run that has ended."""
    seconds = {"generate": 4.0, "update": 2.5, "total": 6.5}
    summary = {"steps": steps, "tokens": {"generated": 410, "trained": 300}, "seconds": seconds, **more}
    (path / "summary.json").write_text(json.dumps(summary))


RATES = (1e-4, 3e-4)
PROBLEMS, SAMPLES = 8, 2
FINALS = {
    ("soft", 0): (2, 2, 1, 1, 1, 0, 0, 0),
    ("soft", 1): (1, 2, 2, 1, 0, 0, 2, 0),
    ("hard", 0): (1, 0, 0, 0, 0, 0, 0, 0),
    ("hard", 1): (1, 0, 1, 0, 1, 0, 0, 0),
}
"""Right samples of each held-out problem in the end, by arm and seed, at both rates: odd sixteenths among them."""


def comparison_plan(seeds: tuple[int, ...] = (0, 1)) -> ComparisonPlan:
    """Two arms at two learning rates."""
    base = {
        "model": {"coldstart": {"architecture": "qwen3"}},
        "tasks": [{"name": "arithmetic"}],
        "train": {"steps": 4},
        "eval": {"problems": PROBLEMS, "samples": SAMPLES},
    }
    arms = {"soft": {"objective.name": "sapo"}, "hard": {"objective.name": "grpo"}}
    return ComparisonPlan.of("made", base, arms, learning_rates=list(RATES), seeds=list(seeds))


def write_comparison(
    path: Path, *, failed: tuple[str, ...] = (), under_way: tuple[str, ...] = (), to_come: tuple[str, ...] = ()
) -> ComparisonResults:
    """A comparison's directory with its comparison.yaml and runs; results.json where all have ended."""
    plan = comparison_plan()
    path.mkdir(parents=True)
    (path / "comparison.yaml").write_text(yaml.safe_dump(plan.to_json(), sort_keys=False))
    for run in plan.runs(path):
        if run.name in to_come:
            continue
        stopped = run.name in (*failed, *under_way)
        records = [r for r in step_records(4, run.seed / 100) if not (stopped and r["step"] > 2)]
        records = [r for r in records if r["kind"] != "eval"]
        ends = {0: (1, 1, 1, 1, 0, 0, 0, 0), 2: (2, 2, 1, 1, 0, 0, 0, 0), 4: FINALS[run.arm, run.seed]}
        for step, correct in ends.items():
            if not (stopped and step > 2):
                share = sum(correct) / PROBLEMS / SAMPLES
                own = {"task": "add4", "samples": SAMPLES, "correct": list(correct), "pass@1": share}
                records.append({"kind": "eval", "step": step, **own})
        if run.arm == "hard":
            for step in (1, 2):
                warning = {"cause": "ratio_tail", "collapse": False, "threshold": 20, "text": f"step {step}: far"}
                records.append({"kind": "warning", "step": step, **warning})
        config = run.config.model_dump(mode="json")
        written = write_run(run.directory, config=config, records=records, finished=not stopped)
        if run.name in failed:
            (written / "failure.json").write_text(json.dumps({"reason": "step 3: the loss is <b>nan</b>"}))
    results = ComparisonResults.of(plan, [RunOutcome.of(run) for run in plan.runs(path)])
    if not (under_way or to_come):
        (path / "results.json").write_text(json.dumps(results.to_json()))
    return results
