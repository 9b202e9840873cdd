"""Tasks about drawn pictures: read digits, sort bars by height, name the colour of a shape.

A drawing is a pure function of (seed, index), and no held-out drawing is a training one: they are drawn from another
stream, with inks, shifts and noise of their own. The questions are short, for the characters of a tiny model;
`question` words them for others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sapo.data import Prompt, Score, Status
from sapo.data.picture_files import picture_of
from sapo.errors import TaskError
from sapo.tasks.base import check_index
from sapo.tasks.generated.drawing import DARKEST, draw_text
from sapo.utils.hashing import hashed_integer

# For the annotations only: the processes that judge answers need no array library.
if TYPE_CHECKING:
    import numpy as np

CELL = 16
BAR_HEIGHT = 64

COLORS = {"red": (200, 30, 30), "green": (20, 150, 40), "blue": (30, 60, 200), "yellow": (225, 190, 0)}
"""Colours of shapes, in the order of their numbers from 1."""

SHADE = 20
"""Most that a shape's colour differs from the one it is called by, in each channel."""

MAX_NOISE = 64


@dataclass(frozen=True)
class Drawing:
    """A picture with a question about it and its answer."""

    pixels: np.ndarray
    """(height, width, 3) uint8."""
    question: str
    answer: str


class DrawnTask(ABC):
    """A task whose questions are about drawn pictures. Subclasses draw.

    Args:
        question: wording; None asks in one character, for a tiny model.
        noise: standard deviation of Gaussian noise on every pixel, in levels of 0..255.
        tinted: a light background of random colour instead of white.
        seed: random seed of the drawings. The held-out ones do not depend on it.
        name: name of the task in logs.

    Raises:
        TaskError: an option is out of range.
    """

    prefers_chat = False
    stream = "drawn"
    """Names the random numbers of the task: two tasks draw different ones."""

    def __init__(self, *, question: str | None, noise: int, tinted: bool, seed: int, name: str) -> None:
        whole_number("noise", noise, 0, MAX_NOISE)
        if question is not None and not (isinstance(question, str) and question.strip()):
            raise TaskError(f"question must be a text or null; got {question!r}; null asks in one character")
        self.question, self.noise, self.tinted, self.seed, self.name = question, noise, tinted, seed, name

    @abstractmethod
    def draw(self, generator: np.random.Generator) -> Drawing:
        """Draw one question."""

    def train_prompt(self, index: int) -> Prompt:
        """Return the drawing of `index`."""
        check_index(index)
        return replace(self._prompt("train", self.seed, index), id=index)

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first `count` of the held-out drawings."""
        return [replace(self._prompt("held_out", 0, index), id=index) for index in range(count)]

    def worked_example(self, index: int) -> tuple[Prompt, str]:
        """Return the drawing of `index` and its answer."""
        prompt = self.train_prompt(index)
        return prompt, str(prompt.answer)

    def verify(self, text: str, prompt: Prompt) -> Score:
        """Give reward 1 where the text is the answer, with blanks around it allowed; case is of no account."""
        answer = text.strip().lower()
        if not answer.isalnum() or not answer.isascii():
            return Score(0.0, Status.UNPARSEABLE, f"not one word or number: {answer[:40]!r}")
        return Score(float(answer == prompt.answer), answer=answer)

    def _prompt(self, side: str, seed: int, index: int) -> Prompt:
        import numpy as np

        generator = np.random.Generator(np.random.PCG64(hashed_integer(self.stream, side, seed, index) % 2**64))
        drawing = self.draw(generator)
        picture = picture_of(self._finished(drawing.pixels, generator))
        return Prompt(0, self.name, drawing.question, answer=drawing.answer, pictures=(picture,))

    def _finished(self, pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Tint the background and add noise."""
        import numpy as np

        if self.tinted:
            white = (pixels == 255).all(-1)
            pixels = pixels.copy()
            pixels[white] = generator.integers(190, 256, 3)
        if self.noise:
            grain = generator.normal(0, self.noise, pixels.shape)
            pixels = np.clip(np.rint(pixels + grain), 0, 255).astype(np.uint8)
        return pixels


class PictureDigitsTask(DrawnTask):
    """Read a number.

    Args:
        digits: digits of the number; leading zeros are drawn and read.
        jitter: most pixels that a digit is moved from the middle of its cell of 16 x 16 pixels.
        question, noise, tinted, seed, name: as of `DrawnTask`.

    >>> prompt = PictureDigitsTask(digits=3).train_prompt(0)
    >>> prompt.text, prompt.pictures[0].size, len(prompt.answer)
    ('#', (48, 16), 3)
    """

    stream = "picture_digits"

    def __init__(
        self,
        *,
        digits: int = 2,
        jitter: int = 1,
        question: str | None = None,
        noise: int = 0,
        tinted: bool = False,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        self.digits = whole_number("digits", digits, 1, 8)
        self.jitter = whole_number("jitter", jitter, 0, 3)
        super().__init__(
            question=question, noise=noise, tinted=tinted, seed=seed, name=name or f"picture_digits{digits}"
        )

    def draw(self, generator: np.random.Generator) -> Drawing:
        """Draw a number."""
        text = "".join(map(str, generator.integers(0, 10, self.digits).tolist()))
        return Drawing(draw_text(text, generator, cell=CELL, jitter=self.jitter), self.question or "#", text)


class PictureBarsTask(DrawnTask):
    """Sort bars by height: the answer is their places from the left, from 1, the shortest first.

    Args:
        bars: how many.
        question, noise, tinted, seed, name: as of `DrawnTask`.

    >>> prompt = PictureBarsTask(bars=4).train_prompt(0)
    >>> prompt.text, prompt.pictures[0].size, sorted(prompt.answer)
    (';', (64, 64), ['1', '2', '3', '4'])
    """

    stream = "picture_bars"

    def __init__(
        self,
        *,
        bars: int = 4,
        question: str | None = None,
        noise: int = 0,
        tinted: bool = False,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        self.bars = whole_number("bars", bars, 2, 8)
        super().__init__(question=question, noise=noise, tinted=tinted, seed=seed, name=name or f"picture_bars{bars}")

    def draw(self, generator: np.random.Generator) -> Drawing:
        """Draw bars of different heights in one ink."""
        import numpy as np

        step = (BAR_HEIGHT - 4) // self.bars
        heights = (generator.permutation(self.bars) + 1) * step
        pixels = np.full((BAR_HEIGHT, CELL * self.bars, 3), 255, np.uint8)
        ink = generator.integers(0, DARKEST, 3)
        for place, height in enumerate(heights.tolist()):
            pixels[BAR_HEIGHT - height :, place * CELL + 3 : (place + 1) * CELL - 3] = ink
        order = np.argsort(heights) + 1
        return Drawing(pixels, self.question or ";", "".join(map(str, order.tolist())))


class PictureShapesTask(DrawnTask):
    """Name the colour of the k-th shape from the left.

    Args:
        shapes: how many: discs, squares and triangles of four colours.
        answers: numbers (1 red, 2 green, 3 blue, 4 yellow) or names.
        question: wording with {k} where the place goes; None asks "3%".
        noise, tinted, seed, name: as of `DrawnTask`.

    >>> task = PictureShapesTask(answers="names", question="What colour is shape {k} from the left?")
    >>> task.train_prompt(0).text[:20], task.train_prompt(0).answer in COLORS
    ('What colour is shape', True)
    """

    stream = "picture_shapes"

    def __init__(
        self,
        *,
        shapes: int = 4,
        answers: str = "numbers",
        question: str | None = None,
        noise: int = 0,
        tinted: bool = False,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        self.shapes = whole_number("shapes", shapes, 1, 8)
        if answers not in ("numbers", "names"):
            raise TaskError(f"answers must be numbers or names; got {answers!r}; choose one of these")
        if question is not None and "{k}" not in str(question):
            raise TaskError(f"question must hold {{k}}, where the place goes; got {question!r}; write it there")
        self.answers = answers
        super().__init__(
            question=question, noise=noise, tinted=tinted, seed=seed, name=name or f"picture_shapes{shapes}"
        )

    def draw(self, generator: np.random.Generator) -> Drawing:
        """Draw a row of shapes."""
        import numpy as np

        pixels = np.full((CELL, CELL * self.shapes, 3), 255, np.uint8)
        kinds = generator.integers(0, len(_SHAPES), self.shapes).tolist()
        colors = generator.integers(0, len(COLORS), self.shapes).tolist()
        down, right = np.indices((CELL, CELL)) - (CELL - 1) / 2
        for place, (kind, color) in enumerate(zip(kinds, colors, strict=True)):
            inside = _SHAPES[kind](down, right)
            ink = np.array(list(COLORS.values())[color]) + generator.integers(-SHADE, SHADE + 1, 3)
            pixels[:, place * CELL : (place + 1) * CELL][inside] = np.clip(ink, 0, 254)
        k = int(generator.integers(0, self.shapes))
        answer = list(COLORS)[colors[k]] if self.answers == "names" else str(colors[k] + 1)
        return Drawing(pixels, (self.question or "{k}%").replace("{k}", str(k + 1)), answer)


_SHAPES: tuple[Callable[[Any, Any], Any], ...] = (
    lambda down, right: down**2 + right**2 <= 36,
    lambda down, right: (abs(down) <= 5) & (abs(right) <= 5),
    lambda down, right: (abs(down) <= 6) & (abs(right) <= (down + 6) / 2),
)
"""Whether a pixel is inside, by its distance down and right of the middle: disc, square, triangle."""


def whole_number(option: str, value: Any, low: int, high: int) -> int:
    """Return an option that is a whole number in low..high.

    Raises:
        TaskError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise TaskError(f"{option} must be a whole number in {low}..{high}; got {value!r}; choose one of these")
    return value
