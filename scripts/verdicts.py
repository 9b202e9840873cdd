r"""Judge graded cases with our verifiers and with math-verify alone, and print a table by kind in Markdown.

    python -m scripts.verdicts DIRECTORY

The directory has files *.jsonl. A line is a case: `response`, `expected` (1 or 0), and `reference` with `verifier` (a
name or its options; math without one), or `tests` for a program. `situation` or `kind` names its kind, and `debatable`
says that its label is a matter of taste. math-verify gets the cases of `math` as it is: the response, and the reference
in a box.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sapo.data import Prompt
from sapo.tasks.verifiers.registry import build_verifier, load_verifier

HEADINGS = ("kind", "cases", "right", "wrong answers rewarded", "right answers not", "debatable otherwise")


def main() -> None:
    """Print the table of the directory that the command line names."""
    if len(sys.argv) != 2 or not (files := sorted(Path(sys.argv[1]).glob("*.jsonl"))):
        raise SystemExit("usage: python -m scripts.verdicts DIRECTORY, a directory with files *.jsonl of cases")
    ours: dict[str, Counter[str]] = {}
    theirs: dict[str, Counter[str]] = {}
    for case in (case for file in files for case in _cases(file)):
        kind = _kind(case)
        ours.setdefault(kind, Counter())[_verdict(case, _our_reward(case))] += 1
        if "tests" not in case and case.get("verifier", "math") == "math":
            theirs.setdefault(kind, Counter())[_verdict(case, _their_reward(case))] += 1
    print("\n".join(_table("sapo", ours) + [""] + _table("math-verify alone", theirs)))


def _cases(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        yield json.loads(line)


def _kind(case: dict[str, Any]) -> str:
    if "tests" in case:
        forged = str(case.get("situation") or case.get("kind")).startswith("forge")
        return "forged programs" if forged else "programs"
    verifier = case.get("verifier", "math")
    name = verifier["name"] if isinstance(verifier, dict) else verifier
    return f"math: {case.get('situation') or case.get('kind')}" if name == "math" else str(name)


def _verdict(case: dict[str, Any], reward: float) -> str:
    if (reward == 1.0) == bool(case["expected"]):
        return "right"
    return "debatable" if case.get("debatable") else "missed" if case["expected"] else "rewarded"


_made: dict[str, Any] = {}


def _our_reward(case: dict[str, Any]) -> float:
    spec = "code" if "tests" in case else case.get("verifier", "math")
    key = json.dumps(spec, sort_keys=True)
    if key not in _made:
        # Algebra that may hang runs in a worker, as in training.
        _made[key] = load_verifier(spec) if spec == "math" else build_verifier(spec)
    metadata = {"tests": case["tests"]} if "tests" in case else case.get("metadata") or {}
    try:
        prompt = Prompt(id=0, task="t", text="?", answer=case.get("reference"), metadata=metadata)
        return float(_made[key](case["response"], prompt).reward)
    except Exception:  # a case that cannot be judged has no reward
        return 0.0


def _their_reward(case: dict[str, Any]) -> float:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        gold = math_verify.parse(f"\\boxed{{{case['reference']}}}")
        return float(math_verify.verify(gold, math_verify.parse(case["response"])))
    except Exception:  # it also raises what is no Exception of its own, such as a timeout
        return 0.0


def _table(title: str, counts: dict[str, Counter[str]]) -> list[str]:
    lines = [f"**{title}**", "", "| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    total: Counter[str] = sum(counts.values(), Counter())
    for kind, count in [*sorted(counts.items()), ("all", total)]:
        cells = [sum(count.values()), *(count[name] for name in ("right", "rewarded", "missed", "debatable"))]
        lines.append(f"| {kind} | " + " | ".join(map(str, cells)) + " |")
    return lines


if __name__ == "__main__":
    main()
