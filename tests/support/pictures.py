"""Pictures of the tests, drawn from a seed, and prompts that show them without a model."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from sapo.data import Picture, PictureTokens, Prompt
from sapo.data.picture_files import open_picture

IMAGE = 90
"""The token id of every part of every picture."""


def noise(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(seed: int, width: int = 16, height: int = 16) -> Picture:
    return open_picture(encoded(noise(seed, width, height)), f"picture {seed}")


def pictured(ids: tuple[int | Picture, ...], tokens: int = 4, grid: bool = False, **more) -> Prompt:
    """A prompt of token ids and pictures, each of so many tokens; with `grid`, three positions a token."""
    token_ids: list[int] = []
    places, pictures, positions = [], [], []
    at = 0
    for part in ids:
        if isinstance(part, Picture):
            pictures.append(part)
            places.append(tuple(range(len(token_ids), len(token_ids) + tokens)))
            positions += [(at, at, at + i) for i in range(tokens)]
            token_ids += [IMAGE] * tokens
            at += tokens
        else:
            token_ids.append(part)
            positions.append((at, at, at))
            at += 1
    axes = tuple(zip(*positions, strict=True)) if grid else None
    found = PictureTokens(tuple(places), axes) if pictures else None
    return Prompt(0, "t", "", tuple(token_ids), pictures=tuple(pictures), picture_tokens=found, **more)
