"""Tiny vision-language models with a character tokenizer and an image processor: what a cold start with pictures makes.

As in tiny.py they are real architectures of transformers in ordinary directories.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLMoeConfig

from sapo.model.tiny import TinyShape, character_tokenizer
from sapo.model.vision_families import QwenVL

VISION_ARCHITECTURES = ("qwen3_vl", "qwen3_vl_moe")

IMAGE, VIDEO, OPENING, CLOSING = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
_MARKS = {"image": IMAGE, "video": VIDEO, "vision_start": OPENING, "vision_end": CLOSING}

PATCH = 8
"""Side of a patch in pixels."""


def picture_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """Make the tokenizer of tiny.py with the special tokens of pictures behind its own.

    >>> tokenizer = picture_tokenizer("0123456789+=")
    >>> tokenizer("<|vision_start|><|image_pad|><|vision_end|>=")["input_ids"]
    [16, 14, 17, 11]
    """
    tokenizer = character_tokenizer(alphabet)
    special = [AddedToken(t, special=True, normalized=False) for t in (IMAGE, VIDEO, OPENING, CLOSING)]
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def tiny_vision_model(
    architecture: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    **shape: int,
) -> tuple[Any, QwenVL]:
    """Build a randomly initialised vision-language model, and the family that holds its image processor.

    Args:
        architecture: one of VISION_ARCHITECTURES.
        shape: fields of `TinyShape`; the tower's MLPs are as wide as the decoder's.
    """
    if architecture not in VISION_ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(VISION_ARCHITECTURES)}")
    made = TinyShape(**shape)
    text = made.settings(len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    text |= {"tie_word_embeddings": False, "rope_parameters": _rope(text["head_dim"])}
    kind: Any = Qwen3VLConfig
    if architecture == "qwen3_vl_moe":
        kind = Qwen3VLMoeConfig
        text |= {**made.mixture(), "decoder_sparse_step": 1, "mlp_only_layers": []}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in _MARKS.items()}
    tower = _tower(made.hidden_size, made.intermediate_size)
    config = kind(text_config=text, vision_config=tower, tie_word_embeddings=False, **ids)
    # Forked, so that a caller's own random stream is not moved.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, QwenVL(model.config, tiny_image_processor(PATCH), tokenizer)


def _rope(head_size: int) -> dict[str, Any]:
    """Give a third of a head's rotary pairs each to height and width, and the rest to time."""
    side = head_size // 6
    section = [head_size // 2 - 2 * side, side, side]
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": section, "mrope_interleaved": True}


def _tower(hidden_size: int, intermediate_size: int) -> dict[str, Any]:
    """Describe a tower as wide as the decoder; 2 x 2 patches become one token, its first block is a deepstack level."""
    return {
        "depth": 2,
        "hidden_size": hidden_size,
        "num_heads": 2,
        "intermediate_size": intermediate_size,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 16 * 16,
        "deepstack_visual_indexes": [0],
    }


def tiny_image_processor(patch_size: int) -> Any:
    """Make the image processor of a tiny model: one token at least, pixels of mean 0.5 and deviation 0.5."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    cell = (2 * patch_size) ** 2
    half = [0.5, 0.5, 0.5]
    return Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        merge_size=2,
        temporal_patch_size=1,
        size={"shortest_edge": cell, "longest_edge": 1024 * cell},
        image_mean=half,
        image_std=half,
    )
