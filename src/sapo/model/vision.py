"""The eyes of a policy: pictures to tokens of a prompt, and to embeddings in a packed forward.

Which tokens stand for pictures is known from the encoding of the prompt (`PictureTokens`) and never looked for by token
id: a policy samples the image token now and then, and in a response that is a token like any other.
"""

from __future__ import annotations

import json
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from sapo.data import PackedPictures, Picture, PictureTokens
from sapo.data.picture_files import decode_picture
from sapo.errors import ModelError
from sapo.model.vision_families import FAMILIES, Family, PictureFeatures
from sapo.utils.text import first_line

T = TypeVar("T")

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

PIXEL_BYTES = 256 * 2**20
"""Preprocessed pictures that are kept: most are needed by the engine and by every update of a step."""

FEATURE_BYTES = 512 * 2**20
"""Features that are kept where the tower is not trained."""

Trained = Literal["none", "merger", "tower"]
"""Parts of the vision model that can be trained: none, the map of its features to the decoder's width, or all of it."""


class Vision:
    """Encodes the pictures of a policy's prompts.

    Args:
        model: the policy's transformers model.
        family: of the model; holds its image processor.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self.model = model
        self.family = family
        self.sharded = False
        """True where the weights are sharded over ranks (model/sharding.py)."""
        self._pixels = _Kept[dict[str, Tensor]](PIXEL_BYTES)
        self._features = _Kept[PictureFeatures](FEATURE_BYTES)
        self._weights: tuple[tuple[int, int], ...] = ()

    @property
    def core(self) -> Any:
        """Return the module that holds tower and decoder."""
        return self.model.model

    def parameters(self, part: Literal["merger", "tower"]) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters of the merger, or of the tower without it, with their names in the model."""
        mergers = tuple(f"model.{name}." for name in self.family.merger)
        inside = (f"model.{self.family.tower}.", *mergers)
        named = [(name, p) for name, p in self.model.named_parameters() if name.startswith(inside)]
        return [(name, p) for name, p in named if name.startswith(mergers) == (part == "merger")]

    def train(self, part: Trained) -> None:
        """Choose what of the vision part is trained."""
        for _, parameter in self.parameters("merger"):
            parameter.requires_grad_(part != "none")
        for _, parameter in self.parameters("tower"):
            parameter.requires_grad_(part == "tower")

    @property
    def frozen(self) -> bool:
        """Return whether nothing of the vision part is trained."""
        return not any(p.requires_grad for p in self._own())

    def expand(self, token_ids: Sequence[int], pictures: Sequence[Picture]) -> tuple[tuple[int, ...], PictureTokens]:
        """Replace the placeholder of each picture by its tokens.

        Args:
            token_ids: with one image token for each picture, in their order.

        Raises:
            ModelError: there are more placeholders than pictures, or fewer.
        """
        marked = [i for i, token in enumerate(token_ids) if token == self.family.image_token_id]
        if len(marked) != len(pictures):
            raise ModelError(
                f"a prompt must have one placeholder ({self.family.image_token}) for each picture; got {len(marked)} "
                f"for {len(pictures)} pictures; see that the chat template writes one for each"
            )
        expanded: list[int] = []
        places: list[tuple[int, ...]] = []
        start = 0
        for at, picture in zip(marked, pictures, strict=True):
            expanded += token_ids[start:at]
            own = self.family.expansion(picture.size)
            places.append(tuple(len(expanded) + i for i, t in enumerate(own) if t == self.family.image_token_id))
            expanded += own
            start = at + 1
        expanded += token_ids[start:]
        positions = self.family.positions(self.core, expanded, places, [p.size for p in pictures])
        return tuple(expanded), PictureTokens(tuple(places), positions)

    def embed(self, token_ids_N: Tensor, packed: PackedPictures) -> dict[str, Any]:
        """Return what the decoder takes in place of token ids: embeddings with the features of pictures among them."""
        features = self.features(packed.pictures)
        tokens_IH = _joined([f.tokens_IH for f in features], packed)
        embedded_NH = self.model.get_input_embeddings()(token_ids_N)
        embedded_NH = embedded_NH.index_copy(0, packed.places_I, tokens_IH.to(embedded_NH.dtype))
        inputs: dict[str, Any] = {"inputs_embeds": embedded_NH[None]}
        if features[0].deepstack_IH:
            shown_N = torch.zeros_like(token_ids_N, dtype=torch.bool).index_fill_(0, packed.places_I, True)
            layers = zip(*(f.deepstack_IH for f in features), strict=True)
            inputs["visual_pos_masks"] = shown_N[None]
            inputs["deepstack_visual_embeds"] = [_joined(layer, packed).to(embedded_NH.dtype) for layer in layers]
        return inputs

    def reach(self, hidden_NH: Tensor) -> Tensor:
        """Return hidden states as they are, with every trained parameter of the vision part in their graph.

        Ranks sum the gradients of the same parameters with each other. Where one has no picture, or a tower has a layer
        that is not used, these gradients are 0 and must still be there; and so in one process, whose optimizer would
        else leave out what those of several ranks decay.
        """
        trained = [p for p in self._own() if p.requires_grad] if torch.is_grad_enabled() else []
        if not trained:
            return hidden_NH
        nothing = torch.stack([p.flatten()[:1].sum().float() for p in trained]).sum() * 0.0
        return hidden_NH + nothing.to(hidden_NH.dtype)

    def forget(self) -> None:
        """Drop the features that are kept, as after other weights have come."""
        self._features.clear()

    def features(self, pictures: Sequence[Picture]) -> list[PictureFeatures]:
        """Return the features of pictures; one that comes twice is computed once.

        A frozen vision part computes each picture by itself and keeps what it found, so that no bit depends on which
        pictures came together.
        """
        distinct = list(dict.fromkeys(pictures))
        if self.frozen:
            found = {picture: self._kept_features(picture) for picture in distinct}
        else:
            computed = self.family.features(self.core, [self._placed(p) for p in distinct])
            found = dict(zip(distinct, computed, strict=True))
        return [found[picture] for picture in pictures]

    def pixels(self, picture: Picture) -> dict[str, Tensor]:
        """Return the tensors that the tower takes of a picture, on the CPU."""
        kept = self._pixels.get(picture.sha256)
        if kept is None:
            kept = self.family.pixels(decode_picture(picture))
            self._pixels.put(picture.sha256, kept, _bytes_of(kept.values()))
        return kept

    def save(self, directory: Any) -> None:
        """Write the image processor, as it was limited."""
        self.family.processor.save_pretrained(directory)

    def __deepcopy__(self, memo: dict[int, Any]) -> Vision:
        """Copy the eyes of a twin: the same image processor, caches of its own."""
        import copy

        return Vision(copy.deepcopy(self.model, memo), self.family)

    def _own(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of tower and merger, adapters within included."""
        for name in (self.family.tower, *self.family.merger):
            module = self.core
            for part in name.split("."):
                module = getattr(module, part, None)
            if module is not None:
                yield from module.parameters()

    def _placed(self, picture: Picture) -> dict[str, Tensor]:
        device = self.model.get_input_embeddings().weight.device
        return {name: tensor.to(device) for name, tensor in self.pixels(picture).items()}

    @torch.no_grad()
    def _kept_features(self, picture: Picture) -> PictureFeatures:
        # Whole weights of a sharded tower are gathered anew for each pass: `forget` is called where they change.
        weights = () if self.sharded else tuple((p.data_ptr(), p._version) for p in self._own())
        if weights != self._weights:  # a checkpoint was loaded into them
            self._weights = weights
            self._features.clear()
        kept = self._features.get(picture.sha256)
        if kept is None:
            (kept,) = self.family.features(self.core, [self._placed(picture)])
            self._features.put(picture.sha256, kept, _bytes_of((kept.tokens_IH, *kept.deepstack_IH)))
        return kept


class _Kept(Generic[T]):
    """Keep what was used last, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[str, tuple[T, int]] = OrderedDict()

    def get(self, key: str) -> T | None:
        """Return a value that is kept, None where it is not."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: str, value: T, size: int) -> None:
        """Keep a value of so many bytes, and drop those that were used the longest ago where there is no room."""
        if size > self._max_bytes:
            return
        self._entries[key] = (value, size)
        self._bytes += size
        while self._bytes > self._max_bytes:
            _, (_, dropped) = self._entries.popitem(last=False)
            self._bytes -= dropped

    def clear(self) -> None:
        """Drop all that is kept."""
        self._entries.clear()
        self._bytes = 0


def _joined(of_picture: Sequence[Tensor], packed: PackedPictures) -> Tensor:
    """Join what each picture gives its tokens, (i, H) each, to that of the tokens that are packed."""
    rows_IH = torch.cat(list(of_picture))
    assert len(rows_IH) == sum(packed.lengths), f"{sum(packed.lengths)} tokens for {len(rows_IH)} features"
    return rows_IH if packed.rows_I is None else rows_IH.index_select(0, packed.rows_I)


def _bytes_of(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)


def is_vision_model(directory: Path) -> bool:
    """Return whether a model directory is of a family of vision-language models that is known here."""
    config = json.loads((directory / "config.json").read_text())
    return "vision_config" in config and config.get("model_type") in FAMILIES


def load_family(directory: Path, config: Any, tokenizer: Any) -> Family:
    """Load the image processor of a model directory.

    Raises:
        ModelError: it has none, or one that cannot be used.
    """
    from transformers import AutoImageProcessor

    if not any((directory / name).is_file() for name in PROCESSOR_FILES):
        raise ModelError(
            f"{directory} has no image processor (none of {', '.join(PROCESSOR_FILES)}); save the base model's there"
        )
    try:
        processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
        return FAMILIES[config.model_type](config, processor, tokenizer)
    except (ValueError, OSError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise ModelError(f"the image processor in {directory} cannot be loaded: {first_line(error)}") from error


def processor_files(family: Family) -> dict[str, str]:
    """Return the files of a family's image processor by name, for a process that has no model directory."""
    with tempfile.TemporaryDirectory(prefix="sapo-processor-") as directory:
        family.processor.save_pretrained(directory)
        return {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(directory).iterdir())}


def family_of_files(files: Mapping[str, str], config: Any, tokenizer: Any) -> Family:
    """Return the family whose files `processor_files` has returned.

    Args:
        config: of the model.
        tokenizer: the model's; None in a process that is given encoded prompts only.
    """
    with tempfile.TemporaryDirectory(prefix="sapo-processor-") as directory:
        for name, text in files.items():
            (Path(directory) / name).write_text(text, encoding="utf-8")
        return load_family(Path(directory), config, tokenizer)


def refuse_reserved(family: Family, text: str, task: str) -> None:
    """Refuse a question with text that the tokenizer would take for part of a picture.

    Raises:
        ModelError: it has some.
    """
    for reserved in family.reserved:
        if reserved in text:
            raise ModelError(
                f"a question must not have {reserved!r}, which is a token that stands for pictures; got it in a prompt "
                f"of task {task!r}; write it otherwise"
            )


def own_pixels(vision: Vision, picture: Picture) -> Mapping[str, Tensor]:
    """Return the pixels of a picture where the model is, for its own forward."""
    return vision._placed(picture)
