"""Pictures on their way to vLLM: pixels of our own making, and which tokens of the prompt they stand for.

vLLM would make both itself, by transformers' Processor classes: those need a tokenizer and torchvision, scale
otherwise, and look for pictures by token id. So it is given what the trainer computes with, at the place where its own
processing ends: expanded token ids, the pixels of each picture with its hash, and its places. What vLLM asks of a
processor when it starts (how many tokens a picture may have) is answered here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sapo.data import Picture, Prompt
from sapo.model.vision import Vision
from sapo.rollout.engine import Weights

IMAGE = "image"
"""vLLM's name for pictures among its kinds of input."""

_TOWER, _INNER_TOWER = "model.vision_tower.", "model.vision_tower.vision_model."
_TRANSPOSED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


class Pictures:
    """The pictures of a policy's prompts, as vLLM takes them.

    Args:
        vision: makes the pixels, and keeps those of the last pictures.
        dtype: of the model, which its pixels have too.
    """

    def __init__(self, vision: Vision, dtype: torch.dtype) -> None:
        self._vision = vision
        self._dtype = dtype

    def engine_options(self) -> dict[str, Any]:
        """Return what vLLM is started with: no cache of its own for pixels, and no picture tried at the start."""
        return {"mm_processor_cache_gb": 0.0, "skip_mm_profiling": True}

    def adapt(self, config: Any) -> None:
        """Give a config what vLLM reads of the decoder's part of it, and transformers leaves out."""
        text = config.get_text_config()
        text.tie_word_embeddings = config.tie_word_embeddings
        if config.model_type == "qwen3_vl_moe":
            text.norm_topk_prob = getattr(text, "norm_topk_prob", True)  # these always do

    def as_saved(self, weights: Weights) -> Weights:
        """Yield weights as a checkpoint of the family has them, which vLLM's class of the model reads."""
        family = self._vision.family.config.model_type
        for name, tensor in weights:
            if family == "llava" and name.startswith(_TOWER) and not name.startswith(_INNER_TOWER):
                yield _INNER_TOWER + name.removeprefix(_TOWER), tensor
            elif family == "qwen3_vl_moe" and name.endswith(_TRANSPOSED):
                yield name, tensor.transpose(1, 2)
            else:
                yield name, tensor

    def prompt(self, prompt: Prompt) -> dict[str, Any]:
        """Return an encoded prompt that shows pictures, as vLLM's own processing would leave it."""
        from vllm.inputs import mm_input
        from vllm.multimodal.inputs import MultiModalKwargsItems

        assert prompt.picture_tokens is not None, "an encoded prompt with pictures says where they are"
        items = [self._item(picture) for picture in prompt.pictures]
        found: dict[str, Any] = mm_input(
            list(prompt.token_ids),
            MultiModalKwargsItems({IMAGE: items}),
            {IMAGE: [picture.sha256 for picture in prompt.pictures]},
            {IMAGE: [_range(places) for places in prompt.picture_tokens.places]},
        )
        return found

    def _item(self, picture: Picture) -> Any:
        from vllm.multimodal.inputs import MultiModalKwargsItem

        pixels = {
            name: tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self._vision.pixels(picture).items()
        }
        return MultiModalKwargsItem(FIELDS[self._vision.family.config.model_type](pixels, self._vision))


def _range(places: tuple[int, ...]) -> Any:
    """Return where a picture is; marks between its tokens, as those of tiles, are left out by a mask."""
    from vllm.multimodal.inputs import PlaceholderRange

    first, length = places[0], places[-1] - places[0] + 1
    if length == len(places):
        return PlaceholderRange(offset=first, length=length)
    shown = torch.zeros(length, dtype=torch.bool)
    shown[torch.tensor(places) - first] = True
    return PlaceholderRange(offset=first, length=length, is_embed=shown)


def _rows(name: str, tensor: Tensor) -> Any:
    """Return a field of which a picture has several rows, as patches or tiles."""
    from vllm.multimodal.inputs import MultiModalFieldConfig

    return MultiModalFieldConfig.flat_from_sizes(IMAGE, torch.tensor([len(tensor)])).build_elems(name, tensor)[0]


def _one(name: str, tensor: Tensor, *, on_cpu: bool = False) -> Any:
    """Return a field of which a picture has one row."""
    from vllm.multimodal.inputs import MultiModalFieldConfig

    return MultiModalFieldConfig.batched(IMAGE, keep_on_cpu=on_cpu).build_elems(name, tensor)[0]


def _qwen(pixels: Mapping[str, Tensor], vision: Vision) -> dict[str, Any]:
    grid = pixels["image_grid_thw"]
    return {
        "pixel_values": _rows("pixel_values", pixels["pixel_values"]),
        "image_grid_thw": _one("image_grid_thw", grid, on_cpu=True),
    }


def _idefics(pixels: Mapping[str, Tensor], vision: Vision) -> dict[str, Any]:
    tiles = {name: pixels[name][0] for name in ("pixel_values", "pixel_attention_mask")}
    fields = {name: _rows(name, tensor) for name, tensor in tiles.items()}
    return fields | {"num_patches": _one("num_patches", torch.tensor([len(tiles["pixel_values"])]), on_cpu=True)}


def _internvl(pixels: Mapping[str, Tensor], vision: Vision) -> dict[str, Any]:
    tiles = pixels["pixel_values"]
    return {
        "pixel_values": _rows("pixel_values", tiles),
        "image_num_patches": _one("image_num_patches", torch.tensor([len(tiles)]), on_cpu=True),
        "image_token_id": _one("image_token_id", torch.tensor([vision.family.image_token_id]), on_cpu=True),
    }


def _llava(pixels: Mapping[str, Tensor], vision: Vision) -> dict[str, Any]:
    return {"pixel_values": _one("pixel_values", pixels["pixel_values"])}


FIELDS: dict[str, Callable[[Mapping[str, Tensor], Vision], dict[str, Any]]] = {
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_vl_moe": _qwen,
    "idefics3": _idefics,
    "smolvlm": _idefics,
    "internvl": _internvl,
    "llava": _llava,
}
"""`model_type` of a config -> the inputs of vLLM's class for it, made of the pixels that the trainer's tower takes."""


def _sizes(model_config: Any) -> Any:
    """Return what vLLM asks of a model's processor when it starts."""
    from vllm.multimodal.processing import BaseProcessingInfo, InputProcessingContext

    class Sizes(BaseProcessingInfo):
        def get_supported_mm_limits(self) -> Mapping[str, int | None]:
            return {IMAGE: None}

        def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
            # As many as a sequence has, so that none is refused for its size.
            return {IMAGE: seq_len}

    return Sizes(InputProcessingContext(model_config, None))


@contextmanager
def own_processing(architecture: str) -> Iterator[None]:
    """Start vLLM without its own processing of pictures.

    Args:
        architecture: name of the model's class, as vLLM has it too.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY as REGISTRY

    _import_without_torchvision(architecture)
    vars(REGISTRY).update(
        create_processor=lambda model_config, **_: types.SimpleNamespace(info=_sizes(model_config)),
        get_processing_info=_sizes,
    )
    try:
        yield
    finally:
        del REGISTRY.create_processor, REGISTRY.get_processing_info


_TORCHVISION = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


def _import_without_torchvision(architecture: str) -> None:
    """Import vLLM's class of a model where torchvision is missing, as beside the CPU build of torch.

    The modules of these classes import torchvision for their own processing alone. Names that hold nothing stand for it
    while they are imported.
    """
    from vllm import ModelRegistry

    known = ModelRegistry.models.get(architecture)
    if known is None or not hasattr(known, "module_name") or importlib.util.find_spec("torchvision") is not None:
        return
    for name in _TORCHVISION:
        sys.modules[name] = module = types.ModuleType(name)
        module.__path__ = []
        above, _, last = name.rpartition(".")
        if above:
            setattr(sys.modules[above], last, module)
    try:
        found = getattr(importlib.import_module(known.module_name), known.class_name)
    finally:
        for name in _TORCHVISION:
            del sys.modules[name]
    ModelRegistry.register_model(architecture, found)
