"""The proof, when a policy is loaded, that its forward computes what the model's own does.

A prompt and two responses to it go through the model one after the other, and through the policy together. Three
questions are asked. Does one response flow into the other? It is exchanged, and the rest has to stay the same, to the
bit or, where kernels round otherwise (the experts of a mixture), with a derivative that is exactly zero. Are the
log-probabilities those of the model? Are the logits made of the last hidden states by the output embedding alone?

The sequences are longer than every window, chunk and top-k of keys that the config names. Those of more than `WIDEST`
tokens are narrowed for the time of the proof, in the model and the policy alike, so that it takes no longer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sapo.data import Segment
from sapo.errors import ModelError
from sapo.model.attention import TreeLayout
from sapo.model.policy import Policy, decoder_of_model
from sapo.model.rows import last_hidden, row_index
from sapo.utils.faults import is_bug_of_ours
from sapo.utils.text import first_line

PROMPT, RESPONSES = 12, (8, 3)
WIDEST = 64
"""Tokens of the widest window that the proof goes beyond as it is."""
NARROWED = 8

_REACH = re.compile(
    r"^(sliding_windows?|sliding_window_size|window_size|attention_window(_size)?|attention_chunk_size|index_topk|"
    r"local_attention|local_window_size)$"
)
"""Names of the tokens that a layer looks back to."""
_BLOCKS = ("topk_blocks", "block_size")
"""Names of an indexer that keeps whole blocks of keys (MiniMax M3), and the tokens of one."""
FEW_BLOCKS = 2

TOLERANCES = {torch.bfloat16: 0.25, torch.float16: 0.25}
"""Bfloat16 keeps 8 bits: two orders of summation differ by several hundredths in log-probability."""
TOLERANCE = 1e-3
NOTABLE = 1e-4
"""A difference in float32 that is more than rounding usually makes."""


@dataclass(frozen=True)
class Probe:
    """The tokens of the proof, packed: a prompt and its responses."""

    ids_N: Tensor
    exchanged_N: Tensor
    """(N,) the same tokens with another first response."""
    segments: tuple[Segment, ...]
    positions_N: Tensor

    @property
    def paths(self) -> list[list[int]]:
        """Return the packed positions of the prompt followed by each response."""
        prompt = list(range(self.segments[0].length))
        return [[*prompt, *range(s.start, s.stop)] for s in self.segments[1:]]

    @property
    def first(self) -> Tensor:
        """Return (N,) bool: the tokens of the first response."""
        at_N = torch.arange(len(self.ids_N), device=self.ids_N.device)
        return (at_N >= self.segments[1].start) & (at_N < self.segments[1].stop)

    def layout(self) -> TreeLayout:
        """Make the layout of the tree."""
        return TreeLayout(self.segments, self.ids_N.device)


@dataclass(frozen=True)
class OwnForward:
    """Hold what the model's own forward computes of the probe."""

    probe: Probe
    logprobs: Tensor
    """(tokens of both sequences, V), float32."""
    logits: Tensor
    """(tokens of both sequences, V) logits, before they were normalized."""
    hidden: Tensor | None
    """(tokens of both sequences, H) last hidden states of the decoder; None where it was not seen to give them."""


def reaches(model: nn.Module) -> Iterator[tuple[Any, str, int]]:
    """Yield (object, name, tokens) of every window, chunk and top-k of keys that a decoder's settings name."""
    seen: set[int] = set()
    for module in decoder_of_model(model).modules():  # a vision tower has windows of its own
        for owner in (module, getattr(module, "config", None)):
            if owner is None or id(owner) in seen:
                continue
            seen.add(id(owner))
            for name, value in list(vars(owner).items()):
                blocks = name in _BLOCKS and hasattr(owner, _BLOCKS[0])
                if (blocks or _REACH.match(name)) and type(value) is int and value > 0:
                    yield owner, name, value


@contextmanager
def within_reach(model: nn.Module) -> Iterator[int]:
    """Narrow what reaches further than `WIDEST` tokens; give the tokens of the widest that there is then."""
    kept: list[tuple[Any, str, int]] = []
    widest = 0
    try:
        for owner, name, tokens in list(reaches(model)):
            in_blocks = name in _BLOCKS
            narrow = min(tokens, FEW_BLOCKS) if in_blocks else tokens if tokens <= WIDEST else NARROWED
            if narrow < tokens:
                kept.append((owner, name, tokens))
                setattr(owner, name, narrow)
            widest = max(widest, FEW_BLOCKS**2 if in_blocks else narrow)
        yield widest
    finally:
        for owner, name, tokens in kept:
            setattr(owner, name, tokens)


def make_probe(model: Any, tokenizer: Any, widest: int, most: int | None) -> Probe:
    """Draw the tokens of a proof.

    Args:
        widest: tokens that a layer looks back to; the prompt is longer.
        most: the longest sequence that the model takes.
    """
    room = max(RESPONSES) if most is None else min(max(RESPONSES), max(1, most // 2))
    lengths = [min(n, room) for n in RESPONSES]
    prompt = max(PROMPT, widest + 4)
    if most is not None:
        prompt = max(1, min(prompt, most - room))
    words = _words(model, tokenizer)
    total = prompt + sum(lengths)
    drawn = torch.randint(len(words), (total,), generator=torch.Generator().manual_seed(0))
    segments, positions, start = [Segment(0, prompt, -1)], list(range(prompt)), prompt
    for length in lengths:
        segments.append(Segment(start, length, 0))
        positions += range(prompt, prompt + length)
        start += length
    other = drawn.clone()
    other[prompt : prompt + lengths[0]] = (other[prompt : prompt + lengths[0]] + 1) % len(words)
    ids, exchanged = (torch.tensor([words[i] for i in t.tolist()], device=model.device) for t in (drawn, other))
    return Probe(ids, exchanged, tuple(segments), torch.tensor(positions, device=model.device))


def _words(model: Any, tokenizer: Any) -> list[int]:
    """Return token ids that mean nothing to the model beside themselves, or all where there are none."""
    rows = model.get_output_embeddings().weight.shape[0]
    settings = (model.config, model.config.get_text_config())
    named = [v for config in settings for name, v in vars(config).items() if "token_id" in name]
    special = {i for v in named for i in (v if isinstance(v, list | tuple) else [v]) if isinstance(i, int)}
    special |= set(getattr(tokenizer, "all_special_ids", ()))
    return [i for i in range(rows) if i not in special] or list(range(rows))


@torch.no_grad()
def own_forward(model: Any, probe: Probe) -> OwnForward:
    """Run the model's own forward on both sequences of a probe, one after the other.

    Raises:
        ModelError: it cannot be run, or what it gives is not finite.
    """
    found: list[Tensor] = []
    handle = decoder_of_model(model).register_forward_hook(lambda _, __, output: found.append(last_hidden(output)))
    try:
        logits = [model(input_ids=probe.ids_N[path][None], use_cache=False).logits[0] for path in probe.paths]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot compute a sequence of text: {first_line(error)}") from error
    finally:
        handle.remove()
    together = torch.cat(logits).float()
    if not torch.isfinite(together).all():
        raise ModelError(_not_finite(model))
    hidden = torch.cat([h[0] for h in found]) if len(found) == len(logits) else None
    return OwnForward(probe, torch.log_softmax(together, dim=-1), together, hidden)


def _not_finite(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            wrong = int((~torch.isfinite(parameter)).sum())
            return (
                f"the weights must be finite numbers; got {wrong} of {parameter.numel()} of {name} that are NaN or "
                "infinite; take the weights from where they came again"
            )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return (
        f"{type(model).__name__} gives log-probabilities that are not finite although its weights are; in {dtype} it "
        "overflows; load it in float32 (model.dtype=float32)"
    )


@torch.no_grad()
def check_head(policy: Policy, own: OwnForward) -> None:
    """Refuse a model that does something between its last hidden states and its logits that the policy head does not.

    Raises:
        ModelError: it does.
    """
    if own.hidden is None:
        return
    gap = (policy.logits(own.hidden * policy.logit_scale).float() - own.logits).abs().max().item()
    largest = max(1.0, own.logits.abs().max().item())
    tolerance = largest * (2**-6 if policy.dtype in TOLERANCES else 1e-4)
    if not gap <= tolerance:
        raise ModelError(
            f"{type(policy.model).__name__} does something between its last hidden states and its logits that the "
            f"policy head does not (another scale, cap or layer): logits differ by up to {gap:.3g} (allowed "
            f"{tolerance:.2g}); take a model of another family"
        )


def fault_of(policy: Policy, own: OwnForward) -> str | None:
    """Return why a policy's forward is not the model's own; None where it is.

    A difference in float32 that is small and yet more than rounding makes is noted in `policy.notices`.
    """
    probe = own.probe
    layout, packed = probe.layout(), policy.path == "packed"
    try:
        with torch.no_grad():
            hidden_NH, exchanged_NH = (
                policy.run(partial(policy.hidden, ids_N, probe.positions_N, layout))
                for ids_N in (probe.ids_N, probe.exchanged_N)
            )
        fault = _leak(policy, probe, hidden_NH, exchanged_NH) or _difference(policy, own, hidden_NH)
        if fault is not None and packed and not layout.was_asked:
            return (
                "its layers do not go through transformers' interface of attention (attention of their own, or states "
                "alone)"
            )
        return fault
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if is_bug_of_ours(error):
            raise
        line = first_line(error) or type(error).__name__
        return f"its forward fails {'on packed tokens, which come without a mask' if packed else 'in rows'} ({line})"


@torch.no_grad()
def _difference(policy: Policy, own: OwnForward, hidden_NH: Tensor) -> str | None:
    logits = policy.logits(hidden_NH)
    ours = torch.log_softmax(torch.cat([logits[path] for path in own.probe.paths]).float(), dim=-1)
    difference = (own.logprobs - ours).abs().max().item()
    tolerance = TOLERANCES.get(policy.dtype, TOLERANCE)
    if not difference <= tolerance:
        return f"log-probabilities differ by up to {difference:.3g} from the model's own (allowed {tolerance:g})"
    if policy.dtype not in TOLERANCES and difference > NOTABLE:
        policy.notices.append(
            f"{type(policy.model).__name__}: log-probabilities differ by up to {difference:.3g} from the model's own, "
            "more than the rounding of float32 usually makes"
        )
    return None


def _leak(policy: Policy, probe: Probe, before_NH: Tensor, after_NH: Tensor) -> str | None:
    """Return what to say of a response that another flows into; None where the rest does not depend on it."""
    rest = ~probe.first
    if torch.equal(before_NH[rest], after_NH[rest]) or not _depends(policy, probe):
        return None
    moved = (before_NH[rest] - after_NH[rest]).abs().max().item()
    return (
        "one response flows into another, as a state does that is carried from token to token (convolutions, linear "
        f"attention): with another first response the hidden states of the second move by up to {moved:.2g}"
    )


def _depends(policy: Policy, probe: Probe) -> bool:
    """Tell whether the rest has a derivative by the embeddings of the first response. It is no matter of size."""
    embedded: list[Tensor] = []

    def follow(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    layout, first = probe.layout(), probe.first
    if policy.path == "rows":  # whose embeddings are those of rows, one after the other
        first = first[torch.from_numpy(row_index(layout)).to(first.device)].flatten()
    layers = [m for m in policy.decoder.modules() if isinstance(m, nn.Embedding)]
    handles = [layer.register_forward_hook(follow) for layer in layers]
    try:
        with torch.enable_grad():
            hidden_NH = policy.run(lambda: policy.hidden(probe.ids_N, probe.positions_N, layout))
            rest = hidden_NH[~probe.first].float()
            weights = torch.linspace(0.5, 1.5, rest.numel(), device=rest.device).view_as(rest)
            gradients = torch.autograd.grad((rest * weights).sum(), embedded, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    found = [g for g in gradients if g is not None]
    by_token = [g.flatten(0, -2) for g in found if g.shape[:-1].numel() == len(first)]
    # Where the gradient cannot be told by token, nothing is proven.
    return not by_token or any(bool((g[first] != 0).any()) for g in by_token)
