"""A policy: any Hugging Face decoder with its tokenizer, run on packed tokens.

The decoder is used through two doors only: `hidden`, packed token ids to last hidden states under a layout, and the
output embedding, which the policy head and the sampler multiply themselves. A forward pass of training goes through
both within one `run`. `load_policy` proves on a few tokens that the two together equal the model's own forward, so that
a decoder with a step in between (logit soft-capping, say) is refused rather than trained wrongly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from sapo.errors import ModelError
from sapo.model.attention import Layout
from sapo.model.blocks import use_closed_forms
from sapo.model.head import head_logits
from sapo.model.products import use_best_products
from sapo.utils.text import first_line

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Policy:
    """A decoder and its tokenizer.

    Args:
        model: a transformers decoder whose attention implementation is `ATTENTION_NAME`.
        tokenizer: its tokenizer; the end-of-sequence token stops a completion.
        source: where the model came from, for what has to name it.
    """

    def __init__(self, model: Any, tokenizer: Any, source: str = "") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.revision: str | None = None
        self.adapter: Any = None
        """The peft model around `model` when only an adapter is trained (model/adapters.py)."""
        self.decoder: nn.Module = model.get_decoder()
        self.sharded: dict[str, torch.dtype] | None = None
        """Where the weights are sharded over ranks: the precision of each parameter before (model/sharding.py)."""
        self._token_texts: list[str] | None = None
        self.make_deterministic()

    def make_deterministic(self) -> None:
        """Make the model the same function in rollout and in training: dropout would make r != 1 on policy."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if getattr(module, "attention_dropout", 0.0):
                module.attention_dropout = 0.0
        use_best_products(self.model)
        use_closed_forms(self.model)
        self.model.eval()

    @property
    def head_weight(self) -> Tensor:
        """Return the (V, H) output embedding."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        """Return the (V,) bias of the output embedding, None when it has none."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def logit_softcap(self) -> float | None:
        """Return c of a model whose logits are c tanh(x / c) (Gemma 2)."""
        return getattr(self.model.config, "final_logit_softcapping", None)

    @property
    def logit_scale(self) -> float:
        """Return the factor of the model's logits: 1 for most, not for Granite and Cohere."""
        config = self.model.config
        return getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of the weights."""
        return self.head_weight.dtype

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that training changes."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter by name, where it lies and without autograd; tied ones once."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    @property
    def num_parameters(self) -> int:
        """Count the parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def max_length(self) -> int | None:
        """Return the longest sequence the model's positions allow, None when its config does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Return the end-of-sequence ids of the tokenizer and of the generation config."""
        stops: set[int] = set()
        config = getattr(self.model, "generation_config", None)
        for ids in (self.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
            stops.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
        return frozenset(stops)

    def run(self, work: Callable[[], T]) -> T:
        """Run a forward pass of training: `work` computes hidden states and what the head makes of them.

        Everything that reads weights for a gradient or for log pi is within one such call. In one process that is a
        plain call; weights that are sharded over processes are whole within it and nowhere else.

        Args:
            work: returns tensors, or a tuple that has those with a graph among its own elements.
        """
        if self.sharded is None:
            return work()
        try:
            found: T = self.model(work)
            return found
        finally:
            # A backward pass does so itself. Weights left whole here would be the old ones after the next change.
            if not torch.is_grad_enabled():
                self.model.reshard()

    def hidden(self, token_ids_N: Tensor, position_ids_N: Tensor, layout: Layout) -> Tensor:
        """Compute (N, H) last hidden states of packed tokens, times `logit_scale`, for the head to use as they are.

        Called within `run`.
        """
        output = self.decoder(
            input_ids=token_ids_N[None], position_ids=position_ids_N[None], use_cache=False, packed_layout=layout
        )
        hidden_NH = output.last_hidden_state[0]
        return hidden_NH if self.logit_scale == 1.0 else hidden_NH * self.logit_scale

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Compute (N, V) logits in float32 of last hidden states, at temperature 1."""
        return head_logits(hidden_NH, self.head_weight, self.head_bias, self.logit_softcap)

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode a prompt in plain text to token ids.

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
        """Return whether the tokenizer brings a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode_messages(self, messages: Sequence[Mapping[str, str]], thinking: bool | None = None) -> tuple[int, ...]:
        """Encode a chat to token ids by the tokenizer's chat template, ready for the assistant's turn.

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
        """Return the text each token of the vocabulary adds to a completion, special tokens as nothing.

        Read behind another token, since decoders drop the blank that a text begins with.
        """
        if self._token_texts is None:
            vocabulary = range(self.head_weight.shape[0])
            frame = next(
                i for i in vocabulary if _is_plain(self.decode([i])) and self.decode([i, i]) == 2 * self.decode([i])
            )
            ids = [[frame, i] for i in vocabulary]
            before = len(self.decode([frame]))
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            self._token_texts = [text[before:] for text in texts]
        return self._token_texts

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode a completion without its special tokens: for verifiers and logs only."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def show(self, token_ids: Sequence[int]) -> str:
        """Decode tokens with the special ones spelled out: what the model saw, for a person to read."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def fingerprint(self) -> str:
        """Return a name of the weights: a hash of all of them, with their names, shapes and precision."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def save(self, directory: Path) -> None:
        """Write an ordinary Hugging Face directory: safetensors, config and tokenizer; of an adapter, peft's layout."""
        with no_progress_bars():
            if self.adapter is None:
                self.model.save_pretrained(directory)
            else:
                self.adapter.save_pretrained(directory, save_embedding_layers=False)
                (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card
        self.tokenizer.save_pretrained(directory)


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and text != "" and " " not in text


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide transformers' bars for loading and saving: a run has a display of its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
