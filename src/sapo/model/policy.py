"""A policy: any Hugging Face decoder with its tokenizer, run on packed tokens.

The decoder is used through two doors only: `hidden`, packed token ids to last hidden states under a layout, and the
output embedding, which the policy head and the sampler multiply themselves. A forward pass of training goes through
both within one `run`. `load_policy` proves on a few tokens that the two together equal the model's own forward
(proof.py), so that a decoder with a step in between (a cap of its logits, say) is refused rather than trained wrongly.
A decoder that cannot run on packed tokens runs in rows (rows.py) behind the same doors.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from sapo.data import PackedPictures
from sapo.errors import ModelError
from sapo.model.attention import Layout
from sapo.model.blocks import use_closed_forms
from sapo.model.head import head_logits
from sapo.model.positions import fixed_length, longest_sequence
from sapo.model.products import use_best_products
from sapo.model.recurrent import chunk_tokens, use_states
from sapo.model.rows import hidden_of_rows
from sapo.model.texts import TextSide
from sapo.model.vision import Vision
from sapo.utils.files import open_to_readers

T = TypeVar("T")

_NOISE = re.compile(r"drop(out|path|_prob|_path)?(_p|_prob|_rate)?$|dropout|pdrop|layerdrop|jitter|router_noise")
"""Names of what a model draws at random in training mode."""
_DECIDES = ("PhimoeTopKRouter",)
"""Classes whose number of such a name also decides without drawing: Phi-MoE takes experts within it of the best."""

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of the cap of a model's logits."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class _AtRest:
    """Recompute a block for transformers as it would, but with the block out of training mode meanwhile."""

    block: Any
    recompute: Callable[..., Any]

    def __call__(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        return self.recompute(self._forward, forward, *inputs)

    def _forward(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        before, self.block.training = self.block.training, False
        try:
            return forward(*inputs)
        finally:
            self.block.training = before


class Policy(TextSide):
    """A decoder and its tokenizer.

    Args:
        model: a transformers decoder whose attention implementation is `ATTENTION_NAME`.
        tokenizer: its tokenizer; the end-of-sequence token stops a completion.
        source: where the model came from, for what has to name it.
        vision: what encodes pictures; None for a model of text alone.
    """

    def __init__(self, model: Any, tokenizer: Any, source: str = "", vision: Vision | None = None) -> None:
        super().__init__(model, tokenizer)
        self.vision = vision
        self.source = source
        self.revision: str | None = None
        self.adapter: Any = None
        """The peft model around `model` when only an adapter is trained (model/adapters.py); None otherwise."""
        self.decoder: nn.Module = decoder_of_model(model)
        self.path: Literal["packed", "rows"] = "packed"
        """Layout the decoder runs in: all tokens packed, or one padded row for each sequence."""
        self.path_reason: str | None = None
        """Reason why it runs in rows; None where it runs packed."""
        self.own_attention = "sdpa"
        """The attention of transformers that the model computes by itself with."""
        self.engine_paths: dict[str, str | None] = {}
        """Ways to decode that were tried on this policy -> what was wrong with it, None where nothing was."""
        self.is_built_elsewhere = False
        """True for a copy of a policy of another process, which has made the proofs already."""
        self.notices: list[str] = []
        """Sentences that a person should read about the model before it is trained."""
        self.sharded: dict[str, torch.dtype] | None = None
        """Precision of each parameter before the weights were sharded (model/sharding.py); None where they are not."""
        self._unused_K: Tensor | None = None
        self.unused_tokens = self._tokens_without_text()
        self.make_deterministic()

    def make_deterministic(self) -> None:
        """Make the model the same function in rollout and in training: dropout would make r != 1 on policy."""
        for module in self.model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
            for name, value in vars(module).items():  # of functional dropout, of layers left out, of a router's noise
                if type(module).__name__ in _DECIDES:
                    continue
                if _NOISE.search(name) and isinstance(value, float) and value:
                    setattr(module, name, 0.0)
        use_best_products(self.model)
        use_closed_forms(self.model)
        use_states(self.decoder)
        self.model.eval()

    def enable_checkpointing(self) -> None:
        """Make the blocks ready to be recomputed in backward passes, which `checkpoint_activations` switches."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        # Its hook on the embedding is for reentrant checkpoints; an engine's fast forward takes no model with hooks.
        self.model.disable_input_require_grads()

    def checkpoint_activations(self, on: bool) -> None:
        """Have the blocks recomputed in the backward pass, or not. transformers does so in training mode only.

        Only the modules that recompute are put in that mode, and are out of it while they compute: whatever draws at
        random in it, by its own mode or that of a module within, stays off.
        """
        self.model.eval()
        if on:
            for module in self.model.modules():
                module.training = bool(getattr(module, "gradient_checkpointing", False))
                recompute = getattr(module, "_gradient_checkpointing_func", None)
                if module.training and recompute is not None and not isinstance(recompute, _AtRest):
                    module._gradient_checkpointing_func = _AtRest(module, recompute)

    @property
    def head_bias(self) -> Tensor | None:
        """Return the (V,) bias of the output embedding, None when it has none."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def unused_tokens(self) -> tuple[int, ...]:
        """Return the ids of the output embedding's rows that the tokenizer has no token for.

        Embeddings are often padded to a round number of rows. The policy is the model's distribution over all other
        tokens, in rollout and in training alike: such an id has no text that a verifier could judge. An id that ends
        completions by the generation config needs no text.
        """
        return self._unused_tokens

    @unused_tokens.setter
    def unused_tokens(self, ids: Sequence[int]) -> None:
        self._unused_tokens = tuple(ids)
        self._unused_K = None

    def _tokens_without_text(self) -> tuple[int, ...]:
        if self.tokenizer is None:
            return ()
        used = {*self.tokenizer.get_vocab().values(), *getattr(self.tokenizer, "added_tokens_decoder", {})}
        used |= self.stop_token_ids
        return tuple(i for i in range(self.head_weight.shape[0]) if i not in used)

    @property
    def unused_K(self) -> Tensor | None:
        """Return `unused_tokens` on the device of the weights; None where there are none."""
        if self._unused_tokens and (self._unused_K is None or self._unused_K.device != self.device):
            self._unused_K = torch.tensor(self._unused_tokens, device=self.device)
        return self._unused_K

    @property
    def logit_softcap(self) -> float | None:
        """Return c of a model whose logits are c tanh(x / c) (Gemma 2, RecurrentGemma, xLSTM)."""
        config = self.model.config.get_text_config()
        return next((cap for name in _CAPS if (cap := getattr(config, name, None))), None)

    @property
    def logit_scale(self) -> float:
        """Return the factor of the model's logits: 1 for most, not for Granite and Cohere."""
        config = self.model.config.get_text_config()
        divided = getattr(config, "logits_scaling", None) or getattr(config, "logits_mup_width_multiplier", None)
        return getattr(config, "logit_scale", None) or 1.0 / (divided or 1.0)

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
        """Return the longest sequence the model takes, None when its config does not say; see positions.py."""
        return longest_sequence(self.model.config.get_text_config())

    @property
    def chunk_tokens(self) -> int:
        """Return the tokens that its recurrent layers scan at once; 0 for a decoder without such layers."""
        return chunk_tokens(self.decoder)

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

    def hidden(
        self, token_ids_N: Tensor, position_ids_N: Tensor, layout: Layout, pictures: PackedPictures | None = None
    ) -> Tensor:
        """Compute (N, H) last hidden states of packed tokens, times `logit_scale`, for the head to use as they are.

        Called within `run`.

        Args:
            position_ids_N: (N,), or (3, N) for a rotary embedding of three positions.
            pictures: what some of the tokens stand for.
        """
        self._check_extent(position_ids_N)
        if self.path == "rows":
            assert pictures is None, "a policy that runs in rows has no pictures"
            hidden_NH = hidden_of_rows(self.decoder, token_ids_N, layout)
            return hidden_NH if self.logit_scale == 1.0 else hidden_NH * self.logit_scale
        layout.calls.clear()
        inputs: dict[str, Any] = {"input_ids": token_ids_N[None]}
        if pictures is not None:
            assert self.vision is not None, "pictures were given to a policy of text alone"
            inputs = self.vision.embed(token_ids_N, pictures)
        position_ids = position_ids_N[None] if position_ids_N.ndim == 1 else position_ids_N[:, None]
        output = self.decoder(**inputs, position_ids=position_ids, use_cache=False, packed_layout=layout)
        hidden_NH = output.last_hidden_state[0]
        if self.vision is not None:
            hidden_NH = self.vision.reach(hidden_NH)
        return hidden_NH if self.logit_scale == 1.0 else hidden_NH * self.logit_scale

    def _check_extent(self, position_ids_N: Tensor) -> None:
        """Refuse a forward whose longest row would change the rotary embedding of all others.

        Raises:
            ModelError: it holds such a row.
        """
        limit = fixed_length(self.model.config.get_text_config())
        if limit is not None and position_ids_N.device.type != "meta" and int(position_ids_N.max()) >= limit[0]:
            raise ModelError(
                f"a sequence must have at most {limit[0]} tokens in a model of {limit[1]} rotary embeddings, which "
                f"turn every token of a longer one otherwise; got {int(position_ids_N.max()) + 1}; shorten the prompt "
                "or rollout.max_new_tokens"
            )

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Compute (N, V) logits in float32 of last hidden states, at temperature 1, those of unused tokens too."""
        return head_logits(hidden_NH, self.head_weight, self.head_bias, self.logit_softcap)

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
                _sort_targets(directory / "adapter_config.json")
        if self.vision is not None:
            self.vision.save(directory)
        self.tokenizer.save_pretrained(directory)
        open_to_readers(directory)


def decoder_of_model(model: Any) -> nn.Module:
    """Return the part of a model that maps token ids to last hidden states."""
    decoder: nn.Module = model.get_decoder()
    takes_ids = "input_ids" in inspect.signature(decoder.forward).parameters
    if decoder is model or not takes_ids:  # Llama 4, or a head that is called decoder (ModernBERT)
        decoder = getattr(model, model.base_model_prefix, None) or model.model
    return decoder


def _sort_targets(file: Path) -> None:
    """Write the layers that an adapter is of in order: peft keeps a set, whose order is another in each process."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            settings[name] = sorted(value)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


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
