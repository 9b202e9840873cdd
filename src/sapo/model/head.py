"""The policy head: from hidden states to log pi and, in the same pass, to the gradient of the loss.

An objective knows d loss / d log pi of each token in closed form, so no autograd graph runs through the vocabulary.
For one chunk of tokens at a time: logits, log pi, the coefficient c = d loss / d log pi, then, of
d logits = c (onehot(y) - p) / temperature,

    d hidden = c / temperature (W_y - p W)        d W = sum over tokens of c / temperature (onehot(y) - p) hidden^T

so that c scales rows of hidden states and never the logits, and onehot(y) is a row of W looked up or added to. Never
more than one chunk of logits exists; a few rows of it at a time, as many as a cache holds, are made into probabilities
in place. On a GPU a chunk is larger and computed whole (gpu_head.py).

`tests/model/test_head.py` holds value and gradient against autograd in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapo.model import gpu_head
from sapo.model.gpu_head import Distribution
from sapo.model.products import add_outer_sum, add_wide_product, linear, product, wide_product

# Logits of one chunk: 24 MiB, in the model's own precision. Each chunk reads and writes the gradient of the output
# embedding once, so that a chunk below MIN_CHUNK tokens would wait for memory; above it, more gain little.
CHUNK_BYTES = 24 * 2**20
MIN_CHUNK = 96

# Logits that are made into probabilities together, twice over in float32 beside the chunk: 1 MiB is in the cache.
BLOCK_ELEMENTS = 2**18

LossAndCoefficient = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(log pi of a chunk, which tokens they are) -> (the chunk's part of the loss, d loss / d log pi of each token)."""


def chunk_tokens(vocabulary: int, itemsize: int = 4) -> int:
    """Return the tokens of a chunk: its logits stay within CHUNK_BYTES, but it has MIN_CHUNK at least.

    Args:
        itemsize: bytes of an element of the model's precision.

    >>> chunk_tokens(49152), chunk_tokens(49152, itemsize=2), chunk_tokens(151936), chunk_tokens(19)
    (128, 256, 96, 65536)
    """
    return max(MIN_CHUNK, min(65536, CHUNK_BYTES // (vocabulary * itemsize)))


@dataclass(frozen=True)
class HeadOutput:
    """Hold what the head computes of M response tokens."""

    loss: Tensor
    """Scalar; backward() through it reaches the hidden states and the head's weights."""
    logprob_M: Tensor
    """log pi(y) at the temperature, detached, float32 (float64 for a float64 model)."""
    entropy_M: Tensor | None
    """Entropy in nats of the distribution at each token, detached, when asked for."""


def policy_head(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    target_M: Tensor,
    loss_and_coefficient: LossAndCoefficient,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    unused_K: Tensor | None = None,
    entropy: bool = False,
    chunk: int | None = None,
) -> HeadOutput:
    """Compute the loss of M tokens; its gradient never holds more than one chunk of logits.

    Args:
        hidden_MH: last hidden state at the position that predicts each token.
        weight_VH: the output embedding; `bias_V` its bias, if it has one.
        target_M: the sampled tokens.
        loss_and_coefficient: the objective, called once per chunk (it is not differentiated).
        temperature: the logits are divided by it, as in sampling.
        softcap: c of a model whose logits are c tanh(x / c), Gemma 2's, before the temperature.
        unused_K: token ids that no distribution includes; none of the targets.
        entropy: also return the entropy of each token's distribution.
        chunk: tokens per chunk; chosen from the vocabulary when None.
    """
    size = chunk or _chunk_on(weight_VH)
    loss, logprob_M, entropy_M = _PolicyHead.apply(
        hidden_MH, weight_VH, bias_V, target_M, loss_and_coefficient, temperature, softcap, unused_K, entropy, size
    )
    return HeadOutput(loss, logprob_M, entropy_M if entropy else None)


@torch.no_grad()
def token_logprobs(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    target_M: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    unused_K: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Compute (M,) log pi of the targets, one chunk of logits at a time, without gradient; see `policy_head`."""
    size = chunk or _chunk_on(weight_VH)
    shape = _Shape(temperature, softcap, unused_K, entropy=False, gradient=False)
    logprob_M = hidden_MH.new_empty(target_M.shape, dtype=_wide(hidden_MH.dtype))
    whole = gpu_head.takes_whole_chunks(weight_VH.device)
    for at in _chunks(target_M.shape[0], size):
        if whole:
            logprob_M[at] = _distribution(hidden_MH[at], weight_VH, target_M[at], bias_V, shape).logprob_M
            continue
        logits = linear(hidden_MH[at], weight_VH)
        logprob_M[at] = _normalize(logits, target_M[at], bias_V, shape).logprob
    return logprob_M


def _chunk_on(weight_VH: Tensor) -> int:
    if gpu_head.takes_whole_chunks(weight_VH.device):
        return gpu_head.chunk_tokens(weight_VH.shape[0])
    return chunk_tokens(weight_VH.shape[0], weight_VH.element_size())


class _PolicyHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_M: Tensor,
        loss_and_coefficient: LossAndCoefficient,
        temperature: float,
        softcap: float | None,
        unused_K: Tensor | None,
        entropy: bool,
        size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = _wide(hidden_MH.dtype)
        gradients = _Gradients(ctx.needs_input_grad[:3], hidden_MH, weight_VH, bias_V)
        shape = _Shape(temperature, softcap, unused_K, entropy, any(ctx.needs_input_grad[:3]))
        loss = hidden_MH.new_zeros((), dtype=wide)
        logprob_M = hidden_MH.new_empty(target_M.shape, dtype=wide)
        entropy_M = torch.empty_like(logprob_M) if entropy else logprob_M.new_empty(0)
        whole = gpu_head.takes_whole_chunks(weight_VH.device)
        for at in _chunks(target_M.shape[0], size):
            if whole:
                found = _distribution(hidden_MH[at], weight_VH, target_M[at], bias_V, shape)
                logprob_M[at] = found.logprob_M
                if found.entropy_M is not None:
                    entropy_M[at] = found.entropy_M
                part, coefficient = loss_and_coefficient(logprob_M[at], at)
                loss += part.to(wide)
                if shape.gradient:
                    gradients.add_whole(at, found, target_M[at], coefficient.to(wide) / temperature)
                del found
                continue
            logits = linear(hidden_MH[at], weight_VH)
            chunk = _normalize(logits, target_M[at], bias_V, shape)
            logprob_M[at] = chunk.logprob
            if entropy:
                entropy_M[at] = chunk.entropy
            part, coefficient = loss_and_coefficient(logprob_M[at], at)
            loss += part.to(wide)
            if shape.gradient:
                gradients.add(at, logits, target_M[at], coefficient.to(wide) / temperature, chunk.steepness)
            del logits  # or the next chunk's would stand beside them
        ctx.grads = gradients.finished()
        ctx.dtypes = (weight_VH.dtype, bias_V.dtype if bias_V is not None else None)
        ctx.mark_non_differentiable(logprob_M, entropy_M)
        return loss, logprob_M, entropy_M

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the policy head's loss was differentiated twice; its gradients are given away once")
        # Given away and scaled in place: a second tensor of the size of the output embedding would be the peak of the
        # whole update.
        (grad_hidden, grad_weight, grad_bias), ctx.grads = ctx.grads, None
        scale = grad_outputs[0]
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale.to(grad_hidden.dtype)),
            None if grad_weight is None else grad_weight.mul_(scale).to(weight_dtype),
            None if grad_bias is None else grad_bias.mul_(scale).to(bias_dtype),
            *(None,) * 7,
        )


class _Gradients:
    """Add up the gradients of the chunks: d loss / d hidden states, weight and bias, those that are needed."""

    def __init__(self, needs: Sequence[bool], hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> None:
        needs_hidden, needs_weight, needs_bias = needs
        wide = _wide(hidden_MH.dtype)
        self.inputs = (hidden_MH, weight_VH)
        self.hidden = torch.empty_like(hidden_MH) if needs_hidden else None
        # Accumulated over chunks, hence in float32 even where the model computes in bfloat16.
        self.weight = torch.empty_like(weight_VH, dtype=wide) if needs_weight else None
        self.bias = torch.zeros_like(bias_V, dtype=wide) if needs_bias and bias_V is not None else None
        self.fresh = True

    def add(
        self, at: slice, probability: Tensor, target: Tensor, coefficient: Tensor, steepness: Tensor | None
    ) -> None:
        """Add a chunk's share.

        Args:
            probability: (m, V) p, times the steepness of each logit where logits are capped; in the model's dtype.
            coefficient: (m,) c / temperature.
            steepness: (m,) of the target's logit.
        """
        hidden_MH, weight_VH = self.inputs
        at_target = coefficient if steepness is None else coefficient * steepness
        if self.hidden is not None:
            expected = product(probability, weight_VH).to(coefficient.dtype).mul_(-coefficient[:, None])
            self.hidden[at] = expected.addcmul_(weight_VH[target].to(coefficient.dtype), at_target[:, None])
        if self.weight is not None:
            scaled = hidden_MH[at] * -coefficient[:, None]
            add_outer_sum(self.weight, probability, scaled.to(probability.dtype), fresh=self.fresh)
            self.weight.index_add_(0, target, hidden_MH[at] * at_target[:, None])
        if self.bias is not None:
            self.bias -= (probability.to(coefficient.dtype).t() @ coefficient[:, None])[:, 0]
            self.bias.index_add_(0, target, at_target)
        self.fresh = False

    def add_whole(self, at: slice, found: Distribution, target: Tensor, coefficient: Tensor) -> None:
        """Add the share of a chunk on a GPU; `coefficient` is c / temperature."""
        hidden_MH, weight_VH = self.inputs
        slope_MV = gpu_head.slopes(found, target, coefficient, hidden_MH.dtype)
        if self.hidden is not None:
            self.hidden[at] = product(slope_MV, weight_VH)
        if self.weight is not None:
            add_wide_product(self.weight, slope_MV.t(), hidden_MH[at], fresh=self.fresh)
        if self.bias is not None:
            self.bias += slope_MV.sum(0, dtype=self.bias.dtype)
        self.fresh = False

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three gradients."""
        if self.fresh and self.weight is not None:  # there was no token
            self.weight.zero_()
        return self.hidden, self.weight, self.bias


@dataclass(frozen=True)
class _Shape:
    """Settings of a pass: how raw logits are transformed, and which figures are wanted of them."""

    temperature: float
    softcap: float | None
    unused_K: Tensor | None
    entropy: bool
    gradient: bool


@dataclass(frozen=True)
class _Normalized:
    """Hold the figures of each token of a chunk."""

    logprob: Tensor
    entropy: Tensor
    """Entropy in nats; empty unless asked for."""
    steepness: Tensor | None
    """d capped / d raw of the target's logit."""


def _distribution(
    hidden_MH: Tensor, weight_VH: Tensor, target_M: Tensor, bias_V: Tensor | None, shape: _Shape
) -> Distribution:
    """Compute a whole chunk's distributions on a GPU."""
    return gpu_head.distribution(
        wide_product(hidden_MH, weight_VH.t()),
        target_M,
        bias_V,
        temperature=shape.temperature,
        softcap=shape.softcap,
        unused_K=shape.unused_K,
        entropy=shape.entropy,
        gradient=shape.gradient,
    )


def _normalize(logits_MV: Tensor, target_M: Tensor, bias_V: Tensor | None, shape: _Shape) -> _Normalized:
    """Compute log pi and entropy of a chunk of raw logits, which become probabilities in place for a gradient.

    A block of rows at a time, so that all passes but the first and the last are over what a cache holds.
    """
    wide = _wide(logits_MV.dtype)
    num_tokens, vocabulary = logits_MV.shape
    rows = max(1, min(num_tokens, BLOCK_ELEMENTS // vocabulary))
    work = logits_MV.new_empty(rows, vocabulary, dtype=wide)
    logprob, entropy, steepness = (logits_MV.new_empty(num_tokens, dtype=wide) for _ in range(3))
    for at in _chunks(num_tokens, rows):
        block, target = logits_MV[at].to(wide), target_M[at]  # itself where it is wide already: changed in place
        if bias_V is not None:
            block.add_(bias_V)
        slope = None
        if shape.softcap is not None:
            block.div_(shape.softcap).tanh_()
            slope = 1 - block.square()  # d capped / d raw
            steepness[at] = _pick(slope, target)
            block.mul_(shape.softcap)
        if shape.temperature != 1.0:
            block.div_(shape.temperature)
        if shape.unused_K is not None:
            block.index_fill_(1, shape.unused_K, torch.finfo(wide).min)  # not -inf: 0 times it is NaN in the entropy
        block.sub_(block.amax(-1, keepdim=True))
        if bias_V is not None:  # of -inf, 0 times it would make the entropy NaN
            block.clamp_(min=torch.finfo(wide).min)
        probability = torch.softmax(block, -1, out=work[: block.shape[0]])
        # The greatest logit is 0 now, so its probability is 1 over the sum of exponentials.
        log_sum = -probability.amax(-1).log()
        logprob[at] = _pick(block, target) - log_sum
        if shape.entropy:
            # -sum p log p = log sum - sum p logit
            entropy[at] = log_sum - torch.linalg.vecdot(probability, block)
        if shape.gradient:
            logits_MV[at] = probability if slope is None else probability.mul_(slope)
    return _Normalized(logprob, entropy if shape.entropy else entropy[:0], steepness if shape.softcap else None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_logits(hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """Compute (M, V) logits at temperature 1, float32 (float64 for a float64 model); the caller may overwrite them."""
    if gpu_head.takes_whole_chunks(weight_VH.device) and not torch.is_grad_enabled():
        logits = wide_product(hidden_MH, weight_VH.t())
        if bias_V is not None:
            logits.add_(bias_V)
    else:
        logits = linear(hidden_MH, weight_VH, bias_V).to(_wide(hidden_MH.dtype))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _pick(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None])[:, 0]


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
