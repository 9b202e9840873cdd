"""docs/metrics.md and what runs write: every name of the one is in the other."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import sapo
from sapo.diagnostics.titles import TITLES, titles_table
from sapo.errors import CollapseError
from support.game import GAME
from support.kernels import fresh_cache
from support.runs import write_mixture, write_model, write_recipe

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"

REWARD = '''
from sapo.data import Score


def share_of_sevens(completion, answer):
    """As in runs.REWARD, with the answer it saw and one more figure."""
    return Score(completion.count("7") / 8, answer=completion[:1] or "none", figures={"length": float(len(completion))})


def enough_sevens(completion, metadata):
    """Likewise."""
    return Score(float(completion.count("7") >= metadata["sevens"]), figures={"length": float(len(completion))})
'''


def expansions(pattern: str) -> list[str]:
    """`a/{b,c}` as a/b and a/c."""
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    options, _, after = rest.partition("}")
    return [name for option in options.split(",") for name in expansions(before + option + after)]


def documented() -> dict[str, set[str]]:
    """Kind -> names, with their <placeholders>; names that every kind has are left out."""
    names: dict[str, set[str]] = {}
    for section in re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]:
        kind = re.match(r"`(\w+)`", section)
        assert kind, section[:40]
        rows = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
        names[kind[1]] = {name for row in rows for name in expansions(row)}
    return names


def matches(name: str, key: str) -> bool:
    """A placeholder stands for anything without a slash."""
    return (
        re.fullmatch(re.sub(r"<\w+>", "[^/]+", re.escape(name).replace(r"\<", "<").replace(r"\>", ">")), key)
        is not None
    )


def written(run: Path) -> dict[str, set[str]]:
    keys: dict[str, set[str]] = defaultdict(set)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        keys[record["kind"]] |= set(record) - {"kind", "step", "timing"}
    return keys


def write_mixture_of_experts(directory: Path, **changes: Any) -> Path:
    file = write_recipe(directory, **changes)
    write_model(directory / "model", "qwen3_moe")
    return file


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What runs of all sorts write, by kind."""
    root = tmp_path_factory.mktemp("runs")
    found: dict[str, set[str]] = defaultdict(set)
    eval_all = {"every": 0, "problems": 2, "samples": 2, "k": [1, 2], "greedy": True, "constant": True}
    short = {"train__steps": 2, "train__learning_rate": 1e-2, "checkpoint__every": 0, "log__rollouts_every": 0}
    runs: dict[str, tuple[Any, dict[str, Any]]] = {
        "penalised": (
            write_mixture,
            {
                "rollout__zero_variance": "refill",
                "rollout__overlong": "penalty",
                "rollout__overlong_buffer": 4,
                "objective": {"name": "sapo", "kl": {"coefficient": 0.1}},
                "diagnostics__true_gradient_every": 1,
                "curriculum": {"memory": 0.5},
            },
        ),
        "masked": (write_mixture, {"rollout__overlong": "mask", "rollout__zero_variance": "drop"}),
        "single": (
            write_recipe,
            {"curriculum": {"memory": 0.5}, "rollout__zero_variance": "refill", "rollout__parity_every": 1},
        ),
        "single_masked": (write_recipe, {"rollout__overlong": "mask"}),
        "single_penalised": (write_recipe, {"rollout__overlong": "penalty", "rollout__overlong_buffer": 4}),
        "corrected": (
            write_mixture_of_experts,
            {
                "model__routing_replay": True,
                "experiments__sampler_dtype": "float8_e4m3fn",
                "rollout__staleness": 1,
                "objective": {"name": "grpo", "tis": {"mode": "token"}},
            },
        ),
        "episodes": (
            write_recipe,
            {
                "tasks": [{"name": "game_of_a_test:Next", "fails": 3}],
                "rollout__turns": {"max": 2, "max_environment_errors": 1.0},
            },
        ),
        "free": (write_recipe, {"rollout__schedule": "free", "rollout__run_in": "thread"}),
        "rolled_back": (
            write_recipe,
            {
                "train__steps": 6,
                "warnings": {  # any gradient above the median so far is called a collapse
                    "on_collapse": "rollback",
                    "collapse_causes": ["gradient_spike"],
                    "gradient_spike": 1.0001,
                    "gradient_updates": 5,
                },
            },
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        (root / "rewards_of_a_test.py").write_text(REWARD)
        (root / "game_of_a_test.py").write_text(GAME)
        patch.delitem(sys.modules, "game_of_a_test", raising=False)
        patch.syspath_prepend(str(root))
        patch.setenv("SAPO_CACHE", fresh_cache(root / "cache"))
        for name, (write, changes) in runs.items():
            (root / name).mkdir()
            file = write(root / name, eval=eval_all, **{**short, **changes})
            with suppress(CollapseError):  # of the run that is rolled back until it may no more
                sapo.train(sapo.load_recipe(file))
            for kind, names in written(root / name / "run").items():
                found[kind] |= names
    return found


def test_every_name_that_runs_write_is_documented(keys: dict[str, set[str]]) -> None:
    names = documented()
    assert {
        kind: sorted(k for k in of_kind if not any(matches(n, k) for n in names.get(kind, ())))
        for kind, of_kind in keys.items()
    } == {kind: [] for kind in keys}


def test_every_documented_name_is_written_by_some_run(keys: dict[str, set[str]]) -> None:
    assert {
        kind: sorted(n for n in of_kind if not any(matches(n, k) for k in keys.get(kind, ())))
        for kind, of_kind in documented().items()
    } == {kind: [] for kind in documented()}


def test_the_titles_of_the_report_and_the_terminal_are_in_the_document() -> None:
    assert "\n\n" + "\n".join(titles_table()) + "\n\n" in DOCUMENT.read_text()


def test_every_title_is_of_a_documented_name() -> None:
    names = documented()
    assert [(kind, name) for kind, name in TITLES if not any(matches(n, name) or n == name for n in names[kind])] == []
