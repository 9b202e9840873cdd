r"""Find the answer of a completion on mathematics: a box, <answer> tags, ####, a phrase, a formula, a number."""

from __future__ import annotations

import re

from sapo.tasks.verifiers.extract import after_phrase, boxes, inside_answer_tags, last_boxed, last_boxes, last_formula
from sapo.tasks.verifiers.mathphrases import stated_at_the_end
from sapo.tasks.verifiers.mathspell import respell
from sapo.tasks.verifiers.mathtext import number_of
from sapo.tasks.verifiers.mathunits import UNITS_OF_PARTS, quantity_of
from sapo.tasks.verifiers.mathwords import is_changed, scaled
from sapo.tasks.verifiers.numbers import last_number_in

_HASHES = re.compile(r"^[ \t]*####+[ \t]*|####[ \t]*(?=[-+$\\(\[0-9])", re.MULTILINE)
# What follows an answer in its sentence, and may hold numbers of its own.
_REASON = re.compile(
    r"(?:,|\s+and|\s+but)\s+not\b|\s+\(?not\s+[$\\(-]*[0-9]"
    r"|,?\s+(?:because|since|as|for|which|where|so)\b"
    r"|\s+\((?!\s*(?:in\s+)?(?:base|mod)\b)|[;!]|\.\s+(?=[A-Z])|,\s+(?=[a-z]{2})"
)
# Words before and behind an answer in a sentence that may belong to it.
_BEFORE = re.compile(
    r"(?i:(?<![A-Za-z])(?:at (?:least|most)|(?:more|less|fewer|greater|larger|smaller|other) than|not|up to|nearly"
    r"|almost|under|over|above|below|minus|negative"
    r"|(?:wrong|incorrect|false|impossible) (?:answer|value|option)s? (?:is|was|would be)))$"
)
_AFTER = re.compile(r"[$)]{0,2}\\?\)?(?:\s*\(?\s*[A-Za-z0-9]+){0,2}")
_UNITS = "(?:" + "|".join(sorted(UNITS_OF_PARTS, key=len, reverse=True)) + ")"
_QUANTITIES = re.compile(
    rf"(?i:(?<![\w.])[0-9]+(?:\.[0-9]+)?\s*{_UNITS}s?"
    rf"(?:\s*,?\s*(?:and\s+)?[0-9]+(?:\.[0-9]+)?\s*{_UNITS}s?)+)(?![A-Za-z])"
    r"(?=[^0-9]*$)"
)
_TWO_THINGS = re.compile(
    r"\W*[0-9.]+\$?\s*(?:[A-Za-z]+\s*){1,2}(?:,\s*|\band\s+){1,2}\$?[0-9.]+\$?(?:\s*[A-Za-z]+){0,3}\W*$"
)


def answer_in(text: str, *, several: bool = False, require_box: bool = False) -> str | None:
    r"""Return the answer of a completion as it is written, or None. `several` joins adjacent boxes to one list.

    >>> answer_in(r"so \boxed{5}"), answer_in("3 * 6 = 18 #### 18"), answer_in("I make it 7 or 8"), answer_in("Hm.")
    ('5', '18', '8', None)
    """
    text = scaled(text)
    tagged = None if require_box else _tagged(text)
    if tagged is not None:
        return _before_reason(tagged) or answer_in(tagged, several=several) or tagged
    if several and len(together := last_boxes(text)) > 1:
        return ", ".join(together)
    boxed = last_boxed(text)
    if boxed is not None or require_box or re.search(r"\\(?:boxed|fbox)\s*\{", text):  # a box that is never closed
        return boxed
    marked = _after_hashes(text)
    return marked if marked is not None else _without_marks(text)


def _tagged(text: str) -> str | None:
    """Return what the last <answer> tags hold, unless a box follows them."""
    inside = inside_answer_tags(text)
    if inside is None or not inside.strip():
        return None
    found = boxes(text)
    return inside.strip() if not found or found[-1][0] < text.rfind("</answer>") else None


def _without_marks(text: str) -> str | None:
    phrase = after_phrase(text)
    if phrase is not None:
        if (head := _before_reason(phrase)) is not None:
            return head
        spelt = respell(phrase)
        if is_formula(phrase) or number_of(spelt) is not None or quantity_of(spelt) is not None:
            return _in_its_words(phrase, last_formula(phrase)) or phrase
        if _TWO_THINGS.match(phrase):
            return phrase  # neither 2 nor 3 is 2 boxes and 3 bags
        return _in_its_words(phrase, last_formula(phrase) or last_number_in(phrase)) or phrase
    if (line := _last_line(text)) is not None:
        return line
    if (nothing := stated_at_the_end(text)) is not None:
        return nothing
    return _in_its_words(text, last_formula(text) or last_number_in(text))


def _in_its_words(text: str, found: str | None) -> str | None:
    """Return an answer without a mark, and the words beside it that belong to it: at least 12, 1 hour 30 minutes."""
    start = -1 if found is None else text.rfind(found)
    if found is None or start < 0:  # digits grouped by blanks
        return found
    before, after = text[:start].rstrip("$( \\"), text[start + len(found) :]
    opening, closing = _BEFORE.search(before), _AFTER.match(after)
    words = f"{opening[0].strip() if opening else ''} {found}{closing[0].replace('$', '') if closing else ''}".strip()
    if is_changed(words):
        return words
    if (quantity := _QUANTITIES.search(re.sub(r"\$|\\[()]", "", before[-80:] + " " + found + after[:30]))) is not None:
        return quantity[0].strip()
    return found


def _before_reason(phrase: str) -> str | None:
    """Return the answer at the head of a phrase whose rest only explains it, or None."""
    opening = next((sign for sign in ("$", r"\(") if phrase.startswith(sign)), None)
    if opening is not None:
        end = phrase.find("$" if opening == "$" else r"\)", len(opening))
        rest = phrase[end + len(opening) :]
        if end > len(opening) and (_REASON.match(rest) or re.match(r"\.(?:\s|$)", rest)):
            return phrase[len(opening) : end].strip()
    if "$" in phrase or "\\" in phrase:
        return None
    head = _REASON.split(phrase, maxsplit=1)[0].strip().strip("*").strip()
    return head if head != phrase and (is_formula(head) or number_of(respell(head)) is not None) else None


def _after_hashes(text: str) -> str | None:
    """Return the answer after the last ####, or None where that is a heading."""
    found = list(_HASHES.finditer(text))
    if not found:
        return None
    line, _, rest = text[found[-1].end() :].strip().partition("\n")
    line = line.strip().strip("*").strip()
    if not line or is_formula(line) or number_of(respell(line)) is not None:
        return line or None
    if rest.strip():
        return None
    formula = _in_its_words(line, last_formula(line))
    return formula if formula is not None else (after_phrase(line) or line)


def _last_line(text: str) -> str | None:
    """Return the last line where it is a formula or a number alone."""
    lines = text.strip().rsplit("\n", 1)
    line = lines[-1].strip()
    bare = line.strip("*_` ").strip() if not line.startswith(("* ", "- ")) else line[2:].strip("*_` ")
    return bare if is_formula(bare) else None


def is_formula(text: str) -> bool:
    """Return whether a text is one short line of mathematics: a digit, a command or an operator, without words."""
    if not text or "\n" in text or len(text) > 200:
        return False
    spelt = respell(text)
    return bool(any(c.isdigit() or c in "\\=+^/" for c in spelt)) and not _has_words(spelt)


def _has_words(text: str) -> bool:
    text = re.sub(r"\\(?:begin|end)\{[a-z]+\}|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b", " ", text)
    plain = "".join(c if c.isalpha() or c == "\\" else " " for c in text)
    return any(len(word) >= 2 and "\\" not in word for word in plain.split())
