"""The policy head as a GPU computes it, on a CPU: against autograd, and its kernels counted at a real vocabulary.

That a GPU gives products of 16-bit factors in float32 is taken for granted in the counts; tests marked gpu ask it.
"""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sapo.model import gpu_head, products
from sapo.model.head import policy_head, token_logprobs
from support.attention_cases import normal
from support.kernel_counts import KernelCount

M, H, V = 13, 6, 11
TARGET_M = torch.tensor([0, V - 1, 4, 4, 4, 0, 7, 2, 4, V - 1, 1, 9, 0])
OLD_M, FACTOR_M = normal(M, seed=7) - 2.5, normal(M, seed=8)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu_head, "takes_whole_chunks", lambda _device: True)


def objective(logprob, at=slice(None)):
    """A sum of factor * exp(log pi - old), its own derivative."""
    terms = FACTOR_M[at] * torch.exp(logprob.double() - OLD_M[at])
    return terms.sum(), terms


def inputs(dtype=torch.float64, biased=True):
    """Hidden states, head and bias."""
    shapes = ((M, H), (V, H), (V,)) if biased else ((M, H), (V, H))
    return [normal(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]


def run(tensors, **options):
    """The head's output, and the gradients of its inputs."""
    bias = tensors[2] if len(tensors) > 2 else None
    head = policy_head(*tensors[:2], TARGET_M, objective, bias_V=bias, entropy=True, **options)
    return head, torch.autograd.grad(head.loss, tensors)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [3, None])
def test_loss_logprob_entropy_and_gradients_equal_autograd_through_log_softmax(chunk, softcap, biased):
    tensors = inputs(biased=biased)
    head, found = run(tensors, temperature=0.7, softcap=softcap, chunk=chunk)
    logits_MV = tensors[0] @ tensors[1].T + (tensors[2] if biased else 0)
    logits_MV = logits_MV if softcap is None else softcap * torch.tanh(logits_MV / softcap)
    logp_MV = torch.log_softmax(logits_MV / 0.7, -1)
    loss, _ = objective(logp_MV[range(M), TARGET_M])
    close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
    close(head.loss, loss)
    close(head.logprob_M, logp_MV[range(M), TARGET_M].detach())
    close(head.entropy_M, -(logp_MV.exp() * logp_MV).sum(-1).detach())
    for ours, theirs in zip(found, torch.autograd.grad(loss, tensors), strict=True):
        close(ours, theirs)
    alone = token_logprobs(
        *tensors[:2], TARGET_M, bias_V=tensors[2] if biased else None, temperature=0.7, softcap=softcap, chunk=chunk
    )
    close(alone, head.logprob_M)


def test_unused_and_forbidden_tokens_leave_entropy_and_gradient_finite():
    hidden_MH, weight_VH, bias_V = inputs()
    forbidden_V = bias_V.detach().clone()
    forbidden_V[3] = -torch.inf
    unused_K = torch.tensor([5, 6])
    head = policy_head(
        hidden_MH, weight_VH, TARGET_M.masked_fill(TARGET_M == 3, 4), objective, bias_V=forbidden_V, unused_K=unused_K,
        entropy=True,
    )  # fmt: skip
    kept = [v for v in range(V) if v not in (3, 5, 6)]
    logp = torch.log_softmax(hidden_MH @ weight_VH[kept].T + bias_V[kept], -1)
    torch.testing.assert_close(head.entropy_M, -(logp.exp() * logp).sum(-1).detach(), rtol=0, atol=1e-12)
    head.loss.backward()
    assert bool(hidden_MH.grad.isfinite().all())
    assert bool((weight_VH.grad[[3, 5, 6]] == 0).all())


def test_bfloat16_keeps_logits_and_sums_in_float32():
    # Both from the same rounded values. Logits are exact here where those of head.py are rounded to 8 bits, so
    # log pi is that of float32 to its own rounding; the gradient is rounded once more, to 8 bits.
    narrow = inputs(torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in narrow]
    (ours, grads), (theirs, expected) = (run(x, temperature=0.7, chunk=5) for x in (narrow, wide))
    torch.testing.assert_close(ours.logprob_M, theirs.logprob_M, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.cosine_similarity(a.float().flatten(), b.flatten(), dim=0) > 0.9999


def test_no_tokens_give_zero_gradients():
    hidden_MH, weight_VH, bias_V = inputs()
    head = policy_head(hidden_MH[:0], weight_VH, TARGET_M[:0], objective, bias_V=bias_V, entropy=True)
    head.loss.backward()
    assert head.loss.item() == 0
    assert bool((weight_VH.grad == 0).all() and (bias_V.grad == 0).all())


def test_a_gpu_without_products_in_float32_is_given_blocks(monkeypatch):
    monkeypatch.setattr(products, "WIDE_BLOCK_ELEMENTS", 4 * H)  # three blocks of the vocabulary
    tensors = inputs(torch.bfloat16)
    _, found = run(tensors, chunk=5)
    monkeypatch.setattr(products, "WIDE_BLOCK_ELEMENTS", 2**27)
    _, expected = run(tensors, chunk=5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def count(hidden_size, dtype, support, monkeypatch):
    """Kernels of one head, forward and backward, of 8192 tokens and Qwen3's vocabulary with the loss of SAPO."""
    from sapo.objectives import make_objective

    monkeypatch.setattr(products, "wide_support", lambda *_: frozenset(support))
    sapo, tokens = make_objective("sapo"), 8192
    with FakeTensorMode(), KernelCount() as counted:
        hidden_MH = torch.empty(tokens, hidden_size, dtype=dtype, requires_grad=True)
        weight_VH = torch.empty(151936, hidden_size, dtype=dtype, requires_grad=True)
        target_M, group_M = (torch.zeros(tokens, dtype=torch.int64) for _ in range(2))
        old_M, advantage_M, weight_M = (torch.zeros(tokens, dtype=torch.float64) for _ in range(3))
        counted.launched.clear()

        def loss(logprob_M, at):
            found = sapo.surrogate(logprob_M.double() - old_M[at], advantage_M[at], group_M[at], 8, old_M[at])
            return -(weight_M[at] * found.value_M).sum(), -weight_M[at] * found.slope_M

        policy_head(hidden_MH, weight_VH, target_M, loss, entropy=True).loss.backward()
    return counted


@pytest.mark.parametrize("hidden_size", [1024, 2048, 2560])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "support",
    [
        pytest.param(
            ("mm", "addmm"),
            id="2.12",
            marks=pytest.mark.skipif(torch.__version__ < (2, 12), reason="torch.addmm has an out_dtype from 2.12 on"),
        ),
        pytest.param(("mm",), id="2.8"),
        pytest.param((), id="none"),
    ],
)
def test_at_most_400_kernels_at_a_vocabulary_of_151936(hidden_size, dtype, support, monkeypatch):
    counted = count(hidden_size, dtype, support, monkeypatch)
    assert counted.kernels <= 400, counted.launched
    assert not counted.host_reads
    # Floats that atomics add come out in another order each time.
    assert not [name for name in counted.launched if "index_add" in name or "scatter_add" in name]


@pytest.mark.parametrize(("vocabulary", "tokens"), [(151_936, 1664), (49_152, 5376), (10**9, 128), (64, 65_536)])
def test_chunks_of_float32_logits_stay_within_a_gibibyte_in_whole_tiles(vocabulary, tokens):
    # By hand: 2^30 / (4 V) rounded down to 128; but never fewer than 128 tokens, nor more than 65,536.
    assert gpu_head.chunk_tokens(vocabulary) == tokens
