"""Load a policy, and choose how it runs by the proof that it computes what the model computes (proof.py)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sapo.errors import ModelError
from sapo.model.adapters import ADAPTER_FILE, adapter_base, load_adapter
from sapo.model.attention import ATTENTION_NAME, attend_by
from sapo.model.policy import DTYPES, Policy, decoder_of_model
from sapo.model.positions import fixed_length, longest_sequence
from sapo.model.proof import (
    TOLERANCE,
    TOLERANCES,
    OwnForward,
    check_head,
    fault_of,
    make_probe,
    own_forward,
    within_reach,
)
from sapo.model.sources import model_directory
from sapo.model.vision import Vision, is_vision_model, load_family
from sapo.model.vision_families import Family
from sapo.model.vision_proof import own_logprobs_of_picture, packed_logprobs_of_picture
from sapo.utils.faults import is_bug_of_ours, memory_failure
from sapo.utils.reading import read_json
from sapo.utils.text import first_line

_QUANTISED = re.compile(r"F[48].*|[IU]8")
"""Types of numbers in a file of weights that are those of a quantised model."""
_COMPUTED = re.compile(r"rotary|inv_freq|masked_bias|attn\.bias|position_ids|num_batches_tracked")
"""Names of tensors in files of weights that a model computes itself."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")


def load_policy(
    source: str | Path,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_tokens_per_picture: int | None = None,
    text_only: bool = False,
) -> Policy:
    """Load a Hugging Face decoder and prove that its packed forward equals its own.

    Args:
        source: a directory (of a model, or of an adapter, which names its model), a .gguf file, a file of an installed
            package, or a hub id: see model/sources.py.
        revision: of a hub repository.
        trust_remote_code: run code that the model brings along.
        max_tokens_per_picture: scale pictures down to this; None for the limit that the image processor has.
        text_only: leave the vision part of a model out.

    Raises:
        ModelError: a missing directory, config, weights or tokenizer, or an architecture that cannot run packed.
    """
    directory = model_directory(source, revision)
    if (directory / ADAPTER_FILE).is_file():
        base, base_revision = adapter_base(directory)
        policy = load_policy(
            base,
            dtype,
            device,
            revision=base_revision,
            trust_remote_code=trust_remote_code,
            max_tokens_per_picture=max_tokens_per_picture,
            text_only=text_only,
        )
        load_adapter(policy, directory)
        return policy
    _check_directory(directory)
    if not trust_remote_code:
        _refuse_remote_code(directory)
    transformers_logging.disable_progress_bar()
    try:
        AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # each class of settings checks and computes what it likes
        raise ModelError(
            f"{directory} cannot be loaded as a model: its config.json gives {_reason(error)}; mend it, or take "
            "the one that belongs to the weights"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
        raise ModelError(f"the tokenizer in {directory} cannot be loaded: {_reason(error)}") from error
    shows = is_vision_model(directory) and not text_only
    try:
        loaded = _load_model(
            AutoModelForImageTextToText if shows else AutoModelForCausalLM,
            directory,
            dtype=DTYPES[dtype],
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # damaged settings or weights make transformers raise what they please
        if is_bug_of_ours(error) or memory_failure(error) is not None:
            raise
        kind = "vision-language" if shows else "causal language"
        raise ModelError(f"{directory} cannot be loaded as a {kind} model: {_reason(error)}") from error
    model, loading = loaded
    if loading["mismatched_keys"]:
        name, found, expected = sorted(loading["mismatched_keys"])[0]
        raise ModelError(
            f"{directory} cannot be loaded: its weights must have the shapes of its config.json; got {tuple(found)} "
            f"for {name}, which is {tuple(expected)} by the config; take the config that belongs to these weights"
        )
    if loading["missing_keys"]:  # transformers would leave them at random values
        missing = sorted(loading["missing_keys"])
        raise ModelError(f"the weights in {directory} lack {len(missing)} tensors, the first of them {missing[0]}")
    if unknown := sorted(key for key in loading["unexpected_keys"] if not _COMPUTED.search(key)):
        raise ModelError(
            f"the weights in {directory} must be those of its config.json; got {len(unknown)} tensors that the model "
            f"has no place for, the first of them {unknown[0]}; a checkpoint would lose them; take the config that "
            "belongs to these weights"
        )
    model = _unmapped(model.to(device))
    if tokenizer.eos_token_id is None and getattr(model.generation_config, "eos_token_id", None) is None:
        raise ModelError(f"the tokenizer in {directory} has no end-of-sequence token; set eos_token in its config")
    if not all(type(token) is int and token >= 0 for token in _end_tokens(model)):
        raise ModelError(
            f"eos_token_id in {directory} must be token ids; got {_end_tokens(model)!r:.80}; mend its config"
        )
    family = load_family(directory, model.config, tokenizer) if shows else None
    if family is not None and max_tokens_per_picture is not None:
        family.limit(max_tokens_per_picture)
    policy = prepare_policy(model, tokenizer, family)
    policy.source = str(directory.absolute()) if Path(source).is_dir() else str(source)
    policy.revision = revision
    return policy


def _load_model(auto: Any, directory: Path, **options: Any) -> Any:
    """Load a model with the attention of torch, or with its own code's where it has no other (gpt-oss).

    transformers' table of tensors that do not fit is left out: what is wrong is refused in one line.
    """
    said = logging.getLogger("transformers.modeling_utils")
    said.addFilter(_is_no_table)
    try:
        return auto.from_pretrained(directory, attn_implementation="sdpa", ignore_mismatched_sizes=True, **options)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return auto.from_pretrained(directory, attn_implementation="eager", ignore_mismatched_sizes=True, **options)
    finally:
        said.removeFilter(_is_no_table)


def _is_no_table(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _reason(error: BaseException) -> str:
    """Return why a library could not read a file, on one line."""
    if isinstance(error, LookupError | AssertionError | ArithmeticError):  # their text says little without
        return f"{type(error).__name__} {first_line(error)}"
    line = first_line(error)
    return " ".join(str(error).split())[:300] if line.endswith(":") else line


def _unmapped(model: Any) -> Any:
    """Move weights from the file that they are mapped from into memory of this process, one tensor after the other.

    A mapped weight is read when it is first used. Whoever writes the file anew in the meantime, as a second export
    does, would end this process by SIGBUS or change its weights, and a deleted checkpoint would stay on the disk.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.detach().clone()
    return model


def _end_tokens(model: Any) -> list[Any]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]


def _refuse_remote_code(directory: Path) -> None:
    """Refuse a model that brings its own code, before transformers asks for leave in its own words."""
    for name in ("config.json", "tokenizer_config.json"):
        file = directory / name
        if file.is_file() and read_json(file, "a model's settings", ModelError).get("auto_map"):
            raise ModelError(
                f"{directory} brings code of its own ({name}: auto_map), which is not run unless asked for; "
                "read it, then set model.trust_remote_code=true"
            )


def prepare_policy(model: Any, tokenizer: Any, family: Family | None = None) -> Policy:
    """Turn a transformers decoder into a policy: dropout off, and its forward proven equal to the model's own.

    It runs on packed tokens where that is exact, and in padded rows elsewhere (`Policy.path`).

    Args:
        family: of a vision-language model, whose proof holds a picture as well.

    Raises:
        ModelError: neither is the model's own forward.
    """
    own_attention = own_attention_of(model)
    attend_by(model, own_attention)
    vision = None if family is None else Vision(model, family)
    model.eval()
    with within_reach(model) as widest:
        longest = longest_sequence(model.config.get_text_config())
        own = own_forward(model, make_probe(model, tokenizer, widest, longest))
        expected_of_picture = None if vision is None else own_logprobs_of_picture(vision)
        policy = Policy(model, tokenizer, vision=vision)
        policy.own_attention = own_attention
        check_head(policy, own)
        _note_length(policy)
        _choose_path(policy, own)
        if expected_of_picture is not None:
            _check_picture(policy, expected_of_picture)
    return policy


def _note_length(policy: Policy) -> None:
    """Say where sequences are shorter than the positions of the config."""
    config = policy.model.config.get_text_config()
    limit, named = fixed_length(config), getattr(config, "max_position_embeddings", None)
    if limit is not None and isinstance(named, int) and limit[0] < named:
        policy.notices.append(
            f"{type(policy.model).__name__}: sequences have at most {limit[0]} tokens, of {named} positions: with a "
            f"longer one {limit[1]} rotary embeddings turn every token of its forward otherwise, so that one row would "
            "change the others (docs/models.md)"
        )


def _choose_path(policy: Policy, own: OwnForward) -> None:
    """Let a policy run on packed tokens where that is exact, or else in rows.

    Raises:
        ModelError: it is exact in neither.
    """
    name = type(policy.model).__name__
    attend_by(policy.model, ATTENTION_NAME)
    policy.path_reason = fault_of(policy, own)
    if policy.path_reason is None:
        return
    if policy.vision is not None:
        raise ModelError(
            f"{name} cannot run on packed tokens: {policy.path_reason}; with pictures there is no other way; train a "
            "model of text alone, or one of another family"
        )
    policy.path = "rows"
    attend_by(policy.model, policy.own_attention)
    in_rows = fault_of(policy, own)
    if in_rows is not None:
        raise ModelError(
            f"{name} is exact neither on packed tokens ({policy.path_reason}) nor in padded rows ({in_rows}); take a "
            "model of another family"
        )
    policy.notices.append(
        f"{name} runs in padded rows, each prompt once for each of its responses: slower, and exact; on packed tokens "
        f"it would not be: {policy.path_reason}"
    )


def _check_picture(policy: Policy, expected: Tensor) -> None:
    name = type(policy.model).__name__
    try:
        difference = (expected - packed_logprobs_of_picture(policy)).abs().max().item()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if is_bug_of_ours(error):
            raise
        raise ModelError(f"{name} cannot run on packed tokens with a picture: {first_line(error)}") from error
    tolerance = TOLERANCES.get(policy.dtype, TOLERANCE)
    if not difference <= tolerance:
        raise ModelError(
            f"{name} does something with pictures that the packed forward does not (in Gemma 3 the "
            "tokens of a picture attend to each other both ways): log-probabilities of a prompt with a picture differ "
            f"by up to {difference:.3g} (allowed {tolerance:g})"
        )


def own_attention_of(model: Any) -> str:
    """Return the attention of transformers that a model computes by itself with."""
    chosen = str(model.config.get_text_config()._attn_implementation)
    if chosen != ATTENTION_NAME:
        return chosen
    return "sdpa" if getattr(decoder_of_model(model), "_supports_sdpa", True) else "eager"  # prepared before


def _check_directory(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json: it is not a Hugging Face model directory")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{directory} has no tokenizer (none of {', '.join(TOKENIZER_FILES[:3])}); save one beside it")
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
        raise ModelError(f"{directory} has no weights (*.safetensors)")
    settings = read_json(directory / "config.json", "valid JSON, a model's settings", ModelError)
    for section in (settings, settings.get("text_config")):
        if isinstance(section, dict) and section.get("quantization_config"):
            described = section["quantization_config"]
            method = described.get("quant_method") if isinstance(described, dict) else described
            raise ModelError(
                f"the weights in {directory} must be plain floats to be trained and saved; got weights quantised by "
                f"{method!r} (config.json: quantization_config); save them dequantised, as bfloat16, and name that "
                "directory"
            )
    for name, kind in _types_of_weights(directory):
        if _QUANTISED.fullmatch(kind) and not _COMPUTED.search(name):
            raise ModelError(
                f"the weights in {directory} must be plain floats to be trained and saved; got {name} as {kind}, a "
                "quantised one without its scale; save them dequantised, as bfloat16, and name that directory"
            )


def _types_of_weights(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield name and type of the tensors in a model's files, as safetensors calls them (F32, BF16, F8_E4M3).

    A file that cannot be read has none: loading it says why.
    """
    for file in sorted(directory.glob("model*.safetensors")):
        with suppress(OSError, SafetensorError), safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                yield name, tensors.get_slice(name).get_dtype()
