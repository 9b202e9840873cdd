"""The policy head against autograd through log_softmax, and the memory it may take."""

import functools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sapo.model.head import chunk_tokens, policy_head, token_logprobs

M, H, V = 13, 6, 11
every_chunk = pytest.mark.parametrize("chunk", [1, 3, M, None])
every_temperature = pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
with_and_without_bias = pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(biased=True, needs=("hidden", "weight", "bias"), dtype=torch.float64):
    """Hidden states, head and targets; targets repeat, and 0 and V - 1 are among them."""
    hidden_MH, weight_VH, bias_V = (
        normal(*shape, seed=i, dtype=dtype).requires_grad_(name in needs)
        for i, (name, shape) in enumerate({"hidden": (M, H), "weight": (V, H), "bias": (V,)}.items())
    )
    target_M = torch.tensor([0, V - 1, 4, 4, 4, 0, 7, 2, 4, V - 1, 1, 9, 0])
    return hidden_MH, weight_VH, bias_V if biased else None, target_M


OLD_M, FACTOR_M = normal(M, seed=7) - 2.5, normal(M, seed=8)


def objective(logprob, at=slice(None)):
    """An objective that is not linear in log pi: sum of factor * exp(log pi - old), its own derivative."""
    terms = FACTOR_M[at] * torch.exp(logprob.double() - OLD_M[at])
    return terms.sum(), terms


def reference_logprobs(hidden_MH, weight_VH, bias_V, temperature):
    """(M, V) log pi by autograd's own operations, in one piece."""
    logits_MV = hidden_MH @ weight_VH.T + (0 if bias_V is None else bias_V)
    return torch.log_softmax(logits_MV / temperature, dim=-1)


def leaves(*tensors):
    return [x for x in tensors if x is not None and x.requires_grad]


@with_and_without_bias
@every_temperature
@every_chunk
def test_loss_logprob_entropy_and_gradients_equal_autograd_through_log_softmax(chunk, temperature, biased):
    hidden_MH, weight_VH, bias_V, target_M = inputs(biased)
    head = policy_head(
        hidden_MH, weight_VH, target_M, objective, bias_V=bias_V, temperature=temperature, entropy=True, chunk=chunk
    )
    logp_MV = reference_logprobs(hidden_MH, weight_VH, bias_V, temperature)
    logp_M = logp_MV[range(M), target_M]
    loss, _ = objective(logp_M)
    close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
    close(head.loss, loss)
    close(head.logprob_M, logp_M.detach())
    close(head.entropy_M, torch.distributions.Categorical(logits=logp_MV.detach()).entropy())
    assert not head.logprob_M.requires_grad
    assert not head.entropy_M.requires_grad
    wanted = leaves(hidden_MH, weight_VH, bias_V)
    for ours, theirs in zip(
        torch.autograd.grad(2.5 * head.loss, wanted), torch.autograd.grad(2.5 * loss, wanted), strict=True
    ):
        close(ours, theirs)


@every_temperature
@every_chunk
def test_capped_logits_give_the_gradient_of_autograd_too(chunk, temperature):
    hidden_MH, weight_VH, bias_V, target_M = inputs()
    cap = 1.5  # the logits here reach 8, so that many are deep in the cap
    settings = {"bias_V": bias_V, "temperature": temperature, "softcap": cap, "chunk": chunk}
    head = policy_head(hidden_MH, weight_VH, target_M, objective, entropy=True, **settings)
    capped_MV = cap * torch.tanh((hidden_MH @ weight_VH.T + bias_V) / cap)
    logp_MV = torch.log_softmax(capped_MV / temperature, dim=-1)
    logp_M = logp_MV[range(M), target_M]
    torch.testing.assert_close(head.logprob_M, logp_M.detach())
    torch.testing.assert_close(head.entropy_M, -(logp_MV.exp() * logp_MV).sum(-1).detach())
    expected = torch.autograd.grad(objective(logp_M)[0], (hidden_MH, weight_VH, bias_V))
    torch.testing.assert_close(torch.autograd.grad(head.loss, (hidden_MH, weight_VH, bias_V)), expected)
    torch.testing.assert_close(token_logprobs(hidden_MH, weight_VH, target_M, **settings), logp_M.detach())


@every_chunk
@pytest.mark.parametrize(
    "needs",
    [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("hidden", "bias"), ("weight", "bias")],
    ids="-".join,
)
def test_what_is_frozen_changes_no_other_gradient(needs, chunk):
    hidden_MH, weight_VH, bias_V, target_M = inputs(needs=needs)
    head = policy_head(hidden_MH, weight_VH, target_M, objective, bias_V=bias_V, chunk=chunk)
    logp_MV = reference_logprobs(hidden_MH, weight_VH, bias_V, 1.0)
    loss, _ = objective(logp_MV[range(M), target_M])
    wanted = leaves(hidden_MH, weight_VH, bias_V)
    assert len(wanted) == len(needs)
    for ours, theirs in zip(torch.autograd.grad(head.loss, wanted), torch.autograd.grad(loss, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_gradient_equals_finite_differences_of_the_loss():
    hidden_MH, weight_VH, bias_V, target_M = inputs()

    def loss(hidden_MH, weight_VH, bias_V):
        return policy_head(hidden_MH, weight_VH, target_M, objective, bias_V=bias_V, temperature=0.8, chunk=4).loss

    tensors, step = (hidden_MH, weight_VH, bias_V), 1e-6
    loss(*tensors).backward()  # not gradcheck, which goes back through one loss twice
    with torch.no_grad():
        for tensor in tensors:
            for place in range(0, tensor.numel(), 3):
                entry = tensor.view(-1)[place : place + 1]
                entry += step
                above = loss(*tensors)
                entry -= 2 * step
                below = loss(*tensors)
                entry += step
                slope = ((above - below) / (2 * step)).item()
                assert tensor.grad.view(-1)[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-7)


def test_raising_the_logprob_of_a_token_moves_its_own_logit_up():
    # By hand: uniform logits over four tokens, loss -log pi(2): d loss / d logits is p - onehot(2).
    bias_V = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    hidden_MH, weight_VH = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    head = policy_head(
        hidden_MH, weight_VH, torch.tensor([2]), lambda logp, at: (-logp.sum(), -torch.ones(1)), bias_V=bias_V
    )
    head.loss.backward()
    assert bias_V.grad.tolist() == pytest.approx([0.25, 0.25, -0.75, 0.25], abs=1e-15)


@pytest.mark.parametrize("chunk", [1, 3, 5, M, 100])
def test_the_objective_is_told_of_every_token_once_and_in_order(chunk):
    hidden_MH, weight_VH, bias_V, target_M = inputs()
    seen = []

    def record(logprob, at):
        seen.append((at, logprob.shape[0]))
        return objective(logprob, at)

    policy_head(hidden_MH, weight_VH, target_M, record, bias_V=bias_V, chunk=chunk)
    assert [i for at, _ in seen for i in range(M)[at]] == list(range(M))
    assert all(len(range(M)[at]) == count <= chunk for at, count in seen)


@with_and_without_bias
@every_temperature
@every_chunk
def test_token_logprobs_equal_log_softmax(chunk, temperature, biased):
    hidden_MH, weight_VH, bias_V, target_M = inputs(biased)
    ours_M = token_logprobs(hidden_MH, weight_VH, target_M, bias_V=bias_V, temperature=temperature, chunk=chunk)
    theirs_M = reference_logprobs(hidden_MH, weight_VH, bias_V, temperature)[range(M), target_M]
    torch.testing.assert_close(ours_M, theirs_M.detach(), rtol=1e-12, atol=1e-13)
    assert not ours_M.requires_grad


class CreatedTensors(TorchDispatchMode):
    """Shapes of all tensors that operations return while it is on."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes |= {
            tuple(x.shape) for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)
        }
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_one_chunk_of_logits_but_the_weight(dtype):
    vocabulary, tokens, hidden_size, chunk = 5000, 64, 24, 8
    hidden_MH = normal(tokens, hidden_size, seed=0, dtype=dtype).requires_grad_()
    weight_VH = normal(vocabulary, hidden_size, seed=1, dtype=dtype).requires_grad_()
    bias_V = torch.zeros(vocabulary, dtype=dtype, requires_grad=True)
    target_M = torch.arange(tokens)
    with CreatedTensors() as created:
        head = policy_head(
            hidden_MH,
            weight_VH,
            target_M,
            lambda logp, at: (logp.sum(), torch.ones_like(logp)),
            bias_V=bias_V,
            temperature=0.7,
            entropy=True,
            chunk=chunk,
        )
        head.loss.backward()
        token_logprobs(hidden_MH, weight_VH, target_M, bias_V=bias_V, temperature=0.7, chunk=chunk)
    sizes = {shape: torch.Size(shape).numel() for shape in created.shapes}
    weight_shapes = {(vocabulary, hidden_size), (hidden_size, vocabulary)}
    assert max(size for shape, size in sizes.items() if shape not in weight_shapes) == chunk * vocabulary


def test_chunks_of_logits_stay_within_24_mebibytes():
    # By hand: 24 * 2^20 bytes; but never fewer than 96 tokens, nor more than 65,536.
    assert chunk_tokens(2**13) == 768
    assert chunk_tokens(2**13, itemsize=2) == 1536
    assert chunk_tokens(151_936) == 96
    assert chunk_tokens(10**9) == 96
    assert chunk_tokens(2) == 65_536


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_blocks_within_a_chunk_change_nothing(rows, monkeypatch):
    hidden_MH, weight_VH, bias_V, target_M = inputs()
    options = {"bias_V": bias_V, "temperature": 0.7, "softcap": 3.0, "entropy": True}
    whole = policy_head(hidden_MH, weight_VH, target_M, objective, **options)
    wanted = torch.autograd.grad(whole.loss, (hidden_MH, weight_VH, bias_V))
    monkeypatch.setattr("sapo.model.head.BLOCK_ELEMENTS", rows * V)
    cut = policy_head(hidden_MH, weight_VH, target_M, objective, **options)
    assert torch.equal(cut.logprob_M, whole.logprob_M)
    assert torch.equal(cut.entropy_M, whole.entropy_M)
    got = torch.autograd.grad(cut.loss, (hidden_MH, weight_VH, bias_V))
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_a_token_that_its_bias_forbids_leaves_entropy_and_gradient_finite():
    # By definition: with a bias of -inf its probability is 0, and 0 log 0 counts as 0.
    hidden_MH, weight_VH, bias_V, target_M = inputs()
    forbidden = bias_V.detach().clone()
    forbidden[4] = -torch.inf
    target_M = target_M.masked_fill(target_M == 4, 3)
    head = policy_head(hidden_MH, weight_VH, target_M, objective, bias_V=forbidden, entropy=True)
    kept = [v for v in range(V) if v != 4]
    logp = torch.log_softmax(hidden_MH @ weight_VH[kept].T + bias_V[kept], -1)
    torch.testing.assert_close(head.entropy_M, -(logp.exp() * logp).sum(-1).detach(), rtol=0, atol=1e-12)
    head.loss.backward()
    assert bool(hidden_MH.grad.isfinite().all())
    assert bool((weight_VH.grad[4] == 0).all())


def test_no_tokens_give_a_loss_of_zero_and_zero_gradients():
    hidden_MH, weight_VH, bias_V, target_M = inputs()
    empty_MH = hidden_MH[:0]
    head = policy_head(empty_MH, weight_VH, target_M[:0], objective, bias_V=bias_V, entropy=True)
    assert head.loss.item() == 0
    assert head.logprob_M.shape == head.entropy_M.shape == (0,)
    head.loss.backward()
    assert bool((weight_VH.grad == 0).all())
    assert bool((bias_V.grad == 0).all())
    assert token_logprobs(empty_MH, weight_VH, target_M[:0]).shape == (0,)


def test_bfloat16_inputs_give_bfloat16_gradients_near_those_of_float32():
    # Both from the same rounded values. bfloat16 keeps 8 bits: logits of size 5 are off by up to 0.02.
    narrow = inputs(dtype=torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in narrow[:3]]
    heads = [
        policy_head(h, w, narrow[3], objective, bias_V=b, temperature=0.7, entropy=True, chunk=3)
        for h, w, b in (narrow[:3], wide)
    ]
    assert heads[0].logprob_M.dtype == heads[0].loss.dtype == heads[0].entropy_M.dtype == torch.float32
    torch.testing.assert_close(heads[0].logprob_M, heads[1].logprob_M, rtol=0, atol=0.05)
    for head, leaves in zip(heads, (narrow[:3], wide), strict=True):
        head.loss.backward()
        assert all(x.grad.dtype == x.dtype for x in leaves)
    for a, b in zip(narrow[:3], wide, strict=True):
        assert torch.cosine_similarity(a.grad.float().flatten(), b.grad.flatten(), dim=0) > 0.999
        assert 0.97 < a.grad.float().norm() / b.grad.norm() < 1.03


def test_weight_gradients_of_many_bfloat16_chunks_are_summed_in_float32():
    # By hand: 1000 tokens each add 1/4 to the gradient of both used rows; bfloat16 sums would stall at 64.
    tokens = 1000
    hidden_MH = torch.ones(tokens, 1, dtype=torch.bfloat16)
    weight_VH = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    half = 0.5 * torch.ones(1)
    policy_head(
        hidden_MH, weight_VH, torch.zeros(tokens, dtype=torch.int64), lambda logp, at: (logp.sum(), half), chunk=1
    ).loss.backward()
    assert weight_VH.grad[:, 0].tolist() == [250.0, -250.0]


def test_logits_far_apart_give_finite_gradients():
    # By hand: token 1 has logit 2000 below token 0, so log pi is -2000 and the entropy is 0.
    hidden_MH = torch.ones(1, 1, requires_grad=True)
    weight_VH = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    head = policy_head(
        hidden_MH, weight_VH, torch.tensor([1]), lambda logp, at: (logp.sum(), torch.ones(1)), entropy=True
    )
    head.loss.backward()
    assert head.logprob_M.tolist() == [-2000.0]
    assert head.entropy_M.tolist() == [0.0]
    assert hidden_MH.grad.tolist() == [[-2000.0]]
    assert weight_VH.grad.tolist() == [[-1.0], [1.0]]


def test_the_gradients_are_given_away_once():
    hidden = torch.randn(3, 4, requires_grad=True)
    target = torch.tensor([0, 1, 2])
    output = policy_head(hidden, torch.randn(5, 4), target, lambda logp, at: (logp.sum(), torch.ones_like(logp)))
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        output.loss.backward()
