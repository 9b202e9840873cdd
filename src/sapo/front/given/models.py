"""Model objects as the section `model` of a recipe.

A model object is written to the cache of models, by the hash of its content, so that the run can be resumed, its ranks
can load it and a comparison's processes too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sapo.errors import ModelError
from sapo.model.policy import Policy, no_progress_bars
from sapo.model.sources import cache_directory
from sapo.utils.files import new_directory
from sapo.utils.text import first_line


def model_settings(model: Any, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section `model` of a recipe for a model that was given.

    Args:
        model: a path, a .gguf file or a hub id; a pair (model, tokenizer) of transformers; such a model alone, where
            the directory or repository it was loaded from has its tokenizer; a Policy; or the section as a dict.
        base: the section of the recipe, whose adapter and vision settings stay.

    Raises:
        ModelError: it is none of these, or cannot be written.
    """
    kept = {k: v for k, v in base.items() if k not in ("path", "revision", "coldstart", "trust_remote_code")}
    if isinstance(model, Mapping):
        replaced = {"path", "coldstart"} & set(model)
        return {**(kept if replaced else base), **{str(k): v for k, v in model.items()}}
    if isinstance(model, str | Path):
        return {**kept, "path": str(model)}
    directory, dtype = save_model(model)
    return {**kept, "path": str(directory), "dtype": dtype}


def save_model(model: Any) -> tuple[Path, str]:
    """Write a model object with its tokenizer to the cache, once, and return the directory and its precision.

    The object itself is not changed: a run trains a copy.

    Raises:
        ModelError: it is no model of transformers with a tokenizer, or of another precision than can be trained.
    """
    if isinstance(model, Policy):
        network, processor = model.adapter or model.model, model.tokenizer
    elif isinstance(model, tuple | list) and len(model) == 2:
        network, processor = model
    else:
        network, processor = model, None
    if not hasattr(network, "save_pretrained") or not hasattr(network, "state_dict"):
        raise ModelError(
            "a model must be a path, a hub id, a pair (model, tokenizer) of transformers, or a model of transformers; "
            f"got a {type(network).__name__}"
        )
    if processor is None:
        processor = _tokenizer_of(network)
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16"):
        raise ModelError(f"a model must be float32 or bfloat16 to be trained; got {dtype}; model.to(torch.bfloat16)")
    directory = cache_directory() / "models" / f"given-{_digest_of_model(network, processor)}"
    if not (directory / "config.json").is_file() and not (directory / "adapter_config.json").is_file():
        try:
            with new_directory(directory, shared=True) as aside, no_progress_bars():
                if isinstance(model, Policy):
                    model.save(aside)
                else:
                    network.save_pretrained(aside)
                    processor.save_pretrained(aside)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"the model object cannot be written to {directory}: {first_line(error)}") from error
    return directory, dtype


def _tokenizer_of(network: Any) -> Any:
    from transformers import AutoTokenizer

    name = getattr(network, "name_or_path", "") or getattr(getattr(network, "config", None), "_name_or_path", "")
    try:
        if not name:
            raise OSError("the model does not say where it was loaded from")
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(
            f"a model object needs its tokenizer; got one alone, and {first_line(error)}; give both: "
            "model=(model, tokenizer)"
        ) from error


_PARTS_OF_A_PROCESSOR = ("image_processor", "video_processor", "feature_extractor")
_OF_A_TOKENIZER = (
    *("special_tokens_map", "bos_token_id", "eos_token_id", "pad_token_id", "added_tokens_encoder"),
    *("add_bos_token", "add_eos_token", "padding_side", "truncation_side", "model_max_length"),
)
"""Attributes that are saved with a tokenizer and that its vocabulary does not show."""


def _settings_of(part: Any) -> Any:
    """Return the settings of a part of a model as they are saved with it; empty where it has none."""
    return part.to_dict() if callable(getattr(part, "to_dict", None)) else {}


def _in_words(value: Any) -> Any:
    """Return a value that JSON has not as one that is the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return str(value) if type(value).__repr__ is not object.__repr__ else type(value).__qualname__


def _digest_of_model(network: Any, processor: Any) -> str:
    import torch

    digest = hashlib.sha256(str(getattr(network, "config", "")).encode())
    adapters = getattr(network, "peft_config", None) or {}
    settings = {
        "generation": _settings_of(getattr(network, "generation_config", None)),
        "adapters": {str(name): _settings_of(adapter) for name, adapter in adapters.items()},
        "active": str(getattr(network, "active_adapter", "")) if adapters else "",
        "chat_template": str(getattr(processor, "chat_template", "")),
    }
    parts = {"": processor} | {name: getattr(processor, name, None) for name in _PARTS_OF_A_PROCESSOR}
    settings["parts"] = {name: _settings_of(part) for name, part in parts.items() if part is not None}
    vocabulary = getattr(processor, "tokenizer", processor)
    if hasattr(vocabulary, "get_vocab"):
        digest.update(json.dumps(sorted(vocabulary.get_vocab().items())).encode())
        digest.update(str(getattr(vocabulary, "chat_template", "")).encode())
        settings["tokens"] = {name: getattr(vocabulary, name, None) for name in _OF_A_TOKENIZER}
        backend = getattr(vocabulary, "backend_tokenizer", None)
        written = {} if backend is None else json.loads(backend.to_str())
        # The last call of a tokenizer has set these two; a call sets them anew.
        settings["tokenizer"] = {k: v for k, v in written.items() if k not in ("padding", "truncation")}
    digest.update(json.dumps(settings, sort_keys=True, default=_in_words).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
