"""The pages of the site, without building it: links lead somewhere, commands and keys exist, blocks say why not run.

`make test-docs` builds the site and runs the pages for newcomers literally (tests/docs/test_pages_run.py).
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts import reference, site
from typer.main import get_command

from sapo.cli import app
from sapo.config import RunConfig
from sapo.config.recipes import load_recipe, shipped_recipes
from sapo.config.suites import SuiteConfig
from sapo.data import Prompt, Score
from sapo.environments import Episode, Turn
from sapo.workflows.comparing.config import ComparisonConfig
from support.pages import DOCS, FOLLOWED, MADE, MARKS, ROOT, Block, blocks, commands, pages

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
RUN = ("start", "howto", "explanation", "coming-from")
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
KEYS = {key.name for section in (RunConfig, ComparisonConfig, SuiteConfig) for key in reference.keys_of(section)}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key} - {"benchmarks", "settings", "quick"}
TAKES_KEYS = ("train", "resume", "compare", "coldstart", "plan")


class Loader(yaml.SafeLoader):
    """mkdocs.yml as YAML, without what mkdocs alone can make."""


Loader.add_multi_constructor("", lambda loader, suffix, node: suffix)
NAV = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]


def without_code(text: str) -> str:
    """Return a page without its blocks and inline code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as Markdown's `toc` makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?)\s*$", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S), flags=re.M):
        words = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", heading)).encode("ascii", "ignore").decode()
        name = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower())
        found[name] = found.get(name, -1) + 1
    return {name if not n else f"{name}_{n}" for name, last in found.items() for n in range(last + 1)}


def key_exists(key: str) -> bool:
    """Return whether a dotted key is one of a recipe, a section, or a setting of a task's or objective's own."""
    if key.startswith(("objective.", "tasks.")) and key.count(".") <= 2:
        return True  # hyperparameters and options of tasks are their own; the classes refuse unknown ones
    name = re.sub(r"\.\d+(?=\.|$)", ".N", key)
    return name in KEYS or any(other.startswith(f"{name}.") for other in KEYS)


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_to_files_and_headings(name: str) -> None:
    page = PAGES[name]
    broken = []
    for _, _, link in site.LINK.findall(without_code(page.read_text())):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", PAGES)
def test_commands_on_a_page_have_the_options_and_keys_that_it_gives_them(name: str) -> None:
    for block in blocks(PAGES[name].read_text()):
        if name == "docs/commands.md":  # made from the commands themselves
            continue
        for command, *arguments in commands(block.text):
            assert command in COMMANDS, f"sapo {command}"
            COMMANDS[command].make_context(command, [*arguments])  # raises on what it does not know
            given = [a.partition("=")[0] for a in arguments if re.match(r"[a-z_]+(\.\w+)*=", a)]
            unknown = [key for key in given if not key_exists(key)] if command in TAKES_KEYS else []
            assert unknown == [], f"{name}:{block.line}"


def steps_of(text: str) -> list[tuple[str, int, int]]:
    """Return (directory, steps it has, steps it is resumed with) of each resumption with more steps on a page."""
    found, planned = [], {}
    for block in blocks(text):
        for command, *arguments in commands(block.text):
            given = dict(a.split("=", 1) for a in arguments if "=" in a)
            recipe = next((a for a in arguments if "=" not in a and not a.startswith("-")), "")
            if command == "train" and recipe in shipped_recipes():
                config = load_recipe(recipe)
                directory = given.get("run_dir", f"runs/{recipe}")
                planned[directory] = int(given.get("train.steps", config.train.steps))
            elif command == "resume" and "train.steps" in given and recipe in planned:
                found.append((recipe, planned[recipe], int(given["train.steps"])))
                planned[recipe] = int(given["train.steps"])
    return found


def test_a_run_that_a_page_resumes_with_other_steps_has_more_of_them_than_before() -> None:
    found = {name: steps_of(page.read_text()) for name, page in PAGES.items()}
    assert found["docs/howto/resume.md"] == [("runs/resumed", 20, 40)]
    assert [(name, *row) for name, rows in found.items() for row in rows if row[1] >= row[2]] == []
    literal = "    sapo train quickstart run_dir=runs/mine\n    sapo resume runs/mine train.steps=4\n"
    assert steps_of(literal) == [("runs/mine", 250, 4)]


def test_each_page_trains_into_directories_of_its_own() -> None:
    places: dict[str, set[str]] = {}
    for name, page in PAGES.items():
        for block in blocks(page.read_text()):
            said = re.findall(r"run_dir(?:=|: )\"?(runs/[\w-]+)", block.text) if "skip" not in block.marks else []
            for directory in said:
                places.setdefault(directory, set()).add(name)
    assert len(places) > 5
    assert {directory: names for directory, names in places.items() if len(names) > 1} == {}


@pytest.mark.parametrize("name", PAGES)
def test_keys_that_a_page_names_in_its_text_exist(name: str) -> None:
    text = PAGES[name].read_text()
    if "coming-from" in name:  # the first column is the other project's
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    named = re.findall(rf"`((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)(?:[=:][^`]*)?`", text)
    assert [key for key in named if not key_exists(key)] == []


@pytest.mark.parametrize("name", PAGES)
def test_python_on_a_page_parses_and_imports_what_there_is(name: str) -> None:
    for block in blocks(PAGES[name].read_text()):
        if block.language == "python" or block.text.startswith(("import sapo", "from sapo")):
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sapo"):
                    if "integrations" in str(node.module):
                        pytest.importorskip(str(node.module).rsplit(".", 1)[1])
                    module = importlib.import_module(str(node.module))
                    assert [a.name for a in node.names if not hasattr(module, a.name)] == []


@pytest.mark.parametrize("name", PAGES)
def test_yaml_and_marks_on_a_page_are_sound(name: str) -> None:
    for block in blocks(PAGES[name].read_text()):
        assert set(block.marks) <= set(MARKS), f"{name}:{block.line}"
        assert len(block.marks.get("skip", "a reason of some length")) > 12, f"{name}:{block.line}: say why"
        if block.language == "yaml":
            yaml.safe_load(block.text)


def test_python_and_commands_on_every_page_are_run_or_say_what_else_runs_them() -> None:
    """tests/docs/test_pages_run.py runs the pages of FOLLOWED; elsewhere each block has a reason."""
    silent = [
        f"{name}:{block.line}"
        for name, page in PAGES.items()
        if name not in FOLLOWED and name not in MADE
        for block in blocks(page.read_text())
        if block.kind in ("bash", "python") and "skip" not in block.marks
    ]
    assert silent == []


def test_the_judge_of_the_page_gives_the_shortest_episode_its_reward() -> None:
    text = (DOCS / "environments.md").read_text()
    [block] = [found for found in blocks(text) if "async def judge" in found.text]
    names: dict[str, Any] = {}
    exec(block.text, names)  # as the page's reader would write it
    prompt = Prompt(0, "t", "?")
    episodes = [
        Episode(prompt, n, (Turn("", (5,) * length, "stop"),), ("",), Score(0.5)) for n, length in enumerate((3, 1, 2))
    ]
    scores = asyncio.run(names["judge"](None, prompt, episodes))
    assert [score.reward for score in scores] == [0.0, 0.5, 0.0]


def test_files_of_tests_that_a_mark_names_exist() -> None:
    named = {
        file
        for page in PAGES.values()
        for block in blocks(page.read_text())
        for file in re.findall(r"tests/[\w./]*\w", block.marks.get("skip", ""))
    }
    assert len(named) > 5
    assert sorted(file for file in named if not (ROOT / file).exists()) == []


def test_pages_that_are_run_have_no_blocks_of_no_language() -> None:
    """A block without a language, or an indented one, would not be run and would not say so."""
    bare = [
        f"{name}:{block.line}"
        for name, page in PAGES.items()
        if page.is_relative_to(DOCS) and page.relative_to(DOCS).parts[0] in (*RUN, "python-guide.md", "serving.md")
        for block in blocks(page.read_text())
        if block.language not in ("bash", "python", "yaml", "json", "text")
    ]
    assert bare == []


def test_the_site_names_pages_that_exist_and_each_once() -> None:
    named = site.leaves(NAV)
    made = {site.page_of(ROOT / source) for source in site.ALWAYS}
    assert [page for page in named if not (DOCS / page).exists() and page not in made] == []
    assert len(named) == len(set(named))


def test_a_page_outside_docs_is_linked_within_the_site() -> None:
    text = site.rewritten(DOCS / "method.md", "[a](../examples/one_file_sapo.py) [b](tasks.md#mixtures) [c](no.md)")
    assert text == "[a](repository/examples/one_file_sapo.py.md) [b](tasks.md#mixtures) [c](no.md)"
    assert site.rewritten(ROOT / "research" / "log.md", "[m](../docs/memory.md)") == "[m](../../memory.md)"


def test_a_broken_command_and_a_key_that_is_not_one_are_found(tmp_path: Path) -> None:
    (command, *arguments), *_ = commands("sapo train quickstart --dry-runn\n")
    with pytest.raises(Exception, match="dry-runn"):
        COMMANDS[command].make_context(command, arguments)
    assert not key_exists("train.step")
    assert key_exists("train.steps")
    assert key_exists("rollout.vllm")


def test_marks_belong_to_the_block_below_them() -> None:
    page = "<!-- small: a -->\n\n```bash\nsapo doctor\n```\n\ntext\n\n    sapo plan x\n\n```python\n1\n```\n"
    expected: list[Any] = [
        Block("bash", "sapo doctor\n", 4, {"small": "a"}),
        Block("", "sapo plan x\n", 9),
        Block("python", "1\n", 12),
    ]
    assert blocks(page) == expected
