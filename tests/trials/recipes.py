"""Every key of a recipe times a list of absurd values: refused in a line, or accepted as a run that can be planned."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import sapo
from sapo.config import RunConfig
from sapo.config.recipes import parse_recipe, resolve_recipe
from sapo.errors import UserError
from sapo.run.machine import resolve_machine
from sapo.run.preflight import load_tasks
from sapo.workflows.coldstart import fresh_policy
from support.runs import REWARD, write_recipe
from trials.harness import Hang, Outcome, Tally, call

ABSURD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 1.5, 1e308, -1e308, 1e-320, 10**30, -(10**30), 1e23, 2**63),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "a" * 300,
        "3e-4",
        "true",
        "${nowhere}",
        "../..",
        "/proc/x",
        "\x00",
        "é\u2028",
    ),
    *([], {}, [1], [None], {"a": 1}, [[]], [True]),
)
LARGE = ("model.coldstart",)


def base(place: Path) -> dict[str, Any]:
    """Return a recipe in which every section is there, so that each key can be set."""
    import yaml

    recipe: dict[str, Any] = yaml.safe_load(write_recipe(place).read_text())
    recipe["objective"] = {
        "name": "sapo",
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "kl": {"coefficient": 0.1},
        "tis": {"cap": 2.0},
    }
    recipe["curriculum"] = {"low": 0.1}
    recipe["prompt"] = {"template": "{prompt}"}
    recipe["profile"] = {"steps": 1}
    recipe["model"]["lora"] = {"rank": 2}
    return recipe


def made_from_nothing() -> dict[str, Any]:
    """Return a recipe with a cold start."""
    return {
        "run_dir": "run",
        "model": {"coldstart": {"hidden_size": 16}},
        "tasks": [{"name": "arithmetic", "digits": 1}],
        "train": {"steps": 1},
    }


def keys(model: Any = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a recipe, sections too."""
    for name, field in model.model_fields.items():
        key = prefix + name
        yield key
        for section in _sections(field.annotation):
            inner = f"{key}.0." if "list" in str(field.annotation) else f"{key}."
            yield from keys(section, inner)


def _sections(annotation: Any) -> list[Any]:
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _sections(inner)]


FURTHER = (
    *("objective.tau_pos", "objective.tau_neg", "objective.side", "tasks.0.path", "tasks.0.verifier"),
    *("tasks.0.score_truncated", "tasks.0.held_out_fraction", "tasks.0.held_out_path", "tasks.0.seed"),
    *("tasks.0.prompt_field", "tasks.0.answer_field"),
)


def put(recipe: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return the recipe with a dotted key set."""
    changed = copy.deepcopy(recipe)
    place: Any = changed
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(place, list):
            place = place[int(parent)] if int(parent) < len(place) else place.append({}) or place[-1]
        else:
            place = place.setdefault(parent, [] if parent in ("counterfactuals", "shots") else {})
    place[last] = value
    return changed


def plan(recipe: dict[str, Any]) -> None:
    """Do all that a dry run does before it loads a model."""
    config = resolve_recipe(recipe, [], "recipe.yaml")
    parse_recipe(json.loads(json.dumps(config.model_dump(mode="json"))))
    config.batch_sentence()
    threads = config.threads
    resolve_machine(config.model_copy(update={"threads": 1 if threads else None}))
    load_tasks(config)
    if config.model.coldstart is not None and config.model.coldstart.layers * config.model.coldstart.hidden_size < 4096:
        fresh_policy(config.model.coldstart.model_copy(update={"max_length": 64}))


def run(place: Path, *, share: float = 1.0, seed: int = 0, tally: Tally | None = None) -> Tally:
    """Try a share of all cases; of those that are accepted a few by the command line too, as dry runs."""
    tally = tally or Tally()
    os.chdir(place)
    (place / "rewards_of_a_test.py").write_text(REWARD)
    recipes = {"": base(place), "model.coldstart": made_from_nothing()}
    drawn = random.Random(seed)
    for key in [*keys(), *FURTHER]:
        recipe = recipes["model.coldstart" if key.startswith("model.coldstart") else ""]
        for value in ABSURD:
            if drawn.random() >= share or key.startswith(("rollout.vllm", "provenance")):
                continue
            changed = put(recipe, key, value)
            outcome = _outcome(changed)
            if outcome.code == 0 and drawn.random() < 0.03 and "coldstart" not in key:
                (place / "recipe.json.yaml").write_text(json.dumps(changed))
                outcome = call("train", "recipe.json.yaml", "--dry-run")
            tally.add(f"{key}={value!r:.60}", outcome)
    return tally


def _outcome(recipe: dict[str, Any]) -> Outcome:
    import traceback

    previous = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(20)
    try:
        plan(recipe)
    except UserError as error:
        return Outcome(2, "".join(f"sapo: {line}\n" for line in str(error).splitlines()))
    except Hang:
        return Outcome(-2, "", "Hang: no end within 20 s")
    except BaseException:
        return Outcome(-1, "", traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return Outcome(0, "")


def _hang(*_: object) -> None:
    raise Hang


assert sapo
