r"""The verifier `choice`: the letter or the value of an option, as MathVision is scored.

The options are in the prompt's metadata. Where a row has none, the letter or value of the answer itself is expected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.verifiers.base import brief, reference_of, unparseable
from sapo.tasks.verifiers.extract import after_phrase, inside_answer_tags, is_rejected, last_boxed
from sapo.tasks.verifiers.mathspell import respell, squeezed
from sapo.tasks.verifiers.mathtext import number_of, without_name
from sapo.tasks.verifiers.numbers import number_in

_LABELLED = re.compile(r"\(?([A-Za-z])(?:\)|\s?[.:,](?=\s)|\s[-\u2013\u2014](?=\s)|[.:)]$)\s*(.*)", re.DOTALL)
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
# A capital letter before its reason: "B because ...", "option B, since ...", "(B) is right". Not "A or B".
_BEFORE_REASON = re.compile(
    r"(?:(?i:option|choice|letter)\s+)?\(?([A-Z])\)?(?:,?\s+(?:because|since|as|for|which|from|over|rather\s+than|instead\s+of)\b"
    r"|(?:\s*[,;.:\u2013\u2014-](?=\s)|\s+is\s+(?:right|correct|true|the)\b)"
    r"(?!\s*(?:or|and|nor|[A-Z]\b(?!\w)|\(?[B-Z]\))))(?P<rest>.*)",
    re.DOTALL,
)
_CHOSEN = re.compile(
    r"(?i:\b(?:correct|right|best|final|my)\s+(?:answer\s+|option|choice)\s*(?:is|:|=|would be)|\boption is|\bchoice is"
    r"|\bI(?:'d| would| will|'ll)? (?:choose|pick|select|go (?:with|for)))\s*:?\s*"
)
_RETRACTED = re.compile(
    r"(?i)\b(?:wait\s*[,.:!\u2026\u2013\u2014-]|no,? wait|actually,|hmm|scratch that|on second thought|I was wrong"
    r"|my mistake|correction:|let me re|no[,:] )"
)
_CONCLUDED = re.compile(
    r"(?:(?i:so|hence|thus|therefore),?\s+)?(?:(?i:option|choice|answer)\s+)?\(?([A-Z])\)?"
    r"\s+is\s+(?:the\s+)?(?:right|correct|best|true)(?:\s+(?:answer|option|choice|one))?[.!]?"
)
_SO = re.compile(
    r"(?:^|[.!?]\s+)(?i:so|hence|thus|therefore|answer|it must be),?\s+"
    r"(?i:(?:it is|it's|it must be|the answer is|option|choice)\s+)*\(?([A-Z])\)?"
    r"(?:,?\s+(?:rather\s+than|instead\s+of)\s+\(?[A-Z]\)?)?[.!]?$"
)
# A letter with the text of its option, where the row has no options: "C. Carbon", but not "B) or C)".
_WITH_TEXT = re.compile(
    r"\(?([A-Z])[).:]\s+(?!(?i:or|and|nor)\b)(?!.*(?<![A-Za-z'])\(?[A-Z][).:](?:\s|$))(?!.*\bor\s+\(?[A-Z]\b(?!\w)).+"
)
# Another letter that joins the chosen one or its option: "or (C) Paris", "or perhaps C", but not "and C is wrong".
_HEDGE = re.compile(
    r"^\s*[,/&]\s*\([A-Z]\)|\s*,?\s*(?:or|and)\s+(?:(?:perhaps|maybe|possibly|probably|also|else|even)\s+)*(?i:(?:option|choice)\s+)?"
    r"\(?[A-Z]\)?(?![\w'])(?!\s+(?:is|are|was|were|would|does|do|can|cannot|has|have|fails?|gives?)\b)"
)
_TEXT_COMMAND = re.compile(r"\\text\s*\{([^{}]*)\}")

# Characters of an answer that is read: longer than any option, and short enough for the patterns here to be fast.
MAX_LENGTH = 1000


@dataclass(frozen=True)
class Choice:
    r"""Gives reward 1 for the right option by letter, value or both: B, (B), B. 5, \boxed{\text{B}}, \boxed{5}.

    The answer is the last \boxed{...}. Without a box it is what follows the last "answer is", or else the last line,
    where that is an option. A letter with the value of another option is a wrong answer.

    >>> prompt = Prompt(id=0, task="mathvision", text="?", answer="B", metadata={"options": ["4", "5", "6"]})
    >>> [Choice()(text, prompt).reward for text in (r"\boxed{B}", "The answer is (B) 5.", r"\boxed{5}", "A")]
    [1.0, 1.0, 1.0, 0.0]
    """

    options_field: str = "options"
    """Field of the prompt's metadata that lists the options."""
    require_box: bool = False
    """Read boxes only. A completion without one is unparseable."""

    index_from: int | None = None
    """Number of the first option, 0 or 1, where the rows' answer is an option's number. null: a letter or value."""

    def __post_init__(self) -> None:
        if self.index_from not in (None, 0, 1) or isinstance(self.index_from, bool):
            raise TaskError(f"choice's index_from must be 0, 1 or null; got {self.index_from!r}")
        if not isinstance(self.options_field, str):
            raise TaskError(f"choice's options_field must name a field of the rows; got {self.options_field!r}")

    def __call__(self, text: str, prompt: Prompt) -> Score:
        options = [str(option) for option in listed(prompt.metadata.get(self.options_field))]
        right = self._right(reference_of(prompt), options)
        if right is None:
            raise ValueError(
                f"choice needs an answer that is an option or its letter; got {prompt.answer!r}; where the rows hold "
                "the option's number, set index_from: 0 (or 1) for that of the first"
            )
        boxed = last_boxed(text)
        if boxed is None and self.require_box:
            return unparseable("no \\boxed{} in the completion")
        tagged = inside_answer_tags(text)
        stated = [after_phrase(text), _after_choice(text), *_end_lines(text)]
        candidates = [tagged] if tagged is not None else [s for s in stated if s and not _is_retracted(text, s)]
        if not options:
            of_phrases = {stated[0], stated[1], tagged}
            candidates = [_letter_before_text(c) if c in of_phrases else c for c in candidates]
        if boxed is not None:
            candidates = [boxed] if self.require_box or _is_option_like(boxed) else [boxed, *candidates]
        # Where the answer is in words, any words are an answer. Where it is a letter or a number, words are none.
        plain = bool(options) or len(right) == 1 or number_in(right) is not None
        read = (_pick(c, options, words=not plain) for c in candidates if c)
        given = next((g for g in read if g is not None), None)
        if given is None:
            shown = next((c for c in candidates if c), "")
            return unparseable(f"no option in the completion: {brief(shown)}")
        return Score(float(given == right), answer=given)

    def _right(self, answer: str, options: list[str]) -> str | None:
        """Return the letter of the right option."""
        if self.index_from is None:
            return _pick(answer, options, words=True)
        index = int(answer) - self.index_from if answer.strip().isdigit() else -1
        return chr(ord("A") + index) if 0 <= index < len(options) else None


def listed(options: object) -> Sequence[object]:
    """Return the options of a row: those of any sequence, numpy arrays included, and none of a string.

    Raises:
        ValueError: they are no sequence.
    """
    if options is None or isinstance(options, str):
        return ()
    try:
        return list(options)  # type: ignore[call-overload]
    except TypeError as error:
        rule = f"a row's options must be a list; got {options!r:.60}"
        raise ValueError(f"{rule}; fix the row, or set options_field") from error


def _end_lines(text: str) -> list[str]:
    """Return the last line and the first, where an answer may stand alone."""
    lines = text.strip().splitlines()
    ends = [lines[-1].strip(), lines[0].strip()] if lines else []
    plain = [line.replace("**", "") for line in ends]
    concluded = [_CONCLUDED.fullmatch(line) or (_SO.search(line) if not i else None) for i, line in enumerate(plain)]
    return [found[1] if found else line for found, line in zip(concluded, ends, strict=True)]


def _after_choice(text: str) -> str | None:
    """Return what follows the last "the correct option is" or "I would pick" on its line, or None."""
    found = [match for match in _CHOSEN.finditer(text) if not is_rejected(text, match.start())]
    return text[found[-1].end() :].split("\n", 1)[0].strip("*").rstrip(" .") if found else None


def _letter_before_text(stated: str) -> str:
    """Return the letter of "C. Carbon", and any other text unchanged."""
    found = _WITH_TEXT.fullmatch(stated.replace("*", "").strip())
    return stated if found is None else found[1]


def _is_retracted(text: str, stated: str) -> bool:
    """Return whether what follows an answer takes it back: B. Wait, no: C."""
    start = 0 if text.lstrip().startswith(stated) and "\n" in text else text.rfind(stated)
    return _RETRACTED.search(text, max(start, 0)) is not None


def _is_option_like(boxed: str) -> bool:
    """Return whether a box names letters, so that it is the answer even where it is no option."""
    return re.fullmatch(r"[\s\W]*(?:\\\w+\{)?\(?[A-Z]\b.{0,200}", boxed.strip(), re.DOTALL) is not None


def _pick(text: str, options: list[str], *, words: bool) -> str | None:
    """Return the letter of the option that a text names, or None. Without options, its letter, number or words."""
    if len(text) > MAX_LENGTH:
        return None
    spelt = _TEXT_COMMAND.sub(r"\1", without_name(respell(text.replace("**", "")))).strip(" !")
    spelt = re.sub(r"^(?i:option|choice|letter)\s+(?=\(?[A-Za-z]\b)", "", spelt)
    spelt = re.sub(r"^\[\s*([A-Za-z])\s*\]$", r"\1", spelt)
    if not options:
        spelt = _without_reason(spelt, [])
        letter = _LETTER.fullmatch(spelt)
        number = number_of(spelt)
        if letter:
            return letter[1].upper()
        if number:
            return str(number.value)
        return (_plain(spelt) or None) if words else None
    letters = [chr(ord("A") + i) for i in range(len(options))]
    values = [_plain(option) for option in options]
    spelt = _without_reason(spelt, values)
    letter = _LETTER.fullmatch(spelt)
    if letter and letter[1].upper() in letters:
        return letter[1].upper()
    labelled = _LABELLED.fullmatch(spelt)
    if labelled and labelled[1].upper() in letters:
        name, rest = labelled[1].upper(), _plain(labelled[2])
        if re.fullmatch(r"\(?[A-Za-z]\)?[.!]?", labelled[2].strip()) and rest not in values:
            return None  # B, C
        if rest not in values and _is_hedged(labelled[2], values):
            return None
        # A letter with the value of another option is no choice. Any other words after it only explain it.
        return name if rest not in values or values[letters.index(name)] == rest else None
    plain = _plain(spelt)
    return letters[values.index(plain)] if values.count(plain) == 1 else None


def _without_reason(text: str, values: list[str]) -> str:
    """Return the letter of "option B" and "B because ...", and any other text unchanged."""
    found = _BEFORE_REASON.match(text)
    if found is None:
        return text
    # After a label's colon or full stop stands the option's own text, which must fit. So must it after a dash.
    label = text[: found.start("rest")].rstrip()[-1] in ".:"
    return text if label or _plain(found["rest"]) in values else found[1]


def _is_hedged(rest: str, values: list[str]) -> bool:
    """Return whether what follows a letter, or the option of that letter, joins another letter to it."""
    hedges = (match for match in _HEDGE.finditer(rest) if match.start() == 0 or _plain(rest[: match.start()]) in values)
    return next(hedges, None) is not None


def _plain(text: str) -> str:
    """Return the text of an option in one spelling, and numbers by value."""
    spelt = _TEXT_COMMAND.sub(r"\1", respell(text)).strip()
    number = number_of(spelt)
    return str(number.value) if number and not number.percent else squeezed(spelt).lower()
