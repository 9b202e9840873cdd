"""Read, check and decode pictures: the one door through which files and bytes become pictures.

Every picture is decoded once when its row is read, so that a broken file is reported by its place and not by a
traceback in the middle of a run. What a model sees is upright, RGB, and on white where it was transparent.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapo.data.pictures import Picture
from sapo.errors import PictureError
from sapo.utils.hashing import content_hash
from sapo.utils.text import first_line

# For the annotations only: Pillow is loaded when a picture is opened.
if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded. Pillow knows more, of which some start other programs."""

MAX_ASPECT = 200
"""Longest side over shortest: above it, models' own preprocessing refuses."""

SMALLEST_SIDE = 4
"""Pixels below which a picture is more likely a mistake."""


@dataclass(frozen=True)
class PictureRules:
    """Which pictures are taken, and from where.

    >>> PictureRules().max_pixels
    40000000
    """

    directory: Path | None = None
    """Where relative paths begin, and what they may not leave; None for the present directory."""
    allow_paths: bool = False
    """Take absolute paths, and those that leave the directory."""
    max_pixels: int | None = 40_000_000
    """Largest width times height, checked before anything is decoded; None where it was checked before."""
    frame: int | None = None
    """Which frame of an animation to take; None refuses animations."""
    leave_out: str = "remove the row"
    """How to go on without a picture that cannot be used, for messages."""
    take_frame: str = "set frame=0 to take the first"
    """How to go on with one frame of an animation, for messages."""


def open_picture(
    source: bytes | str | Path,
    where: str,
    rules: PictureRules = PictureRules(),
    warn: Callable[[str], None] = lambda _: None,
) -> Picture:
    """Return the picture of encoded bytes or of a file, after decoding it once.

    Args:
        where: place of the picture for messages: file, row and column.
        warn: called with a line about a picture that is taken and looks like a mistake.

    Raises:
        PictureError: it cannot be decoded, is too large, or lies where it may not be taken from.
    """
    path = None if isinstance(source, bytes) else _allowed_path(source, where, rules)
    data = source if isinstance(source, bytes) else _bytes_of(path, where, rules)
    where = where if path is None else f"{where}: {path}"
    with _opened(data, where, rules) as image:
        chosen = _frame(image, where, rules)
        size = _decode(image, where, rules).size
    if max(size) > MAX_ASPECT * min(size):
        raise PictureError(
            f"{where}: the longer side of a picture must be at most {MAX_ASPECT} times the shorter; got {size[0]} x "
            f"{size[1]} pixels; crop it or {rules.leave_out}"
        )
    if min(size) < SMALLEST_SIDE:
        warn(f"{where}: a picture of {size[0]} x {size[1]} pixels is enlarged to what the model takes at least")
    if chosen is not None:  # the frame is a picture of its own
        return Picture(content_hash(chosen), size, data=chosen)
    if path is None:
        return Picture(content_hash(data), size, data=data)
    return Picture(content_hash(data), size, path=str(path))


def decode_picture(picture: Picture) -> Image.Image:
    """Return a picture that `open_picture` made, decoded: upright, RGB, transparent parts white.

    Raises:
        PictureError: its file is missing, or holds another picture by now.
    """
    where, rules = picture.path or f"picture {picture.sha256[:16]}", PictureRules(max_pixels=None)
    with _opened(picture.read(), where, rules) as image:
        return _decode(image, where, rules)


def picture_of(image: Any) -> Picture:
    """Return the picture of a decoded image, encoded as PNG.

    Args:
        image: a Pillow image, or an array of bytes, (height, width, 3) or (height, width).
    """
    from PIL import Image

    drawn = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    data = buffer.getvalue()
    return Picture(content_hash(data), drawn.size, data=data)


def _allowed_path(source: str | Path, where: str, rules: PictureRules) -> Path:
    text = str(source)
    if "://" in text or text.startswith("data:"):
        raise PictureError(
            f"{where}: a picture must be a file; got the address {text[:60]!r}; download it first, since nothing is "
            "fetched"
        )
    directory = (rules.directory or Path()).resolve()
    path = (directory / text).resolve()
    outside = Path(text).is_absolute() or not path.is_relative_to(directory)
    if outside and not rules.allow_paths:
        raise PictureError(
            f"{where}: a picture's file must lie below {directory}; got {text!r}; move it there, or set "
            "allow_paths=true for files that you trust"
        )
    return path


def _bytes_of(path: Path | None, where: str, rules: PictureRules) -> bytes:
    assert path is not None
    try:
        return path.read_bytes()
    except OSError as error:
        raise PictureError(
            f"{where}: there is no picture at {path}: {error.strerror}; add the file or {rules.leave_out}"
        ) from error


def _opened(data: bytes, where: str, rules: PictureRules) -> Image.Image:
    """Read the header, which has the size; decode nothing."""
    from PIL import Image

    try:
        with warnings.catch_warnings():  # the limit is ours
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{where}: {_too_large(rules.max_pixels)}; got more: {first_line(error)}") from error
    except Exception as error:  # Pillow's decoders raise whatever they like of broken files
        raise PictureError(
            f"{where}: a picture must be one of {', '.join(FORMATS)}; got {len(data)} bytes that are none of them; "
            f"replace the file or {rules.leave_out}"
        ) from error
    if rules.max_pixels is not None and image.width * image.height > rules.max_pixels:
        raise PictureError(
            f"{where}: {_too_large(rules.max_pixels)}; got {image.width} x {image.height}; scale it down"
        )
    return image


def _too_large(max_pixels: int | None) -> str:
    return "a picture is too large to decode" if max_pixels is None else f"a picture has at most {max_pixels:,} pixels"


def _frame(image: Image.Image, where: str, rules: PictureRules) -> bytes | None:
    """Go to the frame of an animation; return it encoded by itself, None of what is no animation."""
    frame, frames = rules.frame, getattr(image, "n_frames", 1)
    if frames == 1:
        return None
    if frame is None or not 0 <= frame < frames:
        asked = "an animation" if frame is None else f"frame {frame} of an animation"
        raise PictureError(
            f"{where}: a picture must be one picture; got {asked} of {frames} frames; {rules.take_frame}"
        )
    image.seek(frame)
    buffer = io.BytesIO()
    _decode(image, where, rules).save(buffer, "PNG")
    return buffer.getvalue()


def _decode(image: Image.Image, where: str, rules: PictureRules) -> Image.Image:
    """Decode all of a picture to upright RGB."""
    from PIL import Image, ImageOps

    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # as above
        raise PictureError(
            f"{where}: the picture is cut short or broken: {first_line(error)}; replace the file or {rules.leave_out}"
        ) from error
    if upright.mode in ("I", "F"):
        raise PictureError(
            f"{where}: a picture must have 8 bits a colour, or 16 of grey; got mode {upright.mode} (32 bits); convert "
            "it"
        )
    if upright.mode.startswith("I;16"):
        return _from_16_bits(upright)
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return upright.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    grey = np.asarray(image).astype(np.float64) * (255 / 65535)
    return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
