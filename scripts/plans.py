"""Write the tables of computed plans into docs/scaling.md: `python -m scripts.plans`.

tests/docs/test_plans.py holds them current.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sapo.config.recipes import load_recipe
from sapo.workflows.planning.machine import GIB
from sapo.workflows.planning.plan import Plan, make_plan

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
MARKS = "<!-- plans -->", "<!-- /plans -->"

GPUS = (8, 16, 32, 64, 128, 256, 512)
MODELS = {
    "Qwen3-4B": ("qwen3_4b_sapo", []),
    "Qwen3-30B-A3B": ("qwen3_30b_a3b_sapo", []),
    "Qwen3-235B-A22B": ("qwen3_30b_a3b_sapo", ["model.path=Qwen/Qwen3-235B-A22B"]),
}
WORK = ["rollout.prompts_per_step=2048"]
"""Groups for 512 ranks in each of four updates."""
COMPLETION_TOKENS = 8192


def plans(name: str) -> Iterator[Plan]:
    """Yield the plans of a model, one for each number of GPUs."""
    recipe, overrides = MODELS[name]
    for gpus in GPUS:
        config = load_recipe(recipe, [*overrides, *WORK, f"train.ranks={gpus}"])
        yield make_plan(config, completion_tokens=COMPLETION_TOKENS)


def table(name: str) -> str:
    """Return the table of a model."""
    rows = [
        f"**{name}**, computed",
        "",
        "| GPUs | a rank, GiB | its largest phase | the driver, GiB | its largest phase | update, s | its gathers, s "
        "| log-probs, s | sync, s | checkpoint, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for plan in plans(name):
        other, driver, seconds = plan.memory.other, plan.memory.driver, plan.seconds
        assert other is not None
        rows.append(
            f"| {plan.config.train.ranks} | {other.peak / GIB:,.1f} | {other.largest_phase} | {driver.peak / GIB:,.1f} "
            f"| {driver.largest_phase} | {seconds['update'].compute:,.0f} | {seconds['update'].transfer:,.0f} "
            f"| {seconds['log-probs'].seconds:,.0f} | {seconds['sync'].seconds:,.1f} "
            f"| {seconds['checkpoint'].seconds:,.0f} |"
        )
    return "\n".join(rows)


def page(text: str) -> str:
    """Return a page with the tables between its marks made anew."""
    between = re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1])
    tables = "\n\n".join(map(table, MODELS))
    return re.sub(between, lambda _: f"{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}", text, flags=re.DOTALL)


def main() -> None:
    """Write the tables."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
