"""Copy a model from one Hugging Face directory to another, one tensor in memory at a time.

The source's files are mapped and read where they are needed. An adapter is folded into each layer as that layer is
written, a cast is made of each tensor as it is written. `transformers`' own writer holds all tensors of a file, and
loading before saving holds the model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from sapo.errors import ConfigError
from sapo.model.adapters import ADAPTER_FILE, adapter_base, adapter_description, fold, foldable_layers, install_adapter
from sapo.model.policy import Policy
from sapo.model.sources import model_directory
from sapo.model.vision import is_vision_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
DEFAULT_SHARD_SIZE = "5GB"

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_FORMAT_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _FORMAT_NAMES.items()}


@dataclass(frozen=True)
class Copied:
    """Describe what was copied, for the model card.

    >>> Copied("Qwen3ForCausalLM", 596_049_920).num_parameters
    596049920
    """

    architecture: str
    num_parameters: int
    """Number of parameters, tied ones counted once."""
    pictures: bool = False
    """True for a vision-language model, which needs its image processor as well."""


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: its shape and precision, and how to get it when its turn comes.

    >>> Planned((2, 3), torch.float32, lambda: torch.zeros(2, 3)).num_bytes
    24
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Return the bytes it takes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 5GB, 500MB or 200KB (powers of 1000, as everywhere on the hub).

    Raises:
        ConfigError: it is no such size, or below one kilobyte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1000:
        raise ConfigError(f"max_shard_size must be a number with KB, MB or GB, at least 1KB; got {text!r}; try 5GB")
    return size


def copy_model(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype,
    trained_dtype: torch.dtype,
    max_shard_size: int,
    trust_remote_code: bool = False,
) -> Copied | None:
    """Write the model of a directory into another: weights, config and generation config, and code that it brings.

    Args:
        source: an ordinary Hugging Face directory of safetensors, or an adapter in peft's layout.
        target: an existing directory.
        dtype: of the weights written.
        trained_dtype: that the weights had in training: a base model is rounded to it before an adapter is added.
        max_shard_size: bytes of a file, above which weights are written to several with an index. A larger tensor has a
            file to itself.

    Returns:
        None where the model cannot be copied tensor by tensor: an adapter of experts or routers, whose products are of
        parameters that the files hold in another form; a base model whose files are not safetensors or use other names
        than its modules. Nothing was written then.

    Raises:
        ModelError: an adapter whose base model cannot be had.
    """
    base = source
    is_adapter = (source / ADAPTER_FILE).is_file()
    if is_adapter:
        base = model_directory(*adapter_base(source))
    with ExitStack() as opened, torch.device("meta"):
        stored = _open_weights(base, opened)
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        shows = is_vision_model(base)
        kind = AutoModelForImageTextToText if shows else AutoModelForCausalLM
        model: Any = kind.from_config(config, trust_remote_code=trust_remote_code)
        copied = Copied(type(model).__name__, sum(p.numel() for p in model.parameters()), shows)
        for alias in _aliases(model):
            stored.pop(alias, None)
        deltas: dict[str, Callable[[Tensor], Tensor]] | None = {}
        if is_adapter:
            deltas = _deltas(source, model, opened)
        if not stored or deltas is None or not deltas.keys() <= stored.keys():
            return None
        planned = {name: _planned(of, deltas.get(name), dtype, trained_dtype) for name, of in stored.items()}
        with torch.device("cpu"):
            write_shards(target, planned, max_shard_size)
    _write_config(base, target, config, type(model).__name__, dtype)
    return copied


def write_shards(directory: Path, tensors: Mapping[str, Planned], max_shard_size: int) -> None:
    """Write tensors to model.safetensors, or to several files and an index where they exceed the largest size."""
    split = split_state_dict_into_shards_factory(
        {name: tensor.num_bytes for name, tensor in tensors.items()},
        get_storage_size=lambda num_bytes: num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        with (directory / file).open("wb") as stream:
            _write_safetensors(stream, {name: tensors[name] for name in names})
    if split.is_sharded:
        elements = sum(torch.Size(t.shape).numel() for t in tensors.values())
        metadata = {"total_parameters": elements, **split.metadata}
        _write_json(directory / INDEX, {"metadata": metadata, "weight_map": split.tensor_to_filename})


def _write_safetensors(stream: IO[bytes], tensors: Mapping[str, Planned]) -> None:
    """Write one file as the safetensors library does: wide elements first, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.num_bytes
        kind = _FORMAT_NAMES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        value = tensors[name].read().contiguous().reshape(-1)
        stream.write(value.view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class _Stored:
    """A tensor in a mapped file."""

    file: Any
    name: str

    def read(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor

    def shape_and_dtype(self) -> tuple[tuple[int, ...], torch.dtype]:
        part = self.file.get_slice(self.name)
        return tuple(part.get_shape()), _DTYPES[part.get_dtype()]


def _open_weights(directory: Path, opened: ExitStack) -> dict[str, _Stored]:
    """Map the weights of a directory, by name; none where they are not safetensors."""
    index = directory / INDEX
    files = [directory / WEIGHTS]
    if index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return {name: stored for file in files if file.is_file() for name, stored in _open_file(file, opened).items()}


def _open_file(file: Path, opened: ExitStack) -> dict[str, _Stored]:
    mapped = opened.enter_context(safe_open(file, framework="pt"))
    return {name: _Stored(mapped, name) for name in mapped.keys()}  # noqa: SIM118 (no mapping, though it has keys)


def _aliases(model: Any) -> set[str]:
    """Return the names of parameters that are tied to another, which is written in their place."""
    return {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}


def _deltas(adapter: Path, model: Any, opened: ExitStack) -> dict[str, Callable[[Tensor], Tensor]] | None:
    """Return what adds the adapter to a weight, by the weight's name; None for an adapter that does not fold."""
    policy = Policy(model, tokenizer=None)
    install_adapter(policy, adapter_description(adapter))
    layers = foldable_layers(policy)
    if layers is None:
        return None
    stored = _open_file(adapter / ADAPTER_WEIGHTS, opened)

    def adding(name: str, layer: Any) -> Callable[[Tensor], Tensor]:
        a, b = (stored[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        return lambda weight: fold(layer, weight, a.read(), b.read())

    return {f"{name}.weight": adding(name, layer) for name, layer in layers.items()}


def _planned(
    stored: _Stored, delta: Callable[[Tensor], Tensor] | None, dtype: torch.dtype, trained: torch.dtype
) -> Planned:
    shape, kept = stored.shape_and_dtype()
    if not kept.is_floating_point:
        return Planned(shape, kept, stored.read)
    if delta is None:
        return Planned(shape, dtype, lambda: stored.read().to(trained).to(dtype))
    # In float32 at least, so that the sum is rounded once.
    return Planned(shape, dtype, lambda: delta(_widened(stored.read().to(trained))).to(dtype))


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype.itemsize >= torch.float32.itemsize else tensor.float()


def _write_config(base: Path, target: Path, config: Any, architecture: str, dtype: torch.dtype) -> None:
    """Write config and generation config as `save_pretrained` of a model does, and code that the model brings."""
    for part in (config, *_parts(config)):
        part.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [architecture]
    config.save_pretrained(target)
    if (base / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(base).save_pretrained(target)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(target)
    for code in base.glob("*.py"):
        shutil.copyfile(code, target / code.name)


def _parts(config: Any) -> list[Any]:
    """Return the configs within a config, which have a precision of their own."""
    return [getattr(config, name) for name in getattr(config, "sub_configs", {}) if getattr(config, name, None)]


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
