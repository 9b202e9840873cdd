"""Rows that show pictures: the formats of others, rows with and without, and every picture that cannot be used."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from PIL import Image

from sapo.data.picture_files import decode_picture
from sapo.errors import TaskError
from sapo.tasks import FileTask, make_task
from sapo.tasks.rows.columns import Columns
from sapo.utils.hashing import content_hash
from support.pictures import encoded, noise

PICTURES = [encoded(noise(i, 24, 16)) for i in range(4)]
HASHES = [content_hash(data) for data in PICTURES]
URI = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in PICTURES]
STORED = [{"bytes": data, "path": None} for data in PICTURES]
TEXT = {"type": "text", "text": "Which?"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "data" / "images").mkdir(parents=True)
    for i, data in enumerate(PICTURES):
        (tmp_path / "data" / "images" / f"{i}.png").write_bytes(data)
    (tmp_path / "outside.png").write_bytes(PICTURES[0])
    return tmp_path / "data"


def prompt_of(row, directory=None, **columns):
    return Columns(**columns).prompt_of("rows.jsonl:1", row, "task", directory)


def user(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("row", "columns", "text", "hashes"),
    [
        # TRL: messages with image parts, and the column images with what Parquet stores.
        (
            {"prompt": user([{"type": "image"}, TEXT]), "images": STORED[:1], "answer": "a"},
            {},
            "user: <image>Which?",
            HASHES[:1],
        ),
        (
            {
                "prompt": user([TEXT, {"type": "image"}, {"type": "image", "text": None}]),
                "images": STORED[:2],
                "answer": "a",
            },
            {},
            "user: Which?<image><image>",
            HASHES[:2],
        ),
        # ms-swift: markers in messages, paths.
        (
            {"messages": user("<image>Which?"), "images": ["images/2.png"], "solution": "a"},
            {"prompt": ("messages",), "answer": ("solution",)},
            "user: <image>Which?",
            [HASHES[2]],
        ),
        # verl and EasyR1: a problem with markers, bytes or paths in dictionaries.
        (
            {
                "problem": "<image> or <image>?",
                "images": [STORED[1], {"bytes": None, "path": "images/3.png"}],
                "answer": "a",
            },
            {"prompt": ("problem",)},
            "<image> or <image>?",
            [HASHES[1], HASHES[3]],
        ),
        # R1-V: one picture, the answer in tags.
        (
            {"image": "images/1.png", "problem": "Which?", "solution": "<answer> a </answer>"},
            {"prompt": ("problem",), "answer": ("solution",)},
            "Which?",
            [HASHES[1]],
        ),
        # OpenAI, chat completions and responses.
        (
            {"prompt": user([TEXT, {"type": "image_url", "image_url": {"url": URI[3]}}]), "answer": "a"},
            {},
            "user: Which?<image>",
            [HASHES[3]],
        ),
        (
            {
                "prompt": user(
                    [{"type": "input_text", "text": "Which?"}, {"type": "input_image", "image_url": URI[0]}]
                ),
                "answer": "a",
            },
            {},
            "user: Which?<image>",
            HASHES[:1],
        ),
        # transformers' parts with their own pictures.
        (
            {
                "prompt": user(
                    [
                        {"type": "image", "path": "images/0.png"},
                        {"type": "image", "base64": URI[1].partition(",")[2]},
                        {"type": "image", "image": "images/2.png"},
                    ]
                ),
                "answer": "a",
            },
            {},
            "user: <image><image><image>",
            HASHES[:3],
        ),
        ({"prompt": "Which?", "image": URI[2], "answer": "a"}, {}, "Which?", [HASHES[2]]),
        ({"prompt": "Which?", "image": None, "answer": "a"}, {}, "Which?", []),
        ({"prompt": "Which?", "images": [], "answer": "a"}, {}, "Which?", []),
        ({"prompt": "An <image> of text", "answer": "a"}, {}, "An <image> of text", []),
    ],
)
def test_the_formats_of_others_are_read(directory, row, columns, text, hashes):
    prompt = prompt_of(row, directory, **columns)
    assert (prompt.text, prompt.answer) == (text, "a")
    assert [p.sha256 for p in prompt.pictures] == hashes
    assert not {"image", "images"} & prompt.metadata.keys()


def test_a_decoded_picture_is_shown_as_it_is(directory):
    (shown,) = prompt_of({"prompt": "Which?", "image": noise(5), "answer": "a"}).pictures
    assert decode_picture(shown).tobytes() == noise(5).tobytes()


def write(directory: Path, rows) -> Path:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_with_and_without_pictures_are_one_task(directory, monkeypatch):
    rows = [{"prompt": f"{i}?", "answer": i, "image": f"images/{i % 4}.png" if i % 2 else None} for i in range(40)]
    rows += [{"prompt": f"text {i}?", "answer": i} for i in range(10)]
    path = write(directory, rows)
    monkeypatch.chdir(directory.parent)  # paths begin at the file, not here
    task = FileTask(path, held_out_fraction=0.3)
    asked = [task.train_prompt(i) for i in range(task.num_train)] + task.held_out(99)
    assert sorted(len(p.pictures) for p in asked) == [0] * 30 + [1] * 20
    assert all(
        p.pictures[0].path == str(directory / "images" / f"{int(p.answer) % 4}.png") for p in asked if p.pictures
    )


def test_another_marker_is_read_and_markers_may_be_text(directory):
    row = {"question": "Is <img> in <img>?", "images": ["images/0.png", "images/1.png"], "answer": "a"}
    options = {"prompt_field": "question", "held_out_fraction": 1}
    path = write(directory, [row])

    def text(**more):
        return make_task("dataset", seed=0, path=path, **options, **more).held_out(1)[0].text

    assert text(picture_marker="<img>") == "Is <image> in <image>?"
    assert text(picture_marker=None) == text() == row["question"]
    write(directory, [{**row, "question": "<image1> and <image>"}])
    for marker in (None, "<img>"):
        with pytest.raises(TaskError, match=r"rows\.jsonl:1: field 'question' must not hold <image> as text"):
            text(picture_marker=marker)


def test_markers_of_rows_without_a_picture_are_noticed(directory):
    """Such a row is trained on without what it asks about."""
    rows = [{"prompt": "what <image>", "answer": "a"}, {"prompt": "one", "answer": "b"}]
    path = write(directory, rows)
    (line,) = make_task("dataset", seed=0, path=path, held_out_fraction=1).notices
    assert "1 rows have the marker of a picture and no picture" in line
    assert "rows.jsonl:1; name their column in image_field" in line
    assert make_task("dataset", seed=0, path=path, held_out_fraction=1, picture_marker=None).notices == ()


BAD = {
    "empty": b"",
    "text": b"no picture",
    "cut": PICTURES[0][: len(PICTURES[0]) // 2],
    "long": encoded(Image.new("1", (1000, 3))),
    "large": encoded(Image.new("1", (8000, 8000))),
    "moving": encoded(noise(0), "GIF", save_all=True, append_images=[noise(1)]),
    "deep": encoded(Image.new("I", (9, 9)), "TIFF"),
}


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ("empty.png", "got 0 bytes that are none of them"),
        ("text.png", "must be one of PNG, JPEG"),
        ("cut.png", "cut short or broken"),
        ("long.png", "at most 200 times the shorter; got 1000 x 3 pixels"),
        ("large.png", "at most 40,000,000 pixels; got 8000 x 8000"),
        ("moving.png", "got an animation of 2 frames; set frame=0"),
        ("deep.png", "got mode I"),
        ("missing.png", "there is no picture at"),
        ("../outside.png", "must lie below .*allow_paths=true"),
        ("/etc/passwd", "must lie below .*got '/etc/passwd'"),
        ("https://example.org/a.png", "got the address 'https://example.org/a.png'"),
        ("data:image/png,abc", "with base64 behind the comma"),
        ("data:image/png;base64,a!b", "with base64 behind the comma"),
        ("x" * 5000, "a path, a data: URI, encoded bytes or {bytes, path}; got 'xxx"),
        (3, "a path, a data: URI, encoded bytes or {bytes, path}; got 3"),
        ({"width": 3}, r"got {'width': 3}"),
    ],
)
def test_a_bad_picture_is_refused_by_row_and_column_or_skipped_and_counted(directory, shown, message):
    for name, data in BAD.items():
        (directory / f"{name}.png").write_bytes(data)
    good = {"prompt": "good?", "answer": 1, "image": "images/0.png"}
    path = write(directory, [good, {"prompt": "bad?", "answer": 2, "image": shown}])
    with pytest.raises(TaskError, match=rf"rows\.jsonl:2: field 'image': .*{message}") as caught:
        FileTask(path, held_out_fraction=1)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    task = FileTask(path, held_out_fraction=1, on_bad_row="skip")
    assert [p.text for p in task.held_out(9)] == ["good?"]
    (notice,) = task.notices
    assert notice.startswith(f"rows: 1 bad rows were skipped; the first: {path}:2: field 'image': ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "<image><image>?", "image": "images/0.png"}, "got 2 markers and 1 pictures"),
        ({"prompt": "<image>?", "images": ["images/0.png", "images/1.png"]}, "got 1 markers and 2 pictures"),
        ({"prompt": "<image>?", "image": None}, "got 1 markers and 0 pictures"),
        ({"prompt": user("<image><image>?"), "image": "images/0.png"}, "got 2 markers and 1 pictures"),
        ({"prompt": user([{"type": "image"}, TEXT])}, "got 0 pictures and 1 parts that hold none"),
        (
            {"prompt": user([{"type": "image"}, TEXT]), "images": STORED[:0]},
            "got 0 pictures and 1 parts that hold none",
        ),
        ({"prompt": user([{"type": "image"}]), "images": ["images/0.png"] * 2}, "got 2 pictures and 1 parts"),
        ({"prompt": user([{"type": "image", "url": URI[0]}]), "image": "images/0.png"}, "got 1 pictures and 0 parts"),
        (
            {"prompt": user([{"type": "image", "url": URI[0]}, {"type": "text", "text": "<image>"}])},
            "got 2 markers and 1 pictures",
        ),
        ({"prompt": user([{"type": "video"}])}, "must have a role and a content"),
        ({"prompt": "?", "photo_image": "a.png"}, "got some in photo_image; set image_field=photo_image"),
    ],
)
def test_another_number_of_markers_than_pictures_is_refused_with_both(directory, row, message):
    path = write(directory, [{"answer": 1, **row}])
    with pytest.raises(TaskError, match=rf"rows\.jsonl:1: .*{message}"):
        FileTask(path, held_out_fraction=1)


def test_paths_outside_are_taken_where_they_are_allowed_and_a_frame_where_it_is_named(directory):
    (directory / "moving.gif").write_bytes(BAD["moving"])
    rows = [
        {"prompt": "a", "answer": 1, "image": "../outside.png"},
        {"prompt": "b", "answer": 1, "image": "moving.gif"},
    ]
    path = write(directory, rows)
    task = FileTask(path, held_out_fraction=1, allow_paths=True, frame=0)
    shown = {p.text: p.pictures[0] for p in task.held_out(2)}
    assert shown["a"].sha256 == HASHES[0]
    assert decode_picture(shown["b"]).size == (16, 16)


def test_a_tiny_picture_is_taken_and_said(directory):
    (directory / "dot.png").write_bytes(encoded(noise(0, 1, 1)))
    task = FileTask(write(directory, [{"prompt": "a", "answer": 1, "image": "dot.png"}]), held_out_fraction=1)
    assert len(task.held_out(1)[0].pictures) == 1
    (notice,) = task.notices
    assert "1 pictures look like mistakes" in notice
    assert "1 x 1 pixels" in notice


def test_a_task_of_nothing_but_bad_rows_is_refused_though_they_may_be_skipped(directory):
    path = write(directory, [{"prompt": "a", "answer": 1, "image": "no.png"}])
    with pytest.raises(TaskError, match=r"rows\.jsonl:1: field 'image': .*there is no picture"):
        FileTask(path, held_out_fraction=1, on_bad_row="skip")
