"""Drawn questions: drawn again bit for bit, held out, and answered by what is in the picture."""

from __future__ import annotations

import numpy as np
import pytest

from sapo.data.picture_files import decode_picture
from sapo.errors import TaskError
from sapo.tasks import WorkedTask, make_task
from sapo.tasks.generated.drawing import draw_text
from sapo.tasks.generated.drawn import COLORS

KINDS = ("picture_digits", "picture_bars", "picture_shapes")


def pixels_of(prompt):
    return np.asarray(decode_picture(prompt.pictures[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawing_is_a_function_of_seed_and_index_and_none_that_is_held_out_is_trained_on(kind):
    task, again = (make_task(kind, seed=3) for _ in range(2))
    assert isinstance(task, WorkedTask)
    train = [task.train_prompt(i) for i in range(100)]
    assert train == [again.train_prompt(i) for i in range(100)]
    assert train[0] != make_task(kind, seed=4).train_prompt(0)
    held_out = task.held_out(100)
    assert held_out == make_task(kind, seed=4).held_out(100)
    assert len({p.identity for p in held_out} | {p.identity for p in train}) == 200
    for index in range(5):
        prompt, answer = task.worked_example(index)
        assert task.verify(f" {answer} ", prompt).reward == 1
        assert task.verify("99999", prompt).reward == 0
        assert task.verify("1 2", prompt).status.value == "unparseable"


def test_digits_are_those_in_the_picture():
    """Read by comparing cells with every digit drawn in the same ink."""
    glyphs = {d: draw_text(str(d), np.random.default_rng(0))[:, :, 0] < 255 for d in range(10)}
    for index in range(30):
        prompt = make_task("picture_digits", seed=0, digits=3, jitter=0).train_prompt(index)
        dots = (pixels_of(prompt) < 255).all(-1)
        read = [next(d for d, g in glyphs.items() if np.array_equal(g, dots[:, at : at + 16])) for at in (0, 16, 32)]
        assert "".join(map(str, read)) == prompt.answer


def test_the_order_of_bars_is_that_of_their_heights():
    for index in range(30):
        prompt = make_task("picture_bars", seed=0, bars=5).train_prompt(index)
        heights = (pixels_of(prompt)[:, 8::16] < 255).all(-1).sum(0)
        assert len(set(heights.tolist())) == 5
        assert "".join(str(i + 1) for i in sorted(range(5), key=lambda i: heights[i])) == prompt.answer


def test_the_colour_is_that_of_the_shape_that_is_asked_for():
    for index in range(30):
        task = make_task("picture_shapes", seed=0, shapes=5, answers="names", question="Shape {k}?")
        prompt = task.train_prompt(index)
        k = int(prompt.text.removeprefix("Shape ").removesuffix("?"))
        middle = tuple(pixels_of(prompt)[8, (k - 1) * 16 + 8].tolist())
        distances = {name: np.abs(np.array(color) - middle).sum() for name, color in COLORS.items()}
        assert prompt.answer == min(distances, key=distances.get)
        numbered = make_task("picture_shapes", seed=0, shapes=5).train_prompt(index)
        assert list(COLORS)[int(numbered.answer) - 1] == prompt.answer


def test_noise_and_tint_change_pixels_and_nothing_else():
    plain, noisy = (make_task("picture_bars", seed=0, noise=n, tinted=bool(n)).train_prompt(0) for n in (0, 20))
    assert plain.answer == noisy.answer
    assert (pixels_of(plain)[0] == 255).all()
    # 12,288 values: a standard deviation within 5% of 20, tinted below white so that little is clipped.
    difference = pixels_of(noisy)[0].astype(float)
    assert 10 < difference.std(0).mean() < 22
    assert difference.mean() < 250


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("picture_digits", {"digits": 9}, "digits must be a whole number in 1..8; got 9"),
        ("picture_digits", {"noise": -1}, "noise must be a whole number in 0..64; got -1"),
        ("picture_bars", {"bars": 1}, "bars must be a whole number in 2..8; got 1"),
        ("picture_bars", {"question": " "}, "question must be a text or null"),
        ("picture_shapes", {"answers": "words"}, "answers must be numbers or names"),
        ("picture_shapes", {"question": "which?"}, "question must hold {k}"),
    ],
)
def test_options_out_of_range_are_refused(kind, options, message):
    with pytest.raises(TaskError, match=message):
        make_task(kind, seed=0, **options)
