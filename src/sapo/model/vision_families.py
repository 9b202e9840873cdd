"""What each family of vision-language models does with a picture: its tokens, its pixels, its features, its positions.

Only the image processor and the tokenizer of transformers are used, never its Processor classes: those need torchvision
for videos, end in a bare StopIteration where an image is missing, and take placeholders in a user's text for pictures.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sapo.errors import ModelError

# For the annotation only.
if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]
"""Width and height in pixels."""

Positions = tuple[tuple[int, ...], ...] | None
"""Three positions for every token of a prompt; None where they are its places."""


@dataclass(frozen=True)
class PictureFeatures:
    """Features that the vision tower computes of one picture, in the width of the decoder."""

    tokens_IH: Tensor
    """(tokens of the picture, H): replace the embeddings of its tokens."""
    deepstack_IH: tuple[Tensor, ...] = ()
    """Added to the hidden states of its tokens after the first, second, ... block of the decoder (Qwen3-VL)."""


class Family(ABC):
    """Describe what models of one family have in common.

    Args:
        config: of the model.
        processor: the image processor, which is changed by `limit`.
        tokenizer: the model's; None in a process that is given encoded prompts only.
    """

    tower: ClassVar[str] = "vision_tower"
    """Name of the vision tower in the model's core, the module that `get_image_features` is a method of."""
    merger: ClassVar[tuple[str, ...]] = ("multi_modal_projector",)
    """Names of what maps the tower's features to the decoder's width."""
    opening: ClassVar[str] = ""
    closing: ClassVar[str] = ""
    """Text around a picture in a prompt without chat template; a chat template brings its own."""

    def __init__(self, config: Any, processor: Any, tokenizer: Any) -> None:
        self.config, self.processor, self.tokenizer = config, processor, tokenizer
        self.image_token_id = int(config.image_token_id)
        self.image_token: str = "" if tokenizer is None else tokenizer.convert_ids_to_tokens(self.image_token_id)

    @property
    def placeholder(self) -> str:
        """Return the text that stands for one picture before it is expanded."""
        return self.opening + self.image_token + self.closing

    @property
    def reserved(self) -> tuple[str, ...]:
        """Return the texts that a question must not have, since the tokenizer makes parts of pictures of them."""
        return tuple(t for t in (self.image_token, self.opening, self.closing) if t)

    @abstractmethod
    def limit(self, max_tokens: int) -> None:
        """Let no picture have more tokens.

        Raises:
            ModelError: all of the model's pictures have.
        """

    @abstractmethod
    def expansion(self, size: Size) -> list[int]:
        """Return the token ids of a picture of that size, of which those equal to `image_token_id` carry features."""

    def resized_size(self, size: Size) -> Size:
        """Return the size that a picture is scaled to before the image processor takes it."""
        return size

    def pixels(self, image: Image.Image) -> dict[str, Tensor]:
        """Return the tensors that `features` takes of a decoded picture."""
        return dict(self.processor(images=[image], return_tensors="pt"))

    def features(self, core: Any, pixels: Sequence[Mapping[str, Tensor]]) -> list[PictureFeatures]:
        """Compute the features of some pictures, all in one pass of the tower."""
        counts = [len(p["pixel_values"]) for p in pixels]
        found = core.get_image_features(torch.cat([p["pixel_values"] for p in pixels])).pooler_output
        rows = torch.stack(list(found)) if isinstance(found, list | tuple) else found
        return [PictureFeatures(part.flatten(0, 1)) for part in rows.split(counts)]

    def positions(
        self, core: Any, token_ids: Sequence[int], places: Sequence[Sequence[int]], sizes: Sequence[Size]
    ) -> Positions:
        """Return the positions of an expanded prompt's tokens."""
        return None

    def own_inputs(self, token_ids_1L: Tensor) -> dict[str, Tensor]:
        """Return what the model's own forward takes beside token ids and pixels."""
        return {}

    def _refuse_limit(self, tokens: int, max_tokens: int) -> None:
        if tokens > max_tokens:
            raise ModelError(
                f"the smallest picture of {self.config.model_type} has {tokens} tokens; got "
                f"model.vision.max_tokens_per_picture={max_tokens}; set it to {tokens} or more"
            )


class QwenVL(Family):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and mixtures of the last two: patches in any shape, three positions."""

    tower = "visual"
    merger = ("visual.merger", "visual.deepstack_merger_list")
    opening, closing = "<|vision_start|>", "<|vision_end|>"
    kept: ClassVar[int] = 64
    """Prompts whose positions are kept: questions in the same words with pictures of the same size are common."""

    def __init__(self, config: Any, processor: Any, tokenizer: Any) -> None:
        super().__init__(config, processor, tokenizer)
        self._positions: dict[tuple[Any, ...], Positions] = {}

    @property
    def reserved(self) -> tuple[str, ...]:
        """See `Family.reserved`."""
        video = getattr(self.config, "video_token_id", None)
        return (*super().reserved, *([] if video is None else [self.tokenizer.convert_ids_to_tokens(video)]))

    @property
    def _cell(self) -> int:
        """Return the side, in pixels, of what becomes one token."""
        return int(self.processor.patch_size * self.processor.merge_size)

    def limit(self, max_tokens: int) -> None:
        """See `Family.limit`."""
        size = dict(self.processor.size)
        size["longest_edge"] = min(size["longest_edge"], max_tokens * self._cell**2)
        size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
        self.processor.size = type(self.processor.size)(**size)

    def resized_size(self, size: Size) -> Size:
        """Return whole cells, as near to the shape as can be within the image processor's limits.

        That is `smart_resize` of transformers, but for strips that it lets have more pixels than the limit.
        """
        width, height = size
        cell, most, least = self._cell, self.processor.size["longest_edge"], self.processor.size["shortest_edge"]
        wide, high = (round(side / cell) * cell for side in size)
        if wide * high > most:
            scale = math.sqrt(width * height / most)
            wide, high = (max(cell, math.floor(side / scale / cell) * cell) for side in size)
            # A strip no higher than one cell would keep its length, and break the limit.
            wide = min(wide, most // high // cell * cell)
            high = min(high, most // wide // cell * cell)
        elif wide * high < least:
            scale = math.sqrt(least / (width * height))
            wide, high = (math.ceil(side * scale / cell) * cell for side in size)
        return wide, high

    def expansion(self, size: Size) -> list[int]:
        """See `Family.expansion`."""
        wide, high = self.resized_size(size)
        return [self.image_token_id] * ((wide // self._cell) * (high // self._cell))

    def pixels(self, image: Image.Image) -> dict[str, Tensor]:
        """See `Family.pixels`. Scaled here, so that every engine can be given the very same picture."""
        scaled = image.resize(self.resized_size(image.size), resample=self.processor.resample)
        return dict(self.processor(images=[scaled], do_resize=False, return_tensors="pt"))

    def features(self, core: Any, pixels: Sequence[Mapping[str, Tensor]]) -> list[PictureFeatures]:
        """See `Family.features`."""
        values, grids = (torch.cat([p[name] for p in pixels]) for name in ("pixel_values", "image_grid_thw"))
        found = core.get_image_features(values, grids)
        lengths = [len(tokens) for tokens in found.pooler_output]
        # Transformers 5.17 leaves these of all pictures in one tensor; later ones have split them already.
        deepstack = [
            layer.split(lengths) if isinstance(layer, Tensor) else layer
            for layer in getattr(found, "deepstack_features", None) or ()
        ]
        return [
            PictureFeatures(tokens, tuple(layer[i] for layer in deepstack))
            for i, tokens in enumerate(found.pooler_output)
        ]

    def positions(
        self, core: Any, token_ids: Sequence[int], places: Sequence[Sequence[int]], sizes: Sequence[Size]
    ) -> Positions:
        """See `Family.positions`."""
        key = (tuple(token_ids), tuple(map(tuple, places)), tuple(sizes))
        if key not in self._positions:
            while len(self._positions) >= self.kept:
                del self._positions[next(iter(self._positions))]
            self._positions[key] = self._new_positions(core, token_ids, places, sizes)
        return self._positions[key]

    def _new_positions(
        self, core: Any, token_ids: Sequence[int], places: Sequence[Sequence[int]], sizes: Sequence[Size]
    ) -> Positions:
        ids = torch.tensor([token_ids])
        kinds = torch.zeros_like(ids, dtype=torch.int32)
        kinds[0, [i for own in places for i in own]] = 1
        patch = self.processor.patch_size
        scaled = [self.resized_size(size) for size in sizes]
        grids = torch.tensor([(1, high // patch, wide // patch) for wide, high in scaled])
        found, _ = core.get_rope_index(ids, kinds, image_grid_thw=grids)
        return tuple(tuple(axis) for axis in found[:, 0].tolist())

    def own_inputs(self, token_ids_1L: Tensor) -> dict[str, Tensor]:
        """See `Family.own_inputs`."""
        return {"mm_token_type_ids": (token_ids_1L == self.image_token_id).int()}


class Idefics(Family):
    """Idefics3 and SmolVLM: a picture in rows and columns of tiles with marks between, and the whole of it again."""

    tower = "vision_model"
    merger = ("connector",)
    around: ClassVar[str] = "<fake_token_around_image>"
    whole: ClassVar[str] = "<global-img>"

    @property
    def reserved(self) -> tuple[str, ...]:
        """See `Family.reserved`."""
        return (self.image_token, self.around, self.whole)

    @property
    def _tile_tokens(self) -> int:
        vision = self.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2)

    def limit(self, max_tokens: int) -> None:
        """See `Family.limit`."""
        self._refuse_limit(self._tile_tokens, max_tokens)
        tile = self.processor.max_image_size["longest_edge"]
        side = math.isqrt(max_tokens // self._tile_tokens - 1) if max_tokens >= 2 * self._tile_tokens else 0
        if not side:
            self.processor.do_image_splitting = False
        elif side * tile < self.processor.size["longest_edge"]:
            self.processor.size = type(self.processor.size)(longest_edge=side * tile)

    def expansion(self, size: Size) -> list[int]:
        """See `Family.expansion`."""
        width, height = size
        _, rows, columns = self.processor.get_number_of_image_patches(height, width, {})
        tile = self.image_token * self._tile_tokens
        text = "".join(
            "".join(f"{self.around}<row_{r + 1}_col_{c + 1}>{tile}" for c in range(columns)) + "\n" for r in range(rows)
        )
        text += ("\n" if rows else "") + f"{self.around}{self.whole}{tile}{self.around}"
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def pixels(self, image: Image.Image) -> dict[str, Tensor]:
        """See `Family.pixels`."""
        found = self.processor(images=[[image]], return_tensors="pt")
        return {name: found[name] for name in ("pixel_values", "pixel_attention_mask")}

    def features(self, core: Any, pixels: Sequence[Mapping[str, Tensor]]) -> list[PictureFeatures]:
        """See `Family.features`."""
        names = ("pixel_values", "pixel_attention_mask")
        values, masks = (torch.cat([p[name] for p in pixels], dim=1) for name in names)
        found = core.get_image_features(values, masks).pooler_output
        return [PictureFeatures(part.flatten(0, 1)) for part in found.split([p[names[0]].shape[1] for p in pixels])]


class InternVL(Family):
    """InternVL: tiles of one size, and the whole picture once more where there are several."""

    def __init__(self, config: Any, processor: Any, tokenizer: Any) -> None:
        super().__init__(config, processor, tokenizer)
        processor.crop_to_patches = True  # as its Processor class does
        self._around = [
            getattr(tokenizer, "start_image_token", None) or "<img>",
            getattr(tokenizer, "end_image_token", None) or "</img>",
        ]

    @property
    def reserved(self) -> tuple[str, ...]:
        """See `Family.reserved`."""
        return (self.image_token, *self._around)

    @property
    def _tile_tokens(self) -> int:
        vision = self.config.vision_config
        sides = [side // patch for side, patch in zip(_pair(vision.image_size), _pair(vision.patch_size), strict=True)]
        return int(math.prod(sides) * self.config.downsample_ratio**2)

    def limit(self, max_tokens: int) -> None:
        """See `Family.limit`."""
        tiles = max_tokens // self._tile_tokens
        self._refuse_limit(self._tile_tokens, max_tokens)
        # With several tiles comes one of the whole picture.
        self.processor.max_patches = min(self.processor.max_patches, max(1, tiles - 1))

    def expansion(self, size: Size) -> list[int]:
        """See `Family.expansion`."""
        width, height = size
        tiles = self.processor.get_number_of_image_patches(height, width, {})
        before, after = (self.tokenizer.convert_tokens_to_ids(token) for token in self._around)
        return [before, *[self.image_token_id] * (tiles * self._tile_tokens), after]

    def pixels(self, image: Image.Image) -> dict[str, Tensor]:
        """See `Family.pixels`."""
        return {"pixel_values": self.processor(images=[image], return_tensors="pt")["pixel_values"]}


class Llava(Family):
    """LLaVA: every picture scaled and cut to one square."""

    def __init__(self, config: Any, processor: Any, tokenizer: Any) -> None:
        super().__init__(config, processor, tokenizer)
        if config.vision_config.model_type == "pixtral":
            raise ModelError("LLaVA with the vision tower of Pixtral is not supported; choose one with CLIP or SigLIP")

    @property
    def _tokens(self) -> int:
        vision = self.config.vision_config
        whole = (vision.image_size // vision.patch_size) ** 2
        has_class_token = vision.model_type.startswith("clip")
        return whole + int(has_class_token and self.config.vision_feature_select_strategy == "full")

    def limit(self, max_tokens: int) -> None:
        """See `Family.limit`."""
        self._refuse_limit(self._tokens, max_tokens)

    def expansion(self, size: Size) -> list[int]:
        """See `Family.expansion`."""
        return [self.image_token_id] * self._tokens


class Gemma3(Family):
    """Gemma 3, whose pictures' tokens attend to each other both ways: the proof at loading refuses it."""

    def limit(self, max_tokens: int) -> None:
        """See `Family.limit`."""
        self._refuse_limit(self.config.mm_tokens_per_image, max_tokens)

    def expansion(self, size: Size) -> list[int]:
        """See `Family.expansion`."""
        return [self.image_token_id] * int(self.config.mm_tokens_per_image)

    def own_inputs(self, token_ids_1L: Tensor) -> dict[str, Tensor]:
        """See `Family.own_inputs`."""
        return {"token_type_ids": (token_ids_1L == self.image_token_id).long()}

    def pixels(self, image: Image.Image) -> dict[str, Tensor]:
        """See `Family.pixels`."""
        return {"pixel_values": self.processor(images=[image], return_tensors="pt")["pixel_values"]}


FAMILIES: dict[str, type[Family]] = {
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": QwenVL,
    "qwen3_vl_moe": QwenVL,
    "qwen3_5": QwenVL,
    "qwen3_5_moe": QwenVL,
    "idefics3": Idefics,
    "smolvlm": Idefics,
    "internvl": InternVL,
    "llava": Llava,
    "gemma3": Gemma3,
}
"""`model_type` of a config -> family."""


def _pair(value: Any) -> tuple[int, int]:
    """Return height and width of a side that configs write as one number or two."""
    first, second = value if isinstance(value, list | tuple) else (value, value)
    return int(first), int(second)
