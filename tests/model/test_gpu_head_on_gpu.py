"""The policy head on a CUDA device: its products in float32, its gradient, and the same bits twice."""

import pytest
import torch

from sapo.model.head import policy_head
from sapo.model.products import wide_support
from support.attention_cases import normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS, HIDDEN, VOCABULARY = 300, 64, 5000


def run(device, dtype):
    """Loss, log pi and the two gradients."""
    hidden_MH, weight_VH = (
        normal(*shape, seed=i).to(torch.bfloat16).to(device, dtype).requires_grad_()
        for i, shape in enumerate(((TOKENS, HIDDEN), (VOCABULARY, HIDDEN)))
    )
    target_M = torch.arange(TOKENS, device=device) % 7  # each several times, in every chunk
    head = policy_head(
        hidden_MH, weight_VH, target_M, lambda logp, at: (logp.sum(), torch.ones_like(logp)), temperature=8.0, chunk=128
    )
    return head.loss.detach(), head.logprob_M, *torch.autograd.grad(head.loss, (hidden_MH, weight_VH))


def test_torch_gives_products_of_bfloat16_in_float32():
    assert "mm" in wide_support(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_and_its_gradient_are_those_of_float64_on_a_cpu(dtype):
    ours, theirs = run("cuda", dtype), run("cpu", torch.float64)
    torch.testing.assert_close(ours[1].cpu().double(), theirs[1], rtol=1e-4, atol=1e-4)
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        assert torch.cosine_similarity(a.cpu().double().flatten(), b.flatten(), dim=0) > 0.9999


def test_the_same_bits_come_out_twice():
    for one, two in zip(run("cuda", torch.bfloat16), run("cuda", torch.bfloat16), strict=True):
        assert torch.equal(one, two)
