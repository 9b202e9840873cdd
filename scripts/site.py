"""Hook of mkdocs: put what lies outside docs/ into the site, and name the pages that mkdocs.yml does not name.

A page of docs/ may link to any file of the repository. Such a file becomes a page under repository/: Markdown as it is,
anything else as a block of code. So every link leads somewhere, in a clone and on the site alike, and no page knows an
address of the repository.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PREFIX = "repository"

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
ALWAYS = (
    "research/evidence.md",
    "research/log.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CODE_OF_CONDUCT.md",
)
LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".c": "c",
    ".toml": "toml",
    ".json": "json",
    ".sh": "bash",
}


def page_of(source: Path) -> str:
    """Return the place in the site, as in docs/, of a file of the repository.

    >>> page_of(DOCS / "method.md"), page_of(ROOT / "examples/one_file_sapo.py"), page_of(ROOT / "research/log.md")
    ('method.md', 'repository/examples/one_file_sapo.py.md', 'repository/research/log.md')
    """
    if source.is_relative_to(DOCS):
        return source.relative_to(DOCS).as_posix()
    place = f"{PREFIX}/{source.relative_to(ROOT).as_posix()}"
    return place if source.suffix in (".md", ".png") else f"{place}.md"


def targets(source: Path, text: str) -> dict[str, Path]:
    """Return the files that a page links to, by the link as written; not those to the web and within the page."""
    found = {}
    for _, _, link in LINK.findall(text):
        path = link.partition("#")[0]
        if not path or re.match(r"[a-z]+:", path):
            continue
        file = (source.parent / path).resolve()
        if file.is_relative_to(ROOT):
            found[link] = file
    return found


def rewritten(source: Path, text: str) -> str:
    """Return a page with its links to files of the repository as links within the site."""
    inside = targets(source, text)
    here = os.path.dirname(page_of(source))

    def replace(match: re.Match[str]) -> str:
        mark, label, link = match.groups()
        file = inside.get(link)
        if file is None or not file.exists():  # mkdocs says what leads nowhere
            return match[0]
        if file.is_dir():
            return label
        hash_ = link.partition("#")[1] + link.partition("#")[2]
        return f"{mark}[{label}]({os.path.relpath(page_of(file), here or '.')}{hash_})"

    return LINK.sub(replace, text)


def outside(pages: Iterable[Path]) -> list[Path]:
    """Return the files outside docs/ that pages lead to, and those that these lead to in turn."""
    waiting, found = [*pages, *(ROOT / name for name in ALWAYS if (ROOT / name).exists())], []
    while waiting:
        page = waiting.pop()
        if not page.is_relative_to(DOCS):
            if page in found:
                continue
            found.append(page)
        if page.suffix == ".md":
            linked = targets(page, page.read_text(encoding="utf-8")).values()
            waiting += [file for file in linked if file.is_file() and not file.is_relative_to(DOCS)]
    return sorted(found)


def as_page(source: Path) -> str:
    """Return a file as Markdown: pages of Markdown with their links rewritten, other text as one block of code."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".md":
        return rewritten(source, text)
    name = source.relative_to(ROOT).as_posix()
    fence = "````"
    return f"# {name}\n\n{fence}{LANGUAGES.get(source.suffix, 'text')}\n{text}\n{fence}\n"


def completed(nav: list[Any], pages: Iterable[str]) -> list[Any]:
    """Return a nav in which pages that it does not name stand under Guides, and decisions under Research.

    >>> completed([{"Guides": []}, {"Research": []}], ["a.md", "adr/0001-floors.md"])
    [{'Guides': ['a.md']}, {'Research': [{'Decisions': ['adr/0001-floors.md']}]}]
    """
    named = set(leaves(nav))
    missing = sorted(page for page in pages if page not in named)
    decisions = [page for page in missing if page.startswith("adr/")]
    guides = [page for page in missing if page not in decisions]
    whole = []
    for entry in nav:
        (title, inner), *_ = entry.items()
        if title == "Guides":
            inner = [*inner, *guides]
        elif title == "Research" and decisions:
            inner = [*inner, {"Decisions": decisions}]
        whole.append({title: inner})
    return whole


def leaves(nav: Any) -> list[str]:
    """Return the pages that a nav names, in order."""
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in inner for page in leaves(entry)]


def on_config(config: Any) -> Any:
    """Name the pages that mkdocs.yml does not name."""
    config.nav = completed(config.nav, [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")])
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside docs/."""
    from mkdocs.structure.files import File

    for source in outside(DOCS.rglob("*.md")):
        content = source.read_bytes() if source.suffix == ".png" else as_page(source)
        files.append(File.generated(config, page_of(source), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of pages of docs/; those of other files are rewritten already."""
    if page.file.src_uri.startswith(f"{PREFIX}/"):
        return markdown
    return rewritten(DOCS / page.file.src_uri, markdown)
