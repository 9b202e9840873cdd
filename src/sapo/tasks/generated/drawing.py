"""Draw text as pictures for generated tasks: a font of its own of 5 x 7 dots, no file and no library of fonts.

A drawing is a pure function of the random generator it is given.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

# For the annotations only: the processes that judge answers need no array library.
if TYPE_CHECKING:
    import numpy as np

_FONT = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11111 00010 00100 00010 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
    "+": "00000 00100 00100 11111 00100 00100 00000",
    "-": "00000 00000 00000 11111 00000 00000 00000",
}
"""Rows of dots by character."""

_ROWS, _COLUMNS = 7, 5
DARKEST = 90
"""Inks are drawn from colours below this in every channel."""


@cache
def _glyph(character: str, scale: int) -> np.ndarray:
    """Return where a character has ink, (7 x scale, 5 x scale) bool."""
    import numpy as np

    dots = np.array([[dot == "1" for dot in row] for row in _FONT[character].split()])
    return dots.repeat(scale, axis=0).repeat(scale, axis=1)


def draw_text(
    text: str, generator: np.random.Generator, *, cell: int = 16, scale: int = 2, jitter: int = 0
) -> np.ndarray:
    """Draw characters in square cells, dark on white.

    Args:
        text: of the digits, + and -.
        generator: gives the ink, and how far each character is moved.
        cell: side of a character's cell in pixels.
        scale: side of a dot in pixels.
        jitter: most pixels that a character is moved from the middle of its cell, each way.

    Returns:
        (cell, cell x characters, 3) uint8.
    """
    import numpy as np

    height, width = _ROWS * scale, _COLUMNS * scale
    picture = np.full((cell, cell * len(text), 3), 255, np.uint8)
    ink = generator.integers(0, DARKEST, 3)
    for place, character in enumerate(text):
        glyph = _glyph(character, scale)
        down, right = generator.integers(-jitter, jitter + 1, 2) if jitter else (0, 0)
        top = min(max((cell - height) // 2 + int(down), 0), cell - height)
        left = place * cell + min(max((cell - width) // 2 + int(right), 0), cell - width)
        picture[top : top + height, left : left + width][glyph] = ink
    return picture
