"""Find the program in a completion, and complete it by what the tests put before it."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from sapo.tasks.verifiers.code_tests import CodeTests
from sapo.tasks.verifiers.extract import inside_answer_tags

_FENCE = re.compile(r"^([ \t>]*)(```+|~~~+)([ \t]*)([\w+#.-]*)([^\n]*)$", re.MULTILINE)
_PYTHON = re.compile(r"(?:python|py)[0-9.]*|python-?3|ipython|pycon|sage")
_STARTS_CODE = re.compile(
    r"^(?:def|class|import|from|@|async def|for|while|if|try|with|[A-Za-z_][\w.,\s]*=)", re.MULTILINE
)
_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)

# Limit of the later fences that are tried as the end of a block, where the first leaves no valid program.
MAX_ENDS = 4
# Longer blocks are not tried for validity, which takes time.
MAX_PARSED = 100_000


@dataclass(frozen=True)
class Program:
    """The program found in a completion.

    >>> find_program("Here it is:\\n```python\\nprint(1)\\n```")
    Program(source='print(1)\\n', fenced=True)
    """

    source: str
    fenced: bool
    """Whether it stood in a code block. Otherwise it is the whole completion, which may be no program at all."""


@dataclass(frozen=True)
class _Block:
    mark: str
    source: str


def find_program(text: str, names: Sequence[str] = ()) -> Program | None:
    """Return the program in a completion: the last Python block, else the last unmarked one, else the text.

    Of several blocks, the last that defines one of `names` comes before the last, since a block that shows how to use a
    function often follows. A block that is not closed ends with the text, since a stop string may have removed its end.
    A text with a closing fence alone is the program up to it. None stands for an empty program.

    >>> find_program("```\\nx = 1\\n```\\n```bash\\nls\\n```").source
    'x = 1\\n'
    """
    fences = list(_FENCE.finditer(text))
    if len(fences) == 1 and not fences[0][4] and (before := _program_before(text[: fences[0].start()])):
        return Program(before, fenced=True)
    blocks = _blocks(text, fences)
    python = [block.source for block in blocks if _PYTHON.fullmatch(block.mark)]
    unmarked = [block.source for block in blocks if not block.mark]
    candidates = python or unmarked
    if candidates:
        defining = [source for source in candidates if any(_defines(source, name) for name in names)]
        source = (defining or candidates)[-1]
        return Program(source, fenced=True) if source.strip() else None
    if blocks or not text.strip():
        return None
    tagged = inside_answer_tags(text)
    return Program(text if tagged is None else tagged, fenced=False)


def complete_program(program: Program, tests: CodeTests) -> str:
    """Return the source to run: the tests' prefix, followed by the program.

    A prefix ends with the signature and docstring of a function, which is a valid function by itself. A program that
    defines the function again replaces it, and uses the imports and helpers before it. Imports from __future__ are
    moved to the top.
    """
    if not tests.prefix:
        return program.source
    if _defines(program.source, tests.function):
        future = "\n".join(_FUTURE.findall(program.source))
        return f"{future}\n{tests.prefix}\n{_FUTURE.sub('', program.source)}"
    lines = program.source.splitlines()
    first = next(line for line in lines if line.strip())
    if program.fenced and not first[0].isspace():  # a body that lost its indentation in the block
        lines = [f"    {line}" for line in lines]
    return tests.prefix + "\n".join(lines) + "\n"


def names_wanted(tests: CodeTests) -> tuple[str, ...]:
    """Return the names that a program must define for its tests, or some of them."""
    if tests.kind == "functional":
        return (tests.function, "Solution")
    if tests.kind == "stdin":
        return ()
    if tests.function:
        return (tests.function,)
    return tuple(dict.fromkeys(re.findall(r"\b([A-Za-z_]\w*)\s*\(", " ".join(tests.statements))))


def _defines(source: str, name: str) -> bool:
    pattern = rf"^(async\s+)?(def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*(:[^=\n]*)?=(?!=)"
    return bool(name) and re.search(pattern, source, re.MULTILINE) is not None


def _blocks(text: str, fences: list[re.Match[str]]) -> list[_Block]:
    """Return the code blocks of a text. A fence closes one that is as long and of the same sort."""
    blocks: list[_Block] = []
    position = 0
    while position < len(fences):
        opened = fences[position]
        ends = [n for n in range(position + 1, len(fences)) if _closes(opened, fences[n])]
        if not ends:
            blocks.append(_block(opened, text[opened.end() + 1 :]))
            break
        tried = [(n, _block(opened, text[opened.end() + 1 : fences[n].start()])) for n in ends[:MAX_ENDS]]
        # A docstring may hold a fence of its own: the block ends where it is a program, if it is one anywhere.
        valid = next(((n, block) for n, block in tried if _is_python(block.source)), None)
        end, block = valid if valid is not None and not _opens_python(fences, position, valid[0]) else tried[0]
        blocks.append(block)
        position = end + (0 if _PYTHON.fullmatch(fences[end][4].lower()) else 1)
    return blocks


def _closes(opened: re.Match[str], fence: re.Match[str]) -> bool:
    return fence[2][0] == opened[2][0] and len(fence[2]) >= len(opened[2])


def _opens_python(fences: list[re.Match[str]], start: int, end: int) -> bool:
    return any(_PYTHON.fullmatch(fence[4].lower()) for fence in fences[start + 1 : end])


def _block(opened: re.Match[str], source: str) -> _Block:
    indent = opened[1]
    if indent and ">" not in indent and all(line.startswith(indent) or not line.strip() for line in source.split("\n")):
        source = "\n".join(line.removeprefix(indent) for line in source.split("\n"))
        source = re.sub(r"[ \t]+\Z", "", source)
    return _Block(opened[4].lower(), re.sub(r"(?<=\n)[ \t]+\Z", "", source))


def _program_before(text: str) -> str | None:
    """Return the program that ends a text which lacks its opening fence, or None where it ends with none."""
    starts = [0, *(match.start() for match in _STARTS_CODE.finditer(text))][:MAX_ENDS]
    return next((text[start:] for start in starts if text[start:].strip() and _is_python(text[start:])), None)


def _is_python(source: str) -> bool:
    if len(source) > MAX_PARSED:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(textwrap.dedent(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
