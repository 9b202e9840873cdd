"""The policy head: from hidden states to log pi and, in the same pass, to the gradient of the loss.

An objective knows d loss / d log pi of each token in closed form, so no autograd graph runs through the vocabulary.
For one chunk of tokens at a time: logits, log pi, the coefficient c = d loss / d log pi, then
d logits = c (onehot(y) - p) / temperature, d hidden and d weight by two matrix products. Never more than one chunk of
logits exists. `tests/model/test_head.py` holds value and gradient against autograd in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Logits of one chunk in elements: 8 Mi of float32 are 32 MiB.
CHUNK_ELEMENTS = 8 * 2**20

LossAndCoefficient = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(log pi of a chunk, which tokens they are) -> (the chunk's part of the loss, d loss / d log pi of each token)."""


def chunk_tokens(vocabulary: int) -> int:
    """Tokens per chunk so that its logits stay within CHUNK_ELEMENTS.

    >>> chunk_tokens(49152), chunk_tokens(19)
    (170, 65536)
    """
    return max(16, min(65536, CHUNK_ELEMENTS // vocabulary))


@dataclass(frozen=True)
class HeadOutput:
    """What the head says of M response tokens."""

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
    entropy: bool = False,
    chunk: int | None = None,
) -> HeadOutput:
    """Loss of M tokens whose gradient never holds more than one chunk of logits.

    Args:
        hidden_MH: last hidden state at the position that predicts each token.
        weight_VH: the output embedding; `bias_V` its bias, if it has one.
        target_M: the sampled tokens.
        loss_and_coefficient: the objective, called once per chunk (it is not differentiated).
        temperature: the logits are divided by it, as in sampling.
        softcap: c of a model whose logits are c tanh(x / c), Gemma 2's, before the temperature.
        entropy: also return the entropy of each token's distribution.
        chunk: tokens per chunk; chosen from the vocabulary when None.
    """
    size = chunk or chunk_tokens(weight_VH.shape[0])
    loss, logprob_M, entropy_M = _PolicyHead.apply(
        hidden_MH, weight_VH, bias_V, target_M, loss_and_coefficient, temperature, softcap, entropy, size
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
    chunk: int | None = None,
) -> Tensor:
    """(M,) log pi of the targets, one chunk of logits at a time, without gradient."""
    size = chunk or chunk_tokens(weight_VH.shape[0])
    parts = []
    for at in _chunks(target_M.shape[0], size):
        logits = head_logits(hidden_MH[at], weight_VH, bias_V, softcap).div_(temperature)
        parts.append(_pick(logits, target_M[at]) - torch.logsumexp(logits, dim=-1))
    return torch.cat(parts) if parts else hidden_MH.new_zeros(0, dtype=_wide(hidden_MH.dtype))


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
        entropy: bool,
        size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = _wide(hidden_MH.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_MH) if needs_hidden else None
        # Accumulated over chunks, hence in float32 even where the model computes in bfloat16.
        grad_weight = torch.zeros_like(weight_VH, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if needs_bias and bias_V is not None else None
        loss = hidden_MH.new_zeros((), dtype=wide)
        logprob_M = hidden_MH.new_empty(target_M.shape, dtype=wide)
        entropy_M = torch.empty_like(logprob_M) if entropy else logprob_M.new_empty(0)
        for at in _chunks(target_M.shape[0], size):
            target = target_M[at]
            logits = head_logits(hidden_MH[at], weight_VH, bias_V, softcap)
            # d capped / d raw = 1 - (capped / c)^2
            steepness = None if softcap is None else 1 - (logits / softcap).square_()
            logits.div_(temperature)
            log_normalizer = torch.logsumexp(logits, dim=-1)
            logprob_M[at] = _pick(logits, target) - log_normalizer
            part, coefficient = loss_and_coefficient(logprob_M[at], at)
            loss += part.to(wide)
            probability = logits.sub_(log_normalizer[:, None]).exp_()  # the logits are not needed again
            if entropy:
                # -sum p log p, with 0 log 0 = 0
                entropy_M[at] = -torch.special.xlogy(probability, probability).sum(-1)
            if needs_hidden or needs_weight or needs_bias:
                scaled = (coefficient.to(wide) / temperature)[:, None]
                grad_logits = probability.mul_(-scaled)
                grad_logits.scatter_add_(1, target[:, None], scaled)
                if steepness is not None:
                    grad_logits.mul_(steepness)
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
                narrow = grad_logits.to(weight_VH.dtype)
                if grad_hidden is not None:
                    torch.mm(narrow, weight_VH, out=grad_hidden[at])
                if grad_weight is not None:
                    if narrow.dtype == wide:
                        grad_weight.addmm_(narrow.t(), hidden_MH[at])
                    else:
                        grad_weight += (narrow.t() @ hidden_MH[at]).to(wide)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
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
            *(None,) * 6,
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_logits(hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """(M, V) logits in float32 (float64 for a float64 model), at temperature 1; the caller may overwrite them."""
    logits = torch.nn.functional.linear(hidden_MH, weight_VH, bias_V).to(_wide(hidden_MH.dtype))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _pick(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None])[:, 0]


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
