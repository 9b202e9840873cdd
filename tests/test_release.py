"""What a release is made of, as far as it can be held without making one: versions, citation, images, the workflow."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import sapo
from support.pages import blocks

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

RULES = (
    (r"^FROM \S+:latest|^FROM [a-z/]+( AS \w+)?$", "a base without a fixed tag"),
    (r"^ADD ", "ADD, where COPY does"),
    (r"^RUN (?!.*apt-get update).*apt-get install", "packages from a list of another day"),
    (r"^RUN (?!.*rm -rf /var/lib/apt/lists).*apt-get update", "lists of packages left in the image"),
    (r"^RUN .*apt-get install(?!.*--no-install-recommends)", "packages that nobody asked for"),
    (r"^RUN .*pip install(?!.*--no-cache-dir)", "pip's cache left in the image"),
    (r"^(?:ENTRYPOINT|CMD) (?!\[)", "a command that goes through a shell"),
    (r"^RUN .*\bsudo\b", "sudo"),
)
"""A pattern that no instruction may match, and what it would be. hadolint has more: docs/releasing.md."""


def instructions(text: str) -> list[str]:
    """Return the instructions of a Dockerfile, each on one line, without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [line.strip() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def faults(text: str) -> list[str]:
    """Return what the rules find in a Dockerfile."""
    found = [f"{what}: {line[:60]}" for line in instructions(text) for rule, what in RULES if re.search(rule, line)]
    users = [line.split()[1] for line in instructions(text) if line.startswith("USER ")]
    return found + ([] if users and users[-1] not in ("root", "0") else ["it runs as root"])


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == sapo.__version__ == str(citation["version"])


def test_the_citation_has_what_the_format_asks_for() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["license"]
    assert any("2511.20347" in reference.get("url", "") for reference in citation["references"])


def test_the_changes_begin_with_the_version_in_work() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert "unreleased" in headings[0].lower() or PROJECT["version"] in headings[0]


def test_the_image_keeps_the_rules() -> None:
    assert faults((ROOT / "Dockerfile").read_text()) == []


def test_the_image_is_made_of_files_that_exist_and_are_sent_to_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [line.split()[1:] for line in instructions((ROOT / "Dockerfile").read_text()) if line.startswith("COPY ")]
    sources = [path for *paths, _ in copies for path in paths if not any(p.startswith("--from") for p in paths)]
    assert sources
    assert [path for path in sources if not (ROOT / path).exists() or path.removeprefix("./") not in sent] == []


def test_arguments_of_the_image_are_declared_before_they_are_used() -> None:
    declared: set[str] = {"PATH"}
    for line in instructions((ROOT / "Dockerfile").read_text()):
        assert {*re.findall(r"\$\{?(\w+)\}?", line)} <= declared, line
        declared |= {*re.findall(r"^ARG (\w+)", line)}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("FROM ubuntu\nUSER me", "fixed tag"),
        (
            "FROM a:1\nRUN apt-get update && apt-get install -y --no-install-recommends gcc\nUSER me",
            "lists of packages",
        ),
        ("FROM a:1\nRUN pip install \\\n  torch\nUSER me", "pip's cache"),
        ("FROM a:1\nCMD sapo\nUSER me", "shell"),
        ("FROM a:1\n", "root"),
    ],
)
def test_a_fault_of_an_image_is_found(text: str, what: str) -> None:
    assert any(what in fault for fault in faults(text))


def test_the_workflow_of_a_release_publishes_without_a_password() -> None:
    (block,) = [b for b in blocks((ROOT / "docs" / "releasing.md").read_text()) if b.marks.get("file") == "release.yml"]
    jobs = yaml.safe_load(block.text)["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["needs"] == "build"
    assert "password" not in block.text
    assert "secrets." not in block.text


def test_every_extra_that_a_message_or_page_advises_adds_something() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    places = [*(ROOT / "src").rglob("*.py"), ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    advised = {
        e for p in places for found in re.findall(r"sapo-rl\[([a-z0-9,]+)\]", p.read_text()) for e in found.split(",")
    }
    assert len(advised) > 5
    assert [extra for extra in sorted(advised) if not extras.get(extra)] == []
