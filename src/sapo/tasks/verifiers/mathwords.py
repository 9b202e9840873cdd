r"""Read the words around a number that change its value: 5 million, 3 dozen, 12 or more, not 7.

A number before a word of scale is multiplied here. A word that makes a number another answer, or none, is only found
here: what it is worth depends on the sentence, so that the answer cannot be read.
"""

from __future__ import annotations

import re
from fractions import Fraction

from sapo.tasks.verifiers.mathphrases import NUMBER_WORD

_SCALES = {
    **{"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **{"quadrillion": 10**15, "lakh": 10**5, "crore": 10**7, "bn": 10**9, "mn": 10**6, "mln": 10**6, "k": 10**3},
}
_BEHIND_MONEY = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_LONG = "hundred|thousand|million|billion|trillion|quadrillion|dozen|lakh|crore"
_NUMBER = r"(?<![\w.,^_])(?:[0-9]{1,3}(?:,[0-9]{3}){1,20}(?![0-9])|[0-9]{1,60})(?:\.[0-9]{1,60})?"
# The word may stand in \text{...}, whose rest stays, and behind the $ that closes a formula.
_BETWEEN = r"(?:\s|\\[,;:! ]|~|-(?=[a-z])|\\?\$|\\\)|\\text\s*\{|\\(?:mbox|mathrm|textrm|textbf)\s*\{|\*)"
_SCALED = re.compile(
    rf"(?P<number>{_NUMBER})(?P<between>{_BETWEEN}{{0,6}})"
    rf"(?P<scale>(?i:{_LONG})s?|bn|mn|mln|(?<=\{{)\s*k(?=\s*\}}))(?![A-Za-z])"
)
_MONEY = re.compile(
    rf"(?P<sign>(?:\\?\$|[€£¥₹])\s?)(?P<number>{_NUMBER})\s?(?P<scale>[kKmMbBtT])(?=[\s.,;:!?)}}]|$)"
    r"(?!\s*[-+*/^=<>\\])(?![^$\n]*\$(?!\d))"  # $2k + 2$ and $2k$ are formulas
)
_FACTOR = re.compile(rf"(?P<between>{_BETWEEN}{{0,6}})(?P<scale>(?i:{_LONG})s?)(?![A-Za-z])")
_NEXT = re.compile(rf"(?:{_BETWEEN}|,|and\b|\}}){{0,8}}(?P<number>{_NUMBER})")

_NUMBER_AHEAD = r"\s*(?:a|an|the|than|of)?\s*[$(]*-?\.?[0-9\\]"
_CHANGED = re.compile(
    r"(?<![A-Za-z\\])(?i:"
    # behind a number or before it
    r"not|cannot|never|impossible|incorrect|wrong|invalid|false|none|except|without|excluding|undefined"
    r"|squared|cubed|factorial|half|halves|thirds|fourths|fifths|sixths|sevenths|eighths|ninths|tenths|twelfths"
    r"|hundredths|thousandths|millionths|billionths|tens|tenth|hundredth|thousandth"
    r"|hundreds?|thousands?|(?:m|b|tr|quadr)illions?|dozens?|lakhs?|crores?"
    r"|(?:or|and)\s+(?:more|less|fewer|greater|larger|smaller|bigger|above|below|over|under|up|higher|lower|so|better"
    r"|longer|shorter|older|younger|later|earlier|beyond|counting)"
    r"|to\s+the\s+power(?:\s+of)?|divided\s+by|multiplied\s+by|modulo|mod"
    rf"|(?:at\s+(?:least|most)|(?:more|less|fewer|greater|larger|smaller|higher|lower|longer|other)\s+than)"
    rf"|(?:up\s+to|under|over|above|below|nearly|almost|minus|negative|plus|between)(?={_NUMBER_AHEAD})"
    rf"|below\s+zero|(?:plus|minus)\s+(?!signs?\b)[a-z]{{2}}|(?:times|by)\s+(?:an?\s+)?{NUMBER_WORD}(?![A-Za-z])"
    r")(?![A-Za-z])"
    r"|[0-9]\s*(?:M|B|K|bn|mn|mln)(?![A-Za-z0-9^_])|[0-9]\s*\(?\s*(?:in\s+)?base\s*[0-9a-z]|\\[pb]?mod(?![A-Za-z])"
)
_THAN_SOMEONE = re.compile(
    rf"(?i:(?:more|less|fewer|greater|larger|smaller|higher|lower|longer)\s+than)(?!{_NUMBER_AHEAD})"
)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def scaled(text: str) -> str:
    r"""Multiply the numbers of a text that stand before a word such as million, thousand or dozen.

    >>> scaled("$1.5 million a year"), scaled(r"5\text{ thousand}"), scaled("2 hundred thousand"), scaled("$5k")
    ('$1500000 a year', '5000', '200000', '$5000')
    """
    lower = text.lower()
    words = (*_LONG.split("|"), "bn", "mn", "mln", "{k", "{ k", *"$€£¥₹")
    if not any(word in lower for word in words):
        return text
    text = _MONEY.sub(lambda m: f"{m['sign']}{_times(m['number'], _BEHIND_MONEY[m['scale'].lower()])}", text)
    pieces, position = [], 0
    while (match := _SCALED.search(text, position)) is not None:
        factor, end, opened = _scale(match["scale"]), match.end(), match["between"]
        while (more := _FACTOR.match(text, end)) is not None:  # 2 hundred thousand
            factor, end, opened = factor * _scale(more["scale"]), more.end(), opened + more["between"]
        if _goes_on(text, end, factor):
            pieces.append(text[position:end])
        else:
            braces = opened.count("{")
            while braces and (closing := re.compile(r"\s*\}").match(text, end)):
                braces, end = braces - 1, closing.end()
            kept = "".join(re.findall(r"\\?\$|\\\)", opened)) + "\\text{" * braces
            pieces.append(text[position : match.start()] + _times(match["number"], factor) + kept)
        position = end
    return "".join([*pieces, text[position:]])


def is_changed(text: str) -> bool:
    r"""Return whether words or signs in a text make its number another answer, or none.

    >>> [is_changed(t) for t in (r"12\text{ or more}", "12 squared", "not 7", "12 eggs per day", r"5 \text{ or } 7")]
    [True, True, True, False, False]
    """
    plain = " ".join(_TEXT.sub(r" \1 ", text).split())
    if not any(character.isdigit() for character in plain):
        return False
    plain = _THAN_SOMEONE.sub(" ", plain)  # 5 more than Tom
    if _CHANGED.search(plain) or re.search(r"\\[lc]?dots(?![A-Za-z])|\.\.\.|…", plain):
        return True
    if any(re.search(r"[0-9]", re.sub(r"[A-Za-z](?:\s*\^\s*)?[23](?![0-9])", "", words)) for words in _behind(text)):
        return True  # 12 (base 8)
    return re.fullmatch(r"[-+]?[0-9.,]+\s*(?:'{1,2}|\"|\^\s*\{?\\prime.*|\?+)", plain) is not None


def _behind(text: str) -> list[str]:
    """Return the words that stand behind a number in a text command at the end of a text."""
    return re.findall(r"[0-9}]\s*\\text\s*\{\s*([^{}0-9][^{}]*)\}\s*$", text)


def _goes_on(text: str, end: int, factor: int) -> bool:
    """Return whether a number behind a word of scale may belong to it: 5 thousand 200, but not 1 million, 2 million."""
    after = _NEXT.match(text, end)
    if after is None:
        return False
    scale = _SCALED.match(text, after.start("number"))
    if scale is not None and _scale(scale["scale"]) >= factor:
        return False
    return "," not in after[0][: after.start("number") - after.start()] or _value(after["number"]) < factor


def _scale(word: str) -> int:
    word = word.strip().lower()
    return _SCALES.get(word) or _SCALES[word.removesuffix("s")]


def _value(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))


def _times(number: str, factor: int) -> str:
    """Return a decimal times a power of ten or a dozen, as a decimal."""
    value = _value(number) * factor
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    digits = str(int(value * 10**places)).rjust(places + 1, "0")
    return f"{digits[:-places]}.{digits[-places:]}" if places else digits
