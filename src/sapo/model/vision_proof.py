"""The proof, when a vision-language model is loaded, that its packed forward equals its own with a picture.

A prompt of text, a picture and text, and two responses to it, as in loading.py: the text alone proves nothing of what a
model does with pictures.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sapo.data import PackedPictures, Picture, Segment
from sapo.data.picture_files import picture_of
from sapo.model.attention import TreeLayout
from sapo.model.vision import Vision, own_pixels

_BEFORE, _AFTER, _RESPONSES = 3, 2, (4, 3)
_WIDTH, _HEIGHT = 96, 64


@lru_cache
def probe_picture() -> Picture:
    """Draw the picture of the proof: noise, wider than high, so that rows and columns cannot be confused."""
    noise = torch.randint(256, (_HEIGHT, _WIDTH, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return picture_of(noise.numpy())


@torch.no_grad()
def own_logprobs_of_picture(vision: Vision) -> Tensor:
    """Compute log-probabilities of both sequences by the model's own forward, one after the other."""
    prompt, responses = _sequences(vision)
    logits = []
    for response in responses:
        ids = torch.tensor([[*prompt, *response]], device=vision.model.device)
        inputs = {**own_pixels(vision, probe_picture()), **vision.family.own_inputs(ids)}
        logits.append(vision.model(input_ids=ids, use_cache=False, **inputs).logits[0])
    if hasattr(vision.core, "rope_deltas"):
        vision.core.rope_deltas = None  # of this prompt
    return torch.log_softmax(torch.cat(logits).float(), dim=-1)


@torch.no_grad()
def packed_logprobs_of_picture(policy: Any) -> Tensor:
    """Compute the same from one packed forward pass."""
    vision, device = policy.vision, policy.device
    unexpanded, responses = _prompt(vision), _sequences(vision)[1]
    prompt, tokens = vision.expand(unexpanded, [probe_picture()])
    after = len(prompt) if tokens.next_position is None else tokens.next_position
    axes = [list(axis) for axis in tokens.positions or (range(len(prompt)),)]
    ids, segments, paths = list(prompt), [Segment(0, len(prompt), -1)], []
    for response in responses:
        segments.append(Segment(len(ids), len(response), 0))
        paths.append([*range(len(prompt)), *range(len(ids), len(ids) + len(response))])
        ids += response
        axes = [[*axis, *range(after, after + len(response))] for axis in axes]
    positions = torch.tensor(axes if tokens.positions else axes[0], device=device)
    places = torch.tensor(tokens.places[0], device=device)
    pictures = PackedPictures((probe_picture(),), (len(places),), places)
    layout = TreeLayout(segments, device)
    ids_N = torch.tensor(ids, device=device)
    logits = policy.run(lambda: policy.logits(policy.hidden(ids_N, positions, layout, pictures)))
    return torch.log_softmax(torch.cat([logits[path] for path in paths]).float(), dim=-1)


def _prompt(vision: Vision) -> list[int]:
    words = _words(vision)
    return [*words[:_BEFORE], vision.family.image_token_id, *words[_BEFORE : _BEFORE + _AFTER]]


def _sequences(vision: Vision) -> tuple[list[int], list[list[int]]]:
    """Return the expanded prompt and the responses."""
    words = _words(vision)[_BEFORE + _AFTER :]
    prompt, _ = vision.expand(_prompt(vision), [probe_picture()])
    return list(prompt), [words[: _RESPONSES[0]], words[_RESPONSES[0] :]]


def _words(vision: Vision) -> list[int]:
    """Draw token ids that mean nothing to the model beside themselves: none of the tokenizer's special ones."""
    special = {vision.family.image_token_id, *vision.family.tokenizer.all_special_ids}
    added = getattr(vision.family.tokenizer, "added_tokens_decoder", {})
    plain = [i for i in range(len(vision.family.tokenizer)) if i not in special and i not in added]
    drawn = torch.randint(len(plain), (_BEFORE + _AFTER + sum(_RESPONSES),), generator=torch.Generator().manual_seed(1))
    return [plain[i] for i in drawn.tolist()]
