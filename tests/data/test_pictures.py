"""Pictures as they come: every way in which a file can be wrong or odd, and what is made of it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from sapo.data.arrays import ArrayReader, FlatArrays
from sapo.data.picture_files import PictureRules, decode_picture, open_picture, picture_of
from sapo.data.rollouts import Completion, Group
from sapo.data.serialisation import group_from_json, group_to_json
from sapo.errors import PictureError
from support.pictures import encoded, noise, picture, pictured

WHERE = "rows.jsonl:3, column 'image'"
ANYWHERE = PictureRules()


def refused(source, rules=ANYWHERE):
    with pytest.raises(PictureError) as caught:
        open_picture(source, WHERE, rules)
    message = str(caught.value)
    assert message.startswith(WHERE)
    assert "\n" not in message
    return message


def pixels(source):
    return np.asarray(decode_picture(open_picture(source, WHERE)))


@pytest.mark.parametrize("junk", [b"", b"once upon a time", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_picture_is_refused_with_its_place(junk, tmp_path):
    assert f"got {len(junk)} bytes that are none of them" in refused(junk)
    (tmp_path / "junk.png").write_bytes(junk)
    assert "junk.png: a picture must be one of PNG" in refused("junk.png", PictureRules(tmp_path))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_half_a_picture_is_refused_when_its_row_is_read(form):
    whole = encoded(noise(1, 64, 64), form)
    assert "cut short or broken" in refused(whole[: len(whole) // 2])


@pytest.mark.parametrize("side", [12_000, 20_000])
def test_a_picture_too_large_is_refused_from_its_header(side):
    """A file of some kilobytes that would be 432 MB, or 1.2 GB, of RGB; Pillow itself refuses the second only."""
    bomb = encoded(Image.new("1", (side, side)))
    assert len(bomb) < 100_000
    message = refused(bomb)
    assert "at most 40,000,000 pixels" in message
    assert f"{side} x {side}" in message or f"{side * side} pixels" in message
    assert open_picture(encoded(noise(0)), WHERE, PictureRules(max_pixels=256)).size == (16, 16)
    assert "at most 255 pixels; got 16 x 16" in refused(encoded(noise(0)), PictureRules(max_pixels=255))


def test_a_picture_is_turned_upright():
    image = noise(1, 24, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    data = encoded(image, "PNG", exif=exif)
    assert open_picture(data, WHERE).size == (12, 24)
    assert np.array_equal(pixels(data), np.rot90(np.asarray(image), k=-1))


def test_transparent_parts_are_white():
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    red.putpixel((0, 0), (255, 0, 0, 255))
    found = pixels(encoded(red))
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[1:].min() == 255
    grey = Image.new("LA", (8, 8), (0, 0))
    assert pixels(encoded(grey)).min() == 255
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert pixels(encoded(palette, transparency=1)).min() == 255


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped():
    half = Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16))
    assert set(pixels(encoded(half)).flatten().tolist()) == {127}  # 32767 / 257 = 127.5, just below


def test_32_bits_are_refused():
    deep = Image.fromarray(np.full((8, 8), 0.5, np.float32))
    assert "got mode F (32 bits)" in refused(encoded(deep, "TIFF"))


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "1"])
def test_other_colours_become_rgb(mode):
    image = noise(1).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(pixels(data), np.asarray(image.convert("RGB")))


def test_an_animation_is_refused_unless_a_frame_is_asked_for():
    frames = [noise(i).quantize(256) for i in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert "got an animation of 3 frames; set frame=0" in refused(data)
    assert "got frame 3 of an animation of 3 frames" in refused(data, PictureRules(frame=3))
    first, last = (open_picture(data, WHERE, PictureRules(frame=i)) for i in (0, 2))
    assert first != last
    assert np.array_equal(np.asarray(decode_picture(last)), np.asarray(frames[2].convert("RGB")))
    still = encoded(frames[0], "GIF")
    assert open_picture(still, WHERE, PictureRules(frame=0)).data == still


def test_a_strip_is_refused_and_a_dot_is_taken_with_a_warning():
    assert "at most 200 times the shorter; got 1000 x 3 pixels" in refused(encoded(noise(1, 1000, 3)))
    warnings = []
    dot = open_picture(encoded(noise(1, 1, 1)), WHERE, warn=warnings.append)
    assert dot.size == (1, 1)
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{WHERE}: a picture of 1 x 1 pixels")


def test_a_file_that_is_missing_or_elsewhere_is_refused(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    inside, outside = data / "a.png", tmp_path / "b.png"
    for place in (inside, outside):
        place.write_bytes(encoded(noise(1)))
    (data / "link.png").symlink_to(outside)
    rules = PictureRules(data)
    assert open_picture("a.png", WHERE, rules).path == str(inside)
    assert "No such file or directory; add the file" in refused("c.png", rules)
    for path in ("../b.png", str(outside), str(inside), "link.png"):
        assert f"must lie below {data}; got {path!r}" in refused(path, rules)
    for path in ("../b.png", str(outside)):
        assert open_picture(path, WHERE, PictureRules(data, allow_paths=True)).path == str(outside)
    for address in ("https://example.org/a.png", "file:///etc/passwd"):
        assert "nothing is fetched" in refused(address, PictureRules(data, allow_paths=True))


def test_a_format_that_starts_other_programs_is_not_opened():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    assert "must be one of PNG, JPEG" in refused(postscript)


def test_pictures_are_equal_by_content(tmp_path):
    data = encoded(noise(1))
    (tmp_path / "a.png").write_bytes(data)
    assert open_picture("a.png", WHERE, PictureRules(tmp_path)) == open_picture(data, WHERE) == picture_of(noise(1))
    assert picture(1) != picture(2)


def test_a_file_that_changed_or_went_is_named_when_it_is_read_again(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encoded(noise(1)))
    opened = open_picture("a.png", WHERE, PictureRules(tmp_path))
    file.write_bytes(encoded(noise(2)))
    with pytest.raises(PictureError, match=re.escape(f"the picture {file} has changed since its row was read")):
        decode_picture(opened)
    file.unlink()
    with pytest.raises(PictureError, match=f"the picture {file} cannot be read: No such file"):
        decode_picture(opened)


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_groups_with_pictures_survive_a_checkpoint_their_bytes_there_once(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(noise(5)))
    filed = open_picture("a.png", WHERE, PictureRules(tmp_path))
    shown = picture(1)
    completion = Completion((2, 0), (-0.1, -0.2), "stop", "2")
    prompts = [
        pictured((1, shown, 2, filed), grid=True),
        pictured((1, shown)),
        pictured((1, 2)),
        pictured((shown, picture(2)), grid=True),
    ]
    groups = [Group(p, (completion,), (0.0,)) for p in prompts]
    arrays = FlatArrays()
    values = [group_to_json(g, arrays) for g in groups]
    joined = arrays.joined()
    assert len(joined["pictures"]) == len(shown.data) + len(picture(2).data)
    assert "pictures" not in values[2]["prompt"]
    reader = ArrayReader(joined)
    read = [group_from_json(v, reader) for v in values]
    assert read == groups
    assert [p.data for p in read[0].prompt.pictures] == [shown.data, None]
    assert read[0].prompt.pictures[1].path == str(tmp_path / "a.png")
    assert [p.size for p in read[3].prompt.pictures] == [(16, 16)] * 2
