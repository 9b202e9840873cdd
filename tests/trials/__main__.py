"""`python -m trials`: all cases of a kind, a line for each that broke, and the table of docs/reliability.md."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from trials import calls, damage, episodes, kills, recipes, rewards
from trials.harness import Tally

KINDS: dict[str, tuple[str, Callable[..., Tally]]] = {
    "damage": ("damaged files", damage.run),
    "recipes": ("recipe keys with absurd values", recipes.run),
    "calls": ("commands with bad arguments", calls.run),
    "rewards": ("hostile reward functions", rewards.run),
    "episodes": ("runs killed inside episodes, resumed", episodes.run),
    "kills": ("runs, evaluations, comparisons and cold starts killed, gone on with", kills.run),
}
BEGIN, END = "<!-- trials -->\n", "<!-- /trials -->\n"


def main() -> int:
    """Run the trials that were asked for; 1 where one broke."""
    parser = argparse.ArgumentParser(prog="trials")
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="the page whose table is written")
    asked = parser.parse_args()
    page = None if asked.write is None else asked.write.absolute()
    torch.set_num_threads(1)
    tallies: dict[str, Tally] = {}
    for kind in asked.kinds:
        with tempfile.TemporaryDirectory() as place:
            inside = Path(place) / "place"
            inside.mkdir()
            tallies[kind] = tally = KINDS[kind][1](inside, share=asked.share, seed=asked.seed)
        for line in tally.broken:
            print(f"BROKEN {line}")
        counts = f"tried {tally.tried}, refused {tally.refused}, accepted {tally.accepted}"
        print(f"{kind}: {counts}, broken {len(tally.broken)}", flush=True)
    if page is not None:
        write_table(page, tallies, asked.share, asked.seed)
    return int(any(tally.broken for tally in tallies.values()))


def write_table(page: Path, tallies: dict[str, Tally], share: float, seed: int) -> None:
    """Put the counts between the marks of a page, with the date and what part of the cases was tried."""
    part = "all cases" if share == 1.0 else f"a share of {share:g} of the cases, drawn by seed {seed}"
    rows = [
        f"| {KINDS[kind][0]} | {t.tried} | {t.refused} | {t.accepted} | {len(t.broken)} |"
        for kind, t in tallies.items()
    ]
    table = [f"{date.today().isoformat()}, {part}:", "", "| trial | tried | refused in lines | done | broken |"]
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(
        before + BEGIN + "\n".join([*table, "|---|---|---|---|---|", *rows, ""]) + END + after, encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
