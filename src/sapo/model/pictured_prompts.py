"""Prompts that show pictures, and prompts of text for models that could, to token ids.

A question's markers become what the model's tokenizer or chat template has for a picture; each of these becomes as many
tokens as the picture has. One place does it, once, and counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sapo.data import Picture, PictureTokens
from sapo.data.pictures import PICTURE_MARKER
from sapo.errors import ModelError, TaskError
from sapo.model.policy import Policy
from sapo.model.vision import Vision, refuse_reserved

Encoded = tuple[tuple[int, ...], PictureTokens | None]
Messages = Sequence[Mapping[str, Any]]


def encode_plain(policy: Policy, text: str, pictures: Sequence[Picture], task: str) -> Encoded:
    """Encode a plain prompt whose markers stand for pictures.

    Raises:
        TaskError: it has another number of markers than pictures.
        ModelError: the model is of text alone, or the text has a token that stands for pictures.
    """
    if policy.vision is None:
        _refuse_pictures(policy, pictures, task)
        return policy.encode(text), None
    parts = _parts([text], pictures, task)[0]
    for part in parts:
        refuse_reserved(policy.vision.family, part, task)
    return _expanded(policy.vision, policy.encode(policy.vision.family.placeholder.join(parts)), pictures)


def encode_chat(
    policy: Policy,
    messages: Messages,
    pictures: Sequence[Picture],
    task: str,
    thinking: bool | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Encoded:
    """Encode a chat whose messages' markers stand for pictures.

    Args:
        tools: functions that the chat template offers to the model.

    Raises:
        TaskError, ModelError: as `encode_plain`; or the chat template does not write one placeholder a picture.
    """
    if policy.vision is None:
        _refuse_pictures(policy, pictures, task)
        return policy.encode_messages(messages, thinking, tools), None
    vision = policy.vision
    split = _parts([m["content"] for m in messages], pictures, task)
    for parts in split:
        for part in parts:
            refuse_reserved(vision.family, part, task)
    ids: tuple[int, ...] = ()
    for form in (_as_lists, _as_texts):
        written = form(messages, split, vision)
        try:
            ids = policy.encode_messages(written, thinking, tools)
        except ModelError:
            if form is _as_texts:
                raise
            continue
        whole = all(_letters(p) in _letters(policy.show(ids)) for parts in split for p in parts)
        if whole and ids.count(vision.family.image_token_id) == len(pictures):
            break
    return _expanded(vision, ids, pictures)


def marked(text: str, pictures: Sequence[Picture]) -> str:
    """Return a question with markers for its pictures: its own, or else all before it."""
    return text if PICTURE_MARKER in text else PICTURE_MARKER * len(pictures) + text


def marked_messages(messages: Messages, pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """Return a chat with markers for its pictures: its own, or else all before the first of the user's messages."""
    found = [dict(m) for m in messages]
    if not any(PICTURE_MARKER in m["content"] for m in found):
        first = next((m for m in found if m["role"] == "user"), found[-1])
        first["content"] = PICTURE_MARKER * len(pictures) + first["content"]
    return found


def _parts(texts: Sequence[str], pictures: Sequence[Picture], task: str) -> list[list[str]]:
    """Split texts at their markers; a prompt without pictures has no markers, only text."""
    if not pictures:
        return [[text] for text in texts]
    parts = [text.split(PICTURE_MARKER) for text in texts]
    markers = sum(len(p) - 1 for p in parts)
    if markers != len(pictures):
        raise TaskError(
            f"a question must have as many markers {PICTURE_MARKER} as pictures, or none; got {markers} markers and "
            f"{len(pictures)} pictures in a prompt of task {task!r}; correct the row"
        )
    return parts


def _as_lists(messages: Messages, split: Sequence[Sequence[str]], vision: Vision) -> list[dict[str, Any]]:
    """Write contents as lists of parts, as the chat templates of most vision-language models take them."""
    written = []
    for message, parts in zip(messages, split, strict=True):
        content: list[dict[str, str]] = []
        for i, part in enumerate(parts):
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": part}] if part else []
        written.append({**message, "content": content or [{"type": "text", "text": ""}]})
    return written


def _as_texts(messages: Messages, split: Sequence[Sequence[str]], vision: Vision) -> list[dict[str, Any]]:
    """Write contents as text with placeholders, for templates that know no lists."""
    placeholder = vision.family.placeholder
    return [{**m, "content": placeholder.join(parts)} for m, parts in zip(messages, split, strict=True)]


def _letters(text: str) -> str:
    """Return a text without white space, which templates trim."""
    return "".join(text.split())


def _expanded(vision: Vision, token_ids: tuple[int, ...], pictures: Sequence[Picture]) -> Encoded:
    if not pictures:
        return token_ids, None
    return vision.expand(token_ids, pictures)


def _refuse_pictures(policy: Policy, pictures: Sequence[Picture], task: str) -> None:
    if pictures:
        raise ModelError(
            f"task {task!r} shows pictures, and {type(policy.model).__name__} takes text alone; give a vision-language "
            "model (model.path), or choose a task of text"
        )
