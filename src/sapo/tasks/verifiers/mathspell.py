r"""Respell mathematical text: LaTeX with decoration, plain text and Unicode signs become one plain LaTeX.

Everything here is text to text, without algebra, in time linear in the length of the text or bounded.
"""

from __future__ import annotations

import re

from sapo.tasks.verifiers.mathphrases import phrase_of
from sapo.tasks.verifiers.mathwords import scaled

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FRACTIONS = {
    **{"½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5)},
    **{"⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8), "⅑": (1, 9)},
    **{"⅒": (1, 10), "⅐": (1, 7)},
}
_CHARACTERS = {
    **{"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{NO-BREAK SPACE}": " ", "\u202f": " ", "\u2009": " "},
    **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∗": "*", "π": r"\pi ", "θ": r"\theta "},
    **{"∞": r"\infty ", "°": r"^\circ ", "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}"},
    **{"⟨": "(", "⟩": ")", "（": "(", "）": ")", "，": ",", "。": "", "∖": r"\setminus "},
    **{f"{sign}": f"\\frac{{{a}}}{{{b}}}" for sign, (a, b) in _FRACTIONS.items()},
}
_FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|lcm|gcd"
# Commands that change only how their argument looks, with the argument that comes first (a colour) dropped.
_DECORATED = re.compile(
    r"\\(?:underline|uline|emph|mathstrut|ensuremath|bm|boldsymbol|boxed|fbox|mathop|mathsf|mathtt|textsf|texttt"
    r"|(?:textcolor|colorbox)\s*\{[^{}]*\}|color\s*\{[^{}]*\}(?=\s*\{))\s*(?=\{)"
)
_SPELLINGS = [
    (re.compile(r",\s*\\!\s*"), ","),  # 11,\! 111
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:large|Large|LARGE|huge|Huge|small|tiny|normalsize|bf|it|rm|sf|tt)(?![A-Za-z])\s*"), ""),
    (re.compile(r"\\color\s*\{[^{}]*\}|\\(?:hspace|vspace|phantom)\*?\s*\{[^{}]*\}"), " "),
    (re.compile(r"\\math(?:rm|bf|it|sf)\s*\{\s*([eidxyz]|\\pi)\s*\}|\\operatorname\s*\{\s*(e)\s*\}"), r"\1\2 "),
    (re.compile(rf"\\(?:operatorname|mathrm|text)\*?\s*\{{\s*({_FUNCTIONS})\s*\}}"), r"\\\1 "),
    (re.compile(r"\\(?:mbox|hbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|operatorname)\s*\{"), r"\\text{"),
    (re.compile(r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|Biggl|Biggr|bigg|Bigg|big|Big)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits|strut|phantom)(?![A-Za-z])|(?<!\\)\\[,;:!]"), ""),
    (re.compile(r"\\(?:quad|qquad|enspace|enskip|thinspace)(?![A-Za-z])|(?<!\\)\\ |~"), " "),
    (re.compile(r"\{(?:b|small|B|p)?(matrix|array)\}(?:\{[clr|]+\})?"), "{pmatrix}"),  # not vmatrix, a determinant
    (re.compile(r"\\\\\s*\[[^\]]*(?:pt|em|ex|mm|cm)\]"), r"\\\\"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\{:\}"), ":"),
    (re.compile(r"\\text\s*\{\s*(\^\\circ)\s*\}"), r"\1"),
    (re.compile(r"^\s*([a-z])\s+in\s+(?=[\[(\\])"), r"\1 \\in "),
    (re.compile(r"(?<=[0-9])\s*\(?\s*(?:\\text\s*\{\s*)?mod\s*\}?\s*([0-9]+)\s*\)?\s*$"), r" \\pmod{\1}"),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])"), r"^\\circ"),
    (re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc))\s*\(?\s*([0-9]+)\s*\^\\circ\s*\)?"), r"\1(\\frac{\2\\pi}{180})"),
    (re.compile(r"√\s*\{?\(?([0-9]+|[a-z])\)?\}?"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\{"), r"\\sqrt{"),
    (re.compile(r"\\?log\s*_\s*(?:\{\s*e\s*\}|e(?![A-Za-z]))"), r"\\ln "),
    (re.compile(r"(?<![\\A-Za-z])(?:infinity|infty|inf|oo)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"\\(?:langle|lparen)(?![A-Za-z])"), "("),
    (re.compile(r"\\(?:rangle|rparen)(?![A-Za-z])"), ")"),
    (re.compile(r"\\lbrack(?![A-Za-z])"), "["),
    (re.compile(r"\\rbrack(?![A-Za-z])"), "]"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\neq(?![A-Za-z])|!="), r"\\ne "),
    (re.compile(r"\+\s?/\s?-|(?<![0-9A-Za-z)}\]])(?<![0-9A-Za-z)}\]] )\+-"), r"\\pm "),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lor|vee)(?![A-Za-z])"), r"\\text{ or }"),
    (re.compile(r"\\(?:land|wedge)(?![A-Za-z])"), r"\\text{ and }"),
    (re.compile(r"\\(?:varnothing|O(?![A-Za-z]))(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\mathbf?b?\s*R(?![A-Za-z])|\\(?:Reals|reals|R)(?![A-Za-z])"), r"\\mathbb{R}"),
    (re.compile(r"^\s*(?:=|:|\\approx(?![A-Za-z])|≈|\\Rightarrow|\\implies|\\therefore)(?=\s*[^\s.,;])"), ""),
    (re.compile(r"^\s*≈\s*$"), r"\\approx"),
]
_ANSWER_WORDS = re.compile(
    r"^\s*\\text\s*\{\s*(?:(?:so|thus|therefore|hence|the|my|our|final|correct)\s*,?\s*)*"
    r"(?:answer|solution|result|value|total|approximately|about|exactly|area|volume|perimeter|probability|sum|length)?"
    r"\s*(?:is|are|of|:|=)*\s*\}\s*[:=]?\s*(?=\S)",
    re.IGNORECASE,
)
# The same with the answer in the same command: \text{Answer: 5 apples}.
_ANSWER_INSIDE = re.compile(
    r"^\s*\\text\s*\{\s*(?:(?:so|thus|therefore|hence|the|my|our|final|correct)\s*,?\s*)*"
    r"(?:answer|solution|result|value|total|area|volume|perimeter|probability|sum|length)"
    r"\s*(?:is|are|:|=)+\s*(?=[-+$\\.0-9(])([^{}]*)\}",
    re.IGNORECASE,
)
_ANSWER_PLAIN = re.compile(r"^\s*(?:(?:the|final)\s+)*(?:answer|result|solution)\s*(?:is|:|=)\s*(?=\S)", re.IGNORECASE)
_MATH_DELIMITERS = re.compile(r"(?<!\\)\$|(?<!\\)\\[()\[\]]")
_FUNCTION_WORD = re.compile(rf"(?<![\\A-Za-z])(?={_FUNCTIONS})({_FUNCTIONS})(?=\s*\(|\s+[0-9a-z\\](?![A-Za-z]))")
_CALLS = [
    (re.compile(r"(?<![\\A-Za-z])(?:sqrt|√)\s*\("), r"\sqrt{", "}"),
    (re.compile(r"(?<![\\A-Za-z])cbrt\s*\("), r"\sqrt[3]{", "}"),
    (re.compile(r"(?<![\\A-Za-z])exp\s*\(|\\exp\s*\("), "e^{", "}"),
    (re.compile(r"(?<![\\A-Za-z])abs\s*\("), "|", "|"),
    (re.compile(r"\^\s*\("), "^{", "}"),
]


def respell(text: str) -> str:
    r"""Respell a text without $, \left, \dfrac, \mbox, thin spaces, Unicode signs, double blanks and a final full stop.

    >>> respell(r"$\left( \dfrac12,\; 10{,}000 \right)$."), respell("2*pi + x**2"), respell(r"\text{Answer: } 2½")
    ('( \\frac12, 10,000 )', '2*\\pi+ x^2', '2\\frac{1}{2}')
    """
    for character, spelling in _CHARACTERS.items():
        text = text.replace(character, spelling)
    text = scaled(text)
    text = re.sub(r"[⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda match: "_{" + match[0].translate(_SUBSCRIPTS) + "}", text)
    text = _MATH_DELIMITERS.sub("", text)
    text = _without_stars(text)
    if (phrase := phrase_of(text)) is not None:
        return phrase
    text = _DECORATED.sub("", text)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    text = re.sub(r"(?<=[0-9])\s*(?:\.\.\.|…)(?=\s*\}*\s*$)", r"\\ldots", text)
    text = _ANSWER_INSIDE.sub(_told, text)
    text = _ANSWER_PLAIN.sub("", _ANSWER_WORDS.sub("", text))
    text = _FUNCTION_WORD.sub(r"\\\1 ", text)
    text = _ungrouped(" ".join(_with_braces(text).split()).rstrip(" .;,"))
    return re.sub(r"(\\[A-Za-z]+) (?=[^A-Za-z0-9 \\(\[{])", r"\1", text).rstrip(" .;,")


def squeezed(text: str) -> str:
    r"""Remove blanks and needless braces, so that two spellings of the same text are equal.

    >>> squeezed(r"\frac{1}{2} x^{2}") == squeezed(r"\frac12x^2")
    True
    """
    text = re.sub(r"(?<=\\)([A-Za-z]+)\s+(?=[A-Za-z])", "\\1\x00", text)  # the blank that ends a command
    text = re.sub(r"(?<=[0-9])\s+(?=[0-9])", "\x00", text)  # 1 3/4 is not 13/4
    text = re.sub(r"\s+", "", text).replace("\x00", " ")
    return re.sub(r"(?<!text)\{([0-9A-Za-z])\}", r"\1", text)


def _told(match: re.Match[str]) -> str:
    """Return the answer behind the words that announce it, in a text command where it has words of its own."""
    return f"\\text{{{match[1]}}}" if re.search(r"[A-Za-z]{2}", match[1]) else match[1]


def _without_stars(text: str) -> str:
    """Return a text without the stars of bold type, and with ^ for the ** of a power."""
    text = (
        re.sub(r"(?<=[\w)}])\s?\*\*\s?(?=[-\w({\\])", "^", text) if text.count("**") % 2 or "**" in text[1:-2] else text
    )
    return text.replace("**", " ")


def _with_braces(text: str) -> str:
    """Return a text with sqrt(...), exp(...) and ^(...) in LaTeX. The brackets may be nested."""
    for pattern, opening, closing in _CALLS:
        for _ in range(20):
            found = pattern.search(text)
            end = None if found is None else closing_of(text, found.end() - 1)
            if found is None or end is None:
                break
            text = text[: found.start()] + opening + text[found.end() : end] + closing + text[end + 1 :]
    return re.sub(r"\^([0-9]{2,}|-[0-9]+)(?![0-9.])", r"^{\1}", text) if "\\" not in text else text


def closing_of(text: str, start: int) -> int | None:
    """Return where the bracket that opens at `start` is closed, or None.

    >>> closing_of("f(a(b)c) d", 1)
    7
    """
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth == 0:
            return position
    return None


def _ungrouped(text: str) -> str:
    """Remove braces around the whole text."""
    while text.startswith("{") and closing_of(text, 0) == len(text) - 1 and len(text) > 2:
        text = text[1:-1].strip()
    return text
