"""A policy: any Hugging Face decoder with its tokenizer, run on packed tokens.

The decoder is used through two doors only: `hidden`, packed token ids to last hidden states under a layout, and the
output embedding, which the policy head and the sampler multiply themselves. `load_policy` proves on a few tokens that
the two together equal the model's own forward, so that a decoder with a step in between (logit soft-capping, say) is
refused rather than trained wrongly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sapo.data import Segment
from sapo.model.attention import ATTENTION_NAME, Layout, TreeLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")


class ModelError(ValueError):
    """A model directory that cannot be used as it is; the message says what is missing."""


class Policy:
    """A decoder and its tokenizer.

    Args:
        model: a transformers decoder whose attention implementation is `ATTENTION_NAME`.
        tokenizer: its tokenizer; the end-of-sequence token stops a completion.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.decoder: nn.Module = model.get_decoder()
        self._token_texts: list[str] | None = None
        # The policy must be the same function in rollout and in training: dropout would make r != 1 on policy.
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if getattr(module, "attention_dropout", 0.0):
                module.attention_dropout = 0.0
        model.eval()

    @property
    def head_weight(self) -> Tensor:
        """(V, H) output embedding."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        """(V,) bias of the output embedding, None when it has none."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.head_weight.dtype

    def parameters(self) -> list[nn.Parameter]:
        """The parameters training changes."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def max_length(self) -> int | None:
        """Longest sequence the positions of the model allow, None when its config does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """End-of-sequence ids of the tokenizer and of the generation config."""
        stops: set[int] = set()
        config = getattr(self.model, "generation_config", None)
        for ids in (self.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
            stops.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
        return frozenset(stops)

    def hidden(self, token_ids_N: Tensor, position_ids_N: Tensor, layout: Layout) -> Tensor:
        """(N, H) last hidden states of packed tokens."""
        output = self.decoder(
            input_ids=token_ids_N[None], position_ids=position_ids_N[None], use_cache=False, packed_layout=layout
        )
        return output.last_hidden_state[0]

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt in plain text.

        Raises:
            ModelError: when the tokenizer has no token for a part of it.
        """
        try:
            ids = self.tokenizer(text, add_special_tokens=True)["input_ids"]
        except Exception as error:  # the tokenizers library raises bare Exception for a character it does not know
            raise ModelError(f"the tokenizer cannot encode the prompt {text!r}: {error}") from error
        if not ids:
            raise ModelError(f"a prompt must have at least one token; got none from {text!r}")
        return tuple(ids)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer brings a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode_messages(self, messages: Sequence[Mapping[str, str]], thinking: bool | None = None) -> tuple[int, ...]:
        """Token ids of a chat, through the tokenizer's chat template, ready for the assistant's turn.

        Args:
            messages: each with a role and a content.
            thinking: the template's switch; None leaves it alone.

        Raises:
            ModelError: no chat template, one without that switch, or one that refuses the messages.
        """
        if not self.has_chat_template:
            raise ModelError(
                "the prompt is a list of chat messages but the tokenizer has no chat template; "
                "give prompts as plain text (prompt.style=plain) or a model with a template"
            )
        switch: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        if switch and "enable_thinking" not in str(self.tokenizer.chat_template):
            raise ModelError(
                f"prompt.thinking={str(thinking).lower()} needs a chat template with a switch (enable_thinking); "
                "this tokenizer's has none; leave prompt.thinking out"
            )
        try:
            ids = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **switch
            )
        except Exception as error:  # templates raise exceptions of their own for roles they do not know
            raise ModelError(f"the chat template refuses the messages: {first_line(error)}") from error
        return tuple(ids)

    def token_texts(self) -> list[str]:
        """The text each token of the vocabulary adds to a completion, special tokens as nothing.

        Read between two others, since decoders drop the blank that a text begins with.
        """
        if self._token_texts is None:
            frame = self.tokenizer("a", add_special_tokens=False)["input_ids"]
            ids = [[*frame, i] for i in range(self.head_weight.shape[0])]
            before = len(self.decode(frame))
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            self._token_texts = [text[before:] for text in texts]
        return self._token_texts

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion, special tokens left out: for verifiers and logs only."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def show(self, token_ids: Sequence[int]) -> str:
        """Text of tokens with the special ones spelled out: what the model saw, for a person to read."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def fingerprint(self) -> str:
        """Names the weights: a hash of all of them, with their names, shapes and precision."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def save(self, directory: Path) -> None:
        """Write an ordinary Hugging Face directory: safetensors, config and tokenizer."""
        with _no_progress_bars():
            self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def load_policy(path: str | Path, dtype: str = "float32", device: str | torch.device = "cpu") -> Policy:
    """Load a local Hugging Face decoder directory and prove that its packed forward equals its own.

    Raises:
        ModelError: a missing directory, config, weights or tokenizer, or an architecture that cannot run packed.
    """
    directory = Path(path)
    _check_directory(directory)
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
        raise ModelError(f"the tokenizer in {directory} cannot be loaded: {first_line(error)}") from error
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=DTYPES[dtype], attn_implementation="sdpa", output_loading_info=True
        )
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{directory} cannot be loaded as a causal language model: {first_line(error)}") from error
    model, loading = loaded
    if loading["missing_keys"]:  # transformers would leave them at random values
        missing = sorted(loading["missing_keys"])
        raise ModelError(f"the weights in {directory} lack {len(missing)} tensors, the first of them {missing[0]}")
    model = model.to(device)
    if tokenizer.eos_token_id is None and getattr(model.generation_config, "eos_token_id", None) is None:
        raise ModelError(f"the tokenizer in {directory} has no end-of-sequence token; set eos_token in its config")
    return prepare_policy(model, tokenizer)


def prepare_policy(model: Any, tokenizer: Any) -> Policy:
    """Turn a transformers decoder into a policy: packed attention, dropout off, the packed forward proven equal.

    Raises:
        ModelError: when the packed forward differs from the model's own.
    """
    if model.config._attn_implementation == ATTENTION_NAME:  # prepared before
        model.set_attn_implementation("sdpa")
    # Refused by name: with small logits a cap is nearly the identity, and the comparison below would not see it.
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        raise ModelError(f"{type(model).__name__} caps its logits, which the policy head does not compute yet")
    expected = _own_logprobs(model.eval())
    model.set_attn_implementation(ATTENTION_NAME)
    policy = Policy(model, tokenizer)
    try:
        got = _packed_logprobs(policy)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{type(model).__name__} cannot run on packed tokens: {first_line(error)}") from error
    # bfloat16 keeps 8 bits: two orders of summation differ by several hundredths in log-probability.
    tolerance = 0.25 if policy.dtype == torch.bfloat16 else 1e-3
    difference = (expected - got).abs().max().item()
    if not difference <= tolerance:
        raise ModelError(
            f"{type(model).__name__} computes something between its attention and its logits that the packed forward "
            f"does not: log-probabilities differ by up to {difference:.3g} (allowed {tolerance:g})"
        )
    return policy


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws bars for loading and saving; a run has a display of its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """First line of an exception's message, for a message of ours that quotes it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_PROBE_LENGTH = 12


def _probe_ids(model: Any) -> Tensor:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (_PROBE_LENGTH,), generator=generator).to(model.device)


@torch.no_grad()
def _own_logprobs(model: Any) -> Tensor:
    """(12, V) of a fixed random sequence by the model's own forward."""
    return torch.log_softmax(model(input_ids=_probe_ids(model)[None], use_cache=False).logits[0].float(), dim=-1)


@torch.no_grad()
def _packed_logprobs(policy: Policy) -> Tensor:
    """The same as a tree of two segments, so that a prefix is attended to as well."""
    ids = _probe_ids(policy.model)
    half = _PROBE_LENGTH // 2
    layout = TreeLayout((Segment(0, half, -1), Segment(half, _PROBE_LENGTH - half, 0)), ids.device)
    hidden = policy.hidden(ids, torch.arange(_PROBE_LENGTH, device=ids.device), layout)
    return torch.log_softmax(nn.functional.linear(hidden, policy.head_weight, policy.head_bias).float(), dim=-1)


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise ModelError(f"no model directory at {directory}; give a local Hugging Face directory")
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
