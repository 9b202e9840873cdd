"""What a model wrote cannot steer a terminal or reorder a line."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import sapo.cli.terminal as terminal
from sapo.cli.generate import shown_to
from sapo.front.display import Display
from sapo.utils.text import visible

STEERING = "\x1b[2J\x1b]0;title\x07 over\rwritten \u202egnorw\u2066 \x9b31m \x7f \ufeff"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, tab\tand\nnewline, ünïcode 漢字 🙂", "plain, tab\tand\nnewline, ünïcode 漢字 🙂"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\rb", "a\\x0db"),
        ("\u202egnorw", "\\u202egnorw"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("", ""),
    ],
)
def test_what_steers_or_hides_is_spelled_out_and_all_else_stays(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown


def test_a_command_s_line_and_a_warning_reach_the_terminal_without_what_steers_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for say in ("command", "display", "warning"):
        written = io.StringIO()
        console = Console(file=written, force_terminal=False, width=400)
        monkeypatch.setattr(terminal, "console", console)
        if say == "command":
            terminal.say(STEERING)
        elif say == "display":
            Display(console).say(STEERING)
        else:
            Display(console).warning(STEERING)
        shown = written.getvalue()
        assert "\\x1b[2J" in shown
        assert "\\u202egnorw" in shown
        assert not any(c in shown for c in "\x1b\x07\r\u202e\u2066\x9b\x7f\ufeff")


def test_generate_spells_out_on_a_terminal_and_gives_a_file_what_was_written() -> None:
    assert shown_to(terminal=True)("\x1b[2J") == "\\x1b[2J"
    assert shown_to(terminal=False)("\x1b[2J") == "\x1b[2J"
