r"""Find the answer in a completion: boxes, phrases, mathematics, JSON.

Every function takes time linear in the length of the text, or bounded, since a model may write any text.
"""

from __future__ import annotations

import json
import re
from collections import deque
from typing import Any

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s*([A-Za-z0-9.+-]+)")
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;.*]|\\[()\[\]]|\\quad|\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b)*")
_PHRASE = re.compile(
    r"(?i)\b(?:answer|ans\.?(?=\s*[:=]))\**(?![A-Za-z])\s*"
    r"(?:(?:(?:to|for) (?:this|the|your) (?:\w+ )?(?:question|problem|exercise) )?"
    r"(?:is|are|(?:should|would|must|will) be)\b(?: therefore| thus| then| simply)?\s*:?|=>|[:=]|->|\u2192)"
    r"\**[ \t]*(\n\s*)?"
)
# "The wrong answer is B" states no answer.
_WRONG = re.compile(r"(?i)(?:wrong|incorrect|false|bad|worst|impossible|not (?:the|an|a|my|our))\s+(?:final\s+)?$")
# A dollar sign before a digit is money unless the sign that closes it stands at the formula and before no digit.
_FORMULA = re.compile(
    r"\$\$((?:\\.|[^$\\])+)\$\$|(?<!\\)\$(?!\d)((?:\\.|[^$\n\\])+)\$|(?<!\\)\$(?=\d)((?:\\.|[^$\n\\])*(?<!\s))\$(?!\d)"
    r"|\\\(((?:[^\\\n]|\\(?!\)))+)\\\)|\\\[((?:[^\\]|\\(?!\]))+)\\\]"
)
_FENCE = re.compile(r"```[a-zA-Z0-9_-]*[ \t]*\n(.*?)```", re.DOTALL)
_OBJECT = re.compile(r"\{\s*[\"}]")

MAX_JSON_ATTEMPTS = 200
"""Limit of failed attempts to parse an object: each may take time linear in the rest of the text."""


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Find every closed \boxed{...} or \fbox{...} as (start, end, content), in order of their starts.

    >>> [content for _, _, content in boxes(r"\boxed{\frac{1}{2}} or \boxed{x = \boxed{3}} or \boxed{4")]
    ['\\frac{1}{2}', 'x = \\boxed{3}', '3']
    """
    found: list[tuple[int, int, str]] = []
    open_braces: list[tuple[int, int]] = []  # start of the box or -1, start of its content
    for token in _TOKEN.finditer(text):
        if token[0] == "}":
            start, inside = open_braces.pop() if open_braces else (-1, 0)
            if start >= 0:
                found.append((start, token.end(), text[inside : token.start()].strip()))
        elif token[0][-1] == "{" and token[0] != "\\{":
            open_braces.append((token.start() if token[0] != "{" else -1, token.end()))
    return sorted(found)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last box that has any, the innermost of nested ones, or None when no box is closed.

    >>> last_boxed(r"first \boxed{1}, no: \boxed{x = \boxed{2}}"), last_boxed(r"\boxed{3")
    ('2', None)
    """
    found = boxes(text)
    if found:
        return next((content for _, _, content in reversed(found) if content), "")
    bare = _BARE_BOX.findall(text)
    return bare[-1].rstrip(".") if bare else None


def last_boxes(text: str) -> list[str]:
    r"""Return the contents of the last box and of those joined to it by `and`, `or`, commas or blanks: one answer.

    >>> last_boxes(r"We try \boxed{0}. So $x = \boxed{1}$ is wrong; it is $\boxed{2}$ or $\boxed{3}$.")
    ['2', '3']
    """
    found = boxes(text)
    run = found[-1:]
    for box in reversed(found[:-1]):
        if box[1] > run[0][0] or not _BETWEEN_BOXES.fullmatch(text, box[1], run[0][0]):
            break
        run.insert(0, box)
    return [content for _, _, content in run]


def after_phrase(text: str) -> str | None:
    """Return what follows the last "answer is", "Answer:" or similar phrase on its line, or None without one.

    >>> after_phrase("The answer is 4? No.\\n**Final answer:** 5 apples.\\nDone")
    '5 apples'
    """
    stated = (match for match in _PHRASE.finditer(text) if not is_rejected(text, match.start()))
    found = deque(stated, maxlen=1)
    if not found:
        return None
    line = text[found[0].end() :].split("\n", 1)[0]
    return line.strip().strip("*").rstrip(" .") or None


def is_rejected(text: str, start: int) -> bool:
    """Return whether the words before a phrase reject what it states: the wrong answer is.

    >>> is_rejected("The wrong answer is 4", 10), is_rejected("The answer is 4", 4)
    (True, False)
    """
    return _WRONG.search(text[max(0, start - 20) : start]) is not None


def inside_answer_tags(text: str) -> str | None:
    """Return what the last <answer>...</answer> holds, or None without one.

    >>> inside_answer_tags("<answer>4</answer> no: <answer> 5 </answer>")
    ' 5 '
    """
    start = text.rfind("<answer>")
    end = text.find("</answer>", start)
    return None if start < 0 or end < 0 else text[start + len("<answer>") : end]


def last_formula(text: str) -> str | None:
    r"""Return the content of the last $...$, $$...$$, \(...\) or \[...\], or None without one.

    >>> last_formula(r"If $x = 1$ then \(y = 2\).")
    'y = 2'
    """
    found = deque(_FORMULA.finditer(text), maxlen=1)
    return next((group.strip() for group in found[0].groups() if group), None) if found else None


def last_json_object(text: str) -> dict[str, Any] | None:
    """Return the last JSON object of a text: the whole text, or in the last ``` fence that has one, or anywhere.

    >>> last_json_object('Not {this}, but {"a": {"b": 1}} it is.')
    {'a': {'b': 1}}
    """
    for part in [text, *reversed(_FENCE.findall(text)), None]:
        if part is None:
            return _last_object_anywhere(text)
        value = _decoded(part.strip())
        if isinstance(value, dict):
            return value
    raise AssertionError("unreachable")


def _decoded(text: str) -> Any:
    try:
        return json.loads(text) if text[:1] == "{" else None
    except (ValueError, RecursionError):
        return None


def _last_object_anywhere(text: str) -> dict[str, Any] | None:
    decoder, found, position, failures = json.JSONDecoder(), None, 0, 0
    while failures < MAX_JSON_ATTEMPTS and (start := _OBJECT.search(text, position)):
        try:
            found, position = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            failures += 1
            position = start.start() + 1
    return found
