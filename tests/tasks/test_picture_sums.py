"""Sums in pictures: drawn again bit for bit, never trained on what is held out, judged by the number."""

from __future__ import annotations

import numpy as np
import pytest

from sapo.data.picture_files import decode_picture
from sapo.errors import TaskError
from sapo.tasks import WorkedTask, make_task
from sapo.tasks.generated.drawing import draw_text


def test_a_drawing_is_a_function_of_seed_and_index():
    task, again = (make_task("picture_sums", seed=3, digits=2, jitter=2) for _ in range(2))
    assert [task.train_prompt(i) for i in range(20)] == [again.train_prompt(i) for i in range(20)]
    assert make_task("picture_sums", seed=4, digits=2, jitter=2).train_prompt(0) != task.train_prompt(0)
    assert isinstance(task, WorkedTask)
    prompt, answer = task.worked_example(5)
    assert prompt == task.train_prompt(5)
    assert task.verify(answer, prompt).reward == 1


def test_no_held_out_drawing_is_trained_on_and_runs_of_all_seeds_share_them():
    task, other = (make_task("picture_sums", seed=seed) for seed in (0, 1))
    held_out = {p.identity for p in task.held_out(500)}
    assert len(held_out) == 500
    assert held_out == {p.identity for p in other.held_out(500)}
    assert held_out.isdisjoint(task.train_prompt(i).identity for i in range(2000))


def test_the_answer_is_the_sum_of_what_is_drawn():
    """Read by comparing cells with every digit drawn in the same ink."""
    task = make_task("picture_sums", seed=0)
    for index in range(50):
        prompt = task.train_prompt(index)
        pixels = np.asarray(decode_picture(prompt.pictures[0]))
        ink = pixels.reshape(-1, 3).min(0)
        drawn = [np.all(pixels[:, at : at + 16] == ink, axis=-1) for at in (0, 32)]
        digits = {d: draw_text(str(d), np.random.default_rng(0))[:, :, 0] < 255 for d in range(10)}
        a, b = (next(d for d, dots in digits.items() if np.array_equal(dots, cell)) for cell in drawn)
        assert str(a + b) == prompt.answer


@pytest.mark.parametrize("options", [{"digits": 0}, {"digits": 4}, {"digits": True}, {"jitter": -1}, {"jitter": 4}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(TaskError, match="must be a whole number"):
        make_task("picture_sums", seed=0, **options)


@pytest.mark.parametrize(
    ("text", "reward", "status"), [(" {} ", 1, "scored"), ("0{}", 0, "unparseable"), ("99", 0, "scored")]
)
def test_only_the_number_alone_is_rewarded(text, reward, status):
    prompt = make_task("picture_sums", seed=0).train_prompt(0)
    score = make_task("picture_sums", seed=0).verify(text.replace("{}", prompt.answer), prompt)
    assert (score.reward, score.status.value) == (reward, status)


def test_in_text_the_same_sums_are_asked_without_pictures():
    """The same draws of the generator, so that the two sides of a mixture are equally hard."""
    pictures, texts = (make_task("picture_sums", seed=3, shown=shown) for shown in ("picture", "text"))
    assert (pictures.name, texts.name) == ("picture_sums1", "text_sums1")
    for index in range(50):
        prompt, answer = texts.worked_example(index)
        assert prompt.pictures == ()
        assert answer == prompt.answer == pictures.train_prompt(index).answer
        assert sum(map(int, prompt.text.removesuffix("=").split("+"))) == int(answer)
    held_out = texts.held_out(256)
    assert len({p.text for p in held_out}) == len(held_out) <= 100
    assert [p.id for p in held_out] == list(range(len(held_out)))
    with pytest.raises(TaskError, match="shown must be picture or text; got 'sound'"):
        make_task("picture_sums", seed=0, shown="sound")
