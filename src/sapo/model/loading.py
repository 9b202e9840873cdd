"""Load a policy, and prove that it computes on packed trees what the model computes on plain sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sapo.data import Segment
from sapo.errors import ModelError
from sapo.model.adapters import ADAPTER_FILE, adapter_base, load_adapter
from sapo.model.attention import ATTENTION_NAME, TreeLayout
from sapo.model.policy import DTYPES, Policy
from sapo.model.sources import model_directory
from sapo.utils.text import first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")


# A prompt and two responses to it. With one response only, tokens would stand in the order of the text, and a layer
# that carries a state from token to token (a convolution, linear attention) would look right and leak one response into
# the next in every real batch.
_PROBE_PROMPT, _PROBE_RESPONSES = 6, (5, 4)


def load_policy(
    source: str | Path,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Policy:
    """Load a Hugging Face decoder and prove that its packed forward equals its own.

    Args:
        source: a directory (of a model, or of an adapter, which names its model), a .gguf file, a file of an installed
            package, or a hub id: see model/sources.py.
        revision: of a hub repository.
        trust_remote_code: run code that the model brings along.

    Raises:
        ModelError: a missing directory, config, weights or tokenizer, or an architecture that cannot run packed.
    """
    directory = model_directory(source, revision)
    if (directory / ADAPTER_FILE).is_file():
        base, base_revision = adapter_base(directory)
        policy = load_policy(base, dtype, device, revision=base_revision, trust_remote_code=trust_remote_code)
        load_adapter(policy, directory)
        return policy
    _check_directory(directory)
    if not trust_remote_code:
        _refuse_remote_code(directory)
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
        raise ModelError(f"the tokenizer in {directory} cannot be loaded: {first_line(error)}") from error
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except (ValueError, OSError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{directory} cannot be loaded as a causal language model: {first_line(error)}") from error
    model, loading = loaded
    if loading["missing_keys"]:  # transformers would leave them at random values
        missing = sorted(loading["missing_keys"])
        raise ModelError(f"the weights in {directory} lack {len(missing)} tensors, the first of them {missing[0]}")
    model = model.to(device)
    if tokenizer.eos_token_id is None and getattr(model.generation_config, "eos_token_id", None) is None:
        raise ModelError(f"the tokenizer in {directory} has no end-of-sequence token; set eos_token in its config")
    policy = prepare_policy(model, tokenizer)
    policy.source = str(directory.absolute()) if Path(source).is_dir() else str(source)
    policy.revision = revision
    return policy


def _refuse_remote_code(directory: Path) -> None:
    """Refuse a model that brings its own code, before transformers asks for leave in its own words."""
    for name in ("config.json", "tokenizer_config.json"):
        file = directory / name
        if file.is_file() and json.loads(file.read_text()).get("auto_map"):
            raise ModelError(
                f"{directory} brings code of its own ({name}: auto_map), which is not run unless asked for; "
                "read it, then set model.trust_remote_code=true"
            )


def prepare_policy(model: Any, tokenizer: Any) -> Policy:
    """Turn a transformers decoder into a policy: packed attention, dropout off, the packed forward proven equal.

    Raises:
        ModelError: when the packed forward differs from the model's own.
    """
    if model.config._attn_implementation == ATTENTION_NAME:  # prepared before
        model.set_attn_implementation("sdpa")
    expected = _own_logprobs(model.eval())
    model.set_attn_implementation(ATTENTION_NAME)
    policy = Policy(model, tokenizer)
    try:
        got = _packed_logprobs(policy)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{type(model).__name__} cannot run on packed tokens: {first_line(error)}") from error
    # bfloat16 keeps 8 bits: two orders of summation differ by several hundredths in log-probability.
    tolerance = 0.25 if policy.dtype == torch.bfloat16 else 1e-3
    difference = (expected - got).abs().max().item()
    if not difference <= tolerance:
        raise ModelError(
            f"{type(model).__name__} computes something beside attention that the packed forward does not (a state "
            "carried from token to token, as in convolutions and linear attention, or a step before its logits): "
            f"log-probabilities differ by up to {difference:.3g} (allowed {tolerance:g})"
        )
    return policy


def _probe_ids(model: Any) -> Tensor:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (_PROBE_PROMPT + sum(_PROBE_RESPONSES),), generator=generator).to(model.device)


def _probe_paths() -> list[list[int]]:
    """List the packed positions of the prompt followed by each response."""
    paths, start = [], _PROBE_PROMPT
    for length in _PROBE_RESPONSES:
        paths.append([*range(_PROBE_PROMPT), *range(start, start + length)])
        start += length
    return paths


@torch.no_grad()
def _own_logprobs(model: Any) -> Tensor:
    """Compute the log-probabilities of both sequences, one after the other, by the model's own forward."""
    ids = _probe_ids(model)
    logits = [model(input_ids=ids[path][None], use_cache=False).logits[0] for path in _probe_paths()]
    return torch.log_softmax(torch.cat(logits).float(), dim=-1)


@torch.no_grad()
def _packed_logprobs(policy: Policy) -> Tensor:
    """Compute the same from one packed forward pass, the prompt computed once."""
    ids = _probe_ids(policy.model)
    segments, positions, start = [Segment(0, _PROBE_PROMPT, -1)], list(range(_PROBE_PROMPT)), _PROBE_PROMPT
    for length in _PROBE_RESPONSES:
        segments.append(Segment(start, length, 0))
        positions += range(_PROBE_PROMPT, _PROBE_PROMPT + length)
        start += length
    layout = TreeLayout(segments, ids.device)
    positions_N = torch.tensor(positions, device=ids.device)
    logits = policy.run(lambda: policy.logits(policy.hidden(ids, positions_N, layout)))
    return torch.log_softmax(torch.cat([logits[path] for path in _probe_paths()]).float(), dim=-1)


def _check_directory(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json: it is not a Hugging Face model directory")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{directory} has no tokenizer (none of {', '.join(TOKENIZER_FILES[:3])}); save one beside it")
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
        raise ModelError(f"{directory} has no weights (*.safetensors)")
    try:
        json.loads((directory / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ModelError(f"{directory / 'config.json'} is not valid JSON: {error}") from error
