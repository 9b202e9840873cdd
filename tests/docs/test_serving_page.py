"""The example of OpenAI's client on docs/serving.md, against a server as the command above it starts one."""

from __future__ import annotations

import re
import shlex

import pytest

from support.pages import DOCS, blocks, commands
from support.served import served_here, talker


def test_openais_example_asks_the_server_that_the_command_above_starts(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    found = blocks((DOCS / "serving.md").read_text())
    [place] = [i for i, block in enumerate(found) if block.text.startswith("from openai")]
    [[command, *arguments]] = commands(found[place - 1].text)
    assert command == "serve", shlex.join(arguments)
    name, port = (arguments[arguments.index(option) + 1] for option in ("--name", "--port"))
    base = f"http://127.0.0.1:{port}/v1"
    assert base in found[place].text
    with served_here(talker(), name=name) as (url, _):
        example = found[place].text.replace(base, f"{url}/v1")
        exec(compile(re.sub("max_tokens=200", "max_tokens=12, seed=1", example), "serving.md", "exec"), {})
    assert capsys.readouterr().out
