"""Products through oneDNN: the same function as torch's, its gradient, the layers it stands under, and its rule."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sapo.model import products
from sapo.model.products import add_outer_sum, linear, outer_sum, product, takes_onednn, use_best_products

needs_onednn = pytest.mark.skipif(
    not products._processor_has_onednn(), reason="another processor: torch's own products"
)


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


@needs_onednn
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("shape", [(7, 5), (1, 7, 5), (2, 3, 5), (1, 5), (0, 5)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("slow_mkl", [False, True], ids=["mkl for weights", "onednn for weights"])
def test_linear_and_its_gradients_are_those_of_float64(shape, bias, slow_mkl, monkeypatch) -> None:
    monkeypatch.setattr(products, "_mkl_runs_at_half", lambda: slow_mkl)
    leaves = [normal(*shape, seed=1), normal(9, 5, seed=2)] + ([normal(9, seed=3)] if bias else [])
    leaves = [x.requires_grad_() for x in leaves]
    slope = normal(*shape[:-1], 9, seed=4)
    ours = linear(*leaves)
    assert ("_Linear" in type(ours.grad_fn).__name__) == (ours.numel() > 0)
    wide = exact(*leaves)
    theirs = F.linear(*wide)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)
    got = torch.autograd.grad((ours * slope).sum(), leaves)
    wanted = torch.autograd.grad((theirs * slope).sum(), wide)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=0, atol=1e-5)


@needs_onednn
@pytest.mark.usefixtures("every_size")
def test_a_gradient_that_is_one_number_expanded_is_taken() -> None:
    x, w = normal(6, 5).requires_grad_(), normal(4, 5, seed=1).requires_grad_()
    linear(x, w).sum().backward()
    torch.testing.assert_close(
        x.grad, w.detach().sum(0).expand(6, 5)
    )  # by hand: d sum / d x is the sum of the rows of w


@needs_onednn
@pytest.mark.usefixtures("every_size")
def test_only_the_gradients_asked_for_are_computed() -> None:
    x, w = normal(6, 5), normal(4, 5, seed=1).requires_grad_()
    linear(x, w).sum().backward()
    assert x.grad is None
    frozen = normal(4, 5, seed=1)
    x.requires_grad_()
    linear(x, frozen).sum().backward()
    assert frozen.grad is None


@needs_onednn
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("slow_mkl", [False, True])
def test_products_take_transposed_operands_as_they_lie(slow_mkl, monkeypatch) -> None:
    monkeypatch.setattr(products, "_mkl_runs_at_half", lambda: slow_mkl)
    a, b = normal(6, 5), normal(5, 7, seed=1)
    wanted = a.double() @ b.double()
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            torch.testing.assert_close(product(left, right).double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(outer_sum(a.t().contiguous(), b).double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(outer_sum(a.t(), b).double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slow_mkl", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 12, 10**6])
def test_a_total_is_started_and_added_to_in_any_blocks(block, dtype, slow_mkl, monkeypatch) -> None:
    monkeypatch.setattr(products, "_mkl_runs_at_half", lambda: slow_mkl)
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", block)
    left, right = normal(6, 9, dtype=dtype), normal(6, 5, seed=1, dtype=dtype)
    total = torch.full((9, 5), torch.nan, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    add_outer_sum(total, left, right, fresh=True)
    wanted = left.double().t() @ right.double()
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5  # bfloat16 products are rounded to 8 bits
    torch.testing.assert_close(total.double(), wanted, rtol=0, atol=tolerance)
    add_outer_sum(total, left, right, fresh=False)
    torch.testing.assert_close(total.double(), 2 * wanted, rtol=0, atol=2 * tolerance)


@needs_onednn
@pytest.mark.filterwarnings("ignore:TF32")
def test_what_goes_to_onednn_is_decided_by_dtype_device_and_size() -> None:
    x = normal(4, 4)
    assert takes_onednn(x, x, 2**21)
    assert not takes_onednn(x, x, 2**21 - 1)
    assert not takes_onednn(x.double(), x.double(), 2**30)
    assert not takes_onednn(x.bfloat16(), x.bfloat16(), 2**30)
    assert not takes_onednn(x.to("meta"), x.to("meta"), 2**30)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=False):
        assert not takes_onednn(x, x, 2**30)


@needs_onednn
def test_onednn_gives_the_same_bits_wherever_its_operands_lie() -> None:
    rows, inner, columns = 37, 96, 65
    weight, base = normal(columns, inner, seed=1), normal(rows, inner)
    seen = []
    for offset in range(16):
        buffer = torch.empty(rows * inner + 16)
        x = buffer[offset : offset + rows * inner].view(rows, inner).copy_(base)
        seen.append(torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))
    assert all(torch.equal(y, seen[0]) for y in seen)


def test_layers_keep_class_parameters_and_names_through_copy_and_pickle() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
    x = normal(6, 5)
    before, names = model(x), list(model.state_dict())
    use_best_products(model)
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), before)
    twin = copy.deepcopy(model)
    assert twin[0].forward.__self__ is twin[0]
    with torch.no_grad():
        twin[0].weight.zero_()
    torch.testing.assert_close(model(x), before)
    assert not torch.equal(twin(x), model(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), before)


@needs_onednn
@pytest.mark.usefixtures("every_size")
def test_a_policy_computes_through_these_products(new_policy, monkeypatch) -> None:
    calls = []
    true = products.linear
    monkeypatch.setattr(products, "linear", lambda *args: calls.append(args[1].shape) or true(*args))
    policy = new_policy("qwen3")
    policy.model.set_attn_implementation("sdpa")
    calls.clear()
    with torch.no_grad():
        policy.model(input_ids=torch.tensor([[1, 2, 3]]))
    # Seven layers of each of two blocks, and the head.
    assert len(calls) == 2 * 7 + 1


@pytest.mark.parametrize(
    ("layer", "inside"),
    [
        (nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 4, 4), bias=False), (2, 4, 4)),
        (nn.Conv3d(3, 5, (1, 4, 4), stride=(1, 4, 4)), (1, 4, 4)),
        (nn.Conv2d(3, 5, 4, stride=4, padding="valid"), (4, 4)),
        (nn.Conv2d(3, 5, 4, stride=4), (8, 12)),  # whole pictures, as CLIP takes them
    ],
    ids=["Qwen-VL", "one frame", "valid", "pictures"],
)
def test_patches_are_embedded_as_by_the_convolution(layer: nn.Module, inside: tuple[int, ...]) -> None:
    plain = copy.deepcopy(layer).double()
    use_best_products(layer)
    assert layer.forward.__func__ is products.patches_forward
    x = normal(7, 3, *inside).requires_grad_()
    wide = x.detach().double().requires_grad_()
    ours, theirs = layer(x), plain(wide)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)
    slope = normal(*ours.shape, seed=1)
    got = torch.autograd.grad((ours * slope).sum(), [x, *layer.parameters()])
    wanted = torch.autograd.grad((theirs * slope).sum(), [wide, *plain.parameters()])
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=0, atol=1e-4)


def test_a_convolution_over_more_than_one_patch_keeps_its_forward() -> None:
    for layer in (nn.Conv2d(3, 6, 4, padding=1), nn.Conv2d(3, 6, 4, groups=3), nn.Conv2d(3, 6, 3, padding="same")):
        use_best_products(layer)
        assert "forward" not in vars(layer)
