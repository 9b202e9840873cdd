"""What a run shows: lines of steps and their spacing, phases, samples, the end, and the block of a notebook."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sapo.config.recipes import load_recipe
from sapo.errors import ConfigError
from sapo.front.display import Display, JsonLines, Quiet
from sapo.front.lines import end_lines, sample_lines
from sapo.front.notebook import NotebookDisplay

FIGURES = {
    "reward/mean": 0.25,
    "pass@1": 0.5,
    "update/entropy": 1.5,
    "update/gate/eur": 0.9,
    "update/ratio/abs_dev": 0.01,
}


def step(number: int, seconds: float = 2.0) -> dict[str, Any]:
    timing = {"seconds": seconds, "tokens_per_second": 1234.0}
    return {"kind": "step", "step": number, **FIGURES, "timing": timing}


def shown(clock: list[float], steps: int, terminal: bool = False) -> tuple[Display, io.StringIO]:
    written = io.StringIO()
    display = Display(Console(file=written, width=200, force_terminal=terminal), clock=lambda: clock[0])
    display.started(load_recipe("quickstart", [f"train.steps={steps}"]))
    return display, written


def test_a_plain_log_has_a_line_of_a_step_at_most_one_in_ten_seconds_and_those_of_both_ends() -> None:
    clock = [0.0]
    display, written = shown(clock, steps=12)
    for number in range(1, 13):
        clock[0] = 3.0 * number
        display.record(step(number))
    lines = [line for line in written.getvalue().splitlines() if line.startswith("step ")]
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 5", "step 9", "step 12"]
    # By hand: the first step began 2 s before its line at 3 s; after 5 steps and 14 s, 7 steps take 19.6 s.
    assert lines[1] == (
        "step 5/12: mean reward 0.250, batch pass@1 0.500, entropy 1.500, EUR 0.9000, |r - 1| 1.00e-02, 1,234 tok/s, "
        "20 s left"
    )
    assert "left" not in lines[-1]


@pytest.mark.parametrize(
    ("rewards", "shown_too"),
    # variances by hand: of 0, 1, 1, 1 it is 0.75 * 0.25, of 0.5, 1, 1, 1 it is 0.046875, of -1, 1, 1, 1 it is 0.75
    [((0.75, 0.75, 0.1875**0.5), True), ((0.75, 0.875, 0.046875**0.5), False), ((0.75, 0.5, 0.75**0.5), False)],
)
def test_the_mean_reward_of_a_step_stands_alone_where_rewards_are_not_0_and_1(
    rewards: tuple[float, float, float], shown_too: bool
) -> None:
    display, written = shown([0.0], steps=2)
    display.record({**step(1), **dict(zip(("pass@1", "reward/mean", "reward/std"), rewards, strict=True))})
    [line] = [line for line in written.getvalue().splitlines() if line.startswith("step 1")]
    assert f"mean reward {rewards[1]:.3f}" in line
    assert ("pass@1" in line) == shown_too


def test_a_step_of_zeros_shows_no_pass_at_1_in_a_run_whose_evaluation_was_graded() -> None:
    display, written = shown([0.0], steps=2)
    evaluation = {"task": "t", "problems": 2, "samples": 1, "mean@1": 0.0, "reward/mean": 0.4, "binary": False}
    display.record({"kind": "eval", "step": 0, **evaluation})
    display.record({**step(1), "pass@1": 0.0, "reward/mean": 0.0, "reward/std": 0.0})
    assert "held-out mean reward 0.400" in written.getvalue()
    assert "pass@1" not in written.getvalue()


def test_the_words_of_a_step_s_line_are_explained_once_where_they_first_stand() -> None:
    display, written = shown([0.0], steps=2)
    for number in (1, 2):
        display.record(step(number))
    text = written.getvalue()
    assert text.count("EUR: effective update ratio") == 1
    assert text.index("EUR: effective") < text.index("step 1/2")


def test_a_terminal_shows_the_phase_inside_a_step() -> None:
    clock = [0.0]
    display, _ = shown(clock, steps=4, terminal=True)
    display.phase(1, "evaluate")
    assert display._progress is not None, "the first step's too"
    assert display._progress.tasks[0].fields["phase"] == "evaluating"
    display.record(step(1))
    assert display._progress.tasks[0].fields["phase"] == ""
    display.phase(2, "generate")
    assert display._progress.tasks[0].fields["phase"] == "sampling completions"
    display.phase(2, "update")
    assert display._progress.tasks[0].fields["phase"] == "updating"
    display.stop()


def test_sampled_completions_stand_below_their_question_on_one_line_each() -> None:
    samples = [
        {"task": "sums", "prompt": "1+1=", "text": "2\nand\x1b[2J", "reward": 1.0},
        {"task": "sums", "prompt": "1+1=", "text": "x" * 300, "reward": 0.0},
    ]
    lines = sample_lines(3, samples)
    assert lines[:2] == ["  step 3, sums: 1+1=", "    reward 1.000: 2 and\x1b[2J"]
    assert len(lines[2]) < 230
    written = io.StringIO()
    Display(Console(file=written, width=100)).samples(3, samples)
    assert "\x1b" not in written.getvalue(), "what steers a terminal is spelled out"


def test_the_end_names_the_figures_of_every_task_and_the_next_commands() -> None:
    start = {"pass@1": 0.1, "reward/mean": 0.1, "binary": True}
    final = {"pass@1": 0.6, "reward/mean": 0.6, "binary": True}
    shares = {"reward/mean": 0.3, "binary": False}
    summary = {
        "start": {**start, "tasks": {"one": start, "two": {**shares, "reward/mean": 0.2}}},
        "final": {**final, "tasks": {"one": final, "two": shares}},
        "steps": 5,
        "seconds": {"update": 1.0, "total": 1.0},
    }
    config = load_recipe("quickstart", ["log.tensorboard=false"])
    lines = end_lines(SimpleNamespace(directory=Path("runs/x"), config=config, summary=summary, stopped=None))
    assert lines[:3] == [
        "one: held-out pass@1 0.100 -> 0.600 in 5 steps",
        "one: held-out mean reward 0.100 -> 0.600 in 5 steps",
        "two: held-out mean reward 0.200 -> 0.300 in 5 steps",
    ]
    assert lines[-2:] == ["next: sapo eval runs/x", "      sapo report runs/x"]


def test_a_notebook_s_block_has_the_bar_the_figures_and_escaped_lines(monkeypatch: Any) -> None:
    display = NotebookDisplay()
    drawn: list[str] = []
    monkeypatch.setattr(display, "_draw", lambda: drawn.append(display.to_html()))
    display.started(load_recipe("quickstart", ["train.steps=4"]))
    display.record(step(1))
    display.phase(2, "generate")
    display.samples(1, [{"task": "t", "prompt": "<b>q</b>", "text": "<script>", "reward": 0.0}])
    block = drawn[-1]
    assert '<progress value="1" max="4"' in block
    assert "sampling completions" in block
    assert "mean reward 0.250" in block
    assert "&lt;script&gt;" in block
    assert "<script>" not in block


def test_quiet_prints_warnings_alone_and_json_the_records_and_the_summary() -> None:
    out, errors = io.StringIO(), io.StringIO()
    quiet = Quiet(Console(file=errors, width=200))
    lines = JsonLines(Console(file=out, width=40), Console(file=errors, width=200))
    ended = SimpleNamespace(directory=Path("runs/x"), stopped=None, summary={"steps": 1})
    for display in (quiet, lines):
        display.started(load_recipe("quickstart"))
        display.record(step(1))
        display.phase(2, "generate")
        display.samples(1, [{"task": "t", "prompt": "q", "text": "a", "reward": 0.0}])
        display.warning("mind the gap")
        display.ended(ended if display is lines else SimpleNamespace(**vars(ended), config=None))
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert found == [step(1), {"kind": "end", "run": "runs/x", "stopped": None, "summary": {"steps": 1}}]
    assert errors.getvalue().splitlines() == ["warning: mind the gap"] * 2


def test_two_ways_of_printing_at_once_are_refused() -> None:
    from sapo.cli.app import _display

    with pytest.raises(ConfigError, match=r"--quiet prints nothing and --json .* got both; leave one out"):
        _display(True, True)
    assert type(_display(True, False)) is Quiet
    assert type(_display(False, True)) is JsonLines
