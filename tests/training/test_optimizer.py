"""Optimizers by name: whatever state they keep goes through a checkpoint bit for bit, or they are refused first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from sapo.config import TrainConfig
from sapo.errors import CheckpointError, ConfigError
from sapo.training.optimizer import OPTIMIZERS, OptimizerOptions, PolicyOptimizer, find_optimizer
from sapo.training.optimizer_check import prove_optimizer, state_bytes
from sapo.training.optimizer_state import DESCRIPTION

OWN = "support.own_optimizers:SignMomentum"


@pytest.fixture
def torchao() -> Iterator[None]:
    """torchao's own arithmetic and tensors, without the minute that compiling its step takes."""
    pytest.importorskip("torchao", reason="torchao is in the extra optim")
    with torch.compiler.set_stance("force_eager"):
        yield


def make(name: str, parameters: list[nn.Parameter], **options: Any) -> PolicyOptimizer:
    named = [(f"layer.{i}.weight", p) for i, p in enumerate(parameters)]
    defaults = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1.0}
    return PolicyOptimizer(named, **{**defaults, "name": name, **options})


def fresh(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Two parameters that torchao quantises, of 4096 elements and more, and between them one that it does not."""
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((64, 64), (7,), (32, 256))]


def train(optimizer: PolicyOptimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in optimizer.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.collect_gradients()
        optimizer.step(1e-2 / (1 + step), optimizer.gradient_norm())


def through_a_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a checkpoint writes and reads them; safetensors takes plain tensors alone, without shared memory."""
    return load(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))


def assert_resumes(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make five steps in one go, and with a checkpoint after the third; return what it held."""
    whole = make(name, fresh(dtype))
    train(whole, range(3))
    tensors = through_a_file(whole.state_tensors())
    resumed = make(name, fresh(dtype))
    train(resumed, range(8, 10))  # a state of its own, which is overwritten
    with torch.no_grad():
        for mine, theirs in zip(resumed.parameters, whole.parameters, strict=True):
            mine.copy_(theirs)
    resumed.load_state_tensors(tensors)
    again = resumed.state_tensors()
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)
    for optimizer in (whole, resumed):
        train(optimizer, range(3, 5))
    for mine, theirs in zip(resumed.masters, whole.masters, strict=True):
        assert torch.equal(mine, theirs)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_keeps_the_names_that_checkpoints_have_always_had(dtype: torch.dtype) -> None:
    tensors = assert_resumes("adamw", dtype)
    keys = {"step", "exp_avg", "exp_avg_sq", *(["master"] if dtype == torch.bfloat16 else [])}
    assert tensors.keys() == {f"{key}/layer.{i}.weight" for key in keys for i in range(3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_of_ones_own_resumes_whatever_its_state_is_made_of(dtype: torch.dtype) -> None:
    tensors = assert_resumes(OWN, dtype)
    described = json.loads(bytes(tensors[DESCRIPTION].numpy()))
    assert described["state"]["step/layer.0.weight"] == {"value": 3}
    assert described["groups"][0]["largest"]["value"] > 0
    assert tensors["seen#group 0"][0] == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("torchao")
def test_quantised_moments_are_written_as_plain_tensors_and_resume(dtype: torch.dtype) -> None:
    tensors = assert_resumes("adamw_8bit", dtype)
    codes = tensors["codes#exp_avg/layer.0.weight"]
    assert (codes.dtype, codes.shape) == (torch.uint8, (64, 64))
    assert tensors["scale#exp_avg_sq/layer.2.weight"].shape == (32,)  # 32 x 256 elements in blocks of 256
    assert tensors["exp_avg/layer.1.weight"].dtype == torch.float32
    assert all(type(t) is Tensor for t in tensors.values())


@pytest.mark.usefixtures("torchao")
def test_restored_moments_are_torchaos_own_tensors() -> None:
    from torchao.optim.subclass_8bit import OptimState8bit

    first, second = make("adamw_8bit", fresh()), make("adamw_8bit", fresh())
    train(first, range(2))
    second.load_state_tensors(first.state_tensors())
    state, restored = (o.inner.state[o.masters[0]] for o in (first, second))
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        assert type(restored[key]) is OptimState8bit
        assert (restored[key].signed, restored[key].dtype) == (signed, torch.float32)
        assert torch.equal(restored[key].dequantize(), state[key].dequantize())
        assert restored[key].codes.data_ptr() != state[key].codes.data_ptr()


@pytest.mark.parametrize("name", ["adamw_8bit", OWN])
@pytest.mark.usefixtures("torchao")
def test_the_state_of_another_model_or_optimizer_is_refused(name: str) -> None:
    optimizer = make(name, fresh())
    train(optimizer, range(1))
    tensors = optimizer.state_tensors()
    with pytest.raises(CheckpointError, match=r"must be of the model that is trained; got .* more"):
        make(name, fresh()[:1]).load_state_tensors(tensors)
    if name == "adamw_8bit":
        with pytest.raises(CheckpointError, match="must be of the optimizer that trains; got tensors of torchao"):
            make("adamw", fresh()).load_state_tensors(tensors)


def test_masters_of_another_model_are_refused() -> None:
    optimizer = make("adamw", fresh(torch.bfloat16))
    tensors = optimizer.state_tensors()
    cut = {**tensors, "master/layer.1.weight": torch.zeros(1)}  # copied, it would fill all seven elements
    with pytest.raises(
        CheckpointError, match=r"must hold master/layer\.1\.weight of shape \(7,\); got one of shape \(1,\)"
    ):
        optimizer.load_state_tensors(cut)
    del tensors["master/layer.1.weight"]
    with pytest.raises(CheckpointError, match=r"must hold master/layer\.1\.weight of shape \(7,\); got none"):
        optimizer.load_state_tensors(tensors)


@pytest.mark.parametrize("spec", ["os:system", "torch:device", "transformers:PreTrainedModel"])
@pytest.mark.usefixtures("torchao")
def test_no_class_is_used_because_a_file_names_it(spec: str) -> None:
    optimizer = make("adamw_8bit", fresh())
    train(optimizer, range(1))
    tensors = optimizer.state_tensors()
    text = bytes(tensors[DESCRIPTION].numpy()).decode()
    named = text.replace("torchao.optim.subclass_8bit:OptimState8bit", spec)
    assert named != text
    tensors[DESCRIPTION] = torch.tensor(list(named.encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=f"of the optimizer that trains; got tensors of {spec}"):
        optimizer.load_state_tensors(tensors)


@pytest.mark.usefixtures("torchao")
def test_the_eight_bit_moments_take_steps_near_those_of_adamw() -> None:
    exact, quantised = make("adamw", fresh()), make("adamw_8bit", fresh())
    for optimizer in (exact, quantised):
        train(optimizer, range(6))
    for start, wide, narrow in zip(fresh(), exact.parameters, quantised.parameters, strict=True):
        moved = [(after - start).flatten() for after in (wide, narrow)]
        assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.99
    assert (exact.parameters[0] - quantised.parameters[0]).abs().max() > 1e-5
    # torchao leaves a small parameter's moments in float32: AdamW up to rounding
    torch.testing.assert_close(exact.parameters[1], quantised.parameters[1], rtol=1e-5, atol=1e-6)


def test_options_reach_the_optimizer_as_far_as_it_takes_them() -> None:
    optimizer = make(OWN, fresh(), betas=(0.5, 0.6), weight_decay=0.3)
    assert optimizer.inner.param_groups[0]["betas"] == (0.5, 0.6)
    assert find_optimizer(OWN).takes == ("betas",)
    assert find_optimizer("torch.optim:RAdam").takes == ("betas", "eps", "weight_decay")
    defaults = [TrainConfig.model_fields[key].default for key in ("betas", "adam_eps", "weight_decay")]
    assert defaults == list(vars(OptimizerOptions()).values())


@pytest.mark.parametrize(
    "name", [*(n for n in OPTIMIZERS if n != "adamw"), OWN, *(f"torch.optim:{n}" for n in ("SGD", "RAdam", "Adagrad"))]
)
@pytest.mark.usefixtures("torchao")
def test_what_runs_and_resumes_is_let_through(name: str) -> None:
    prove_optimizer(name, OptimizerOptions(), "cpu")


def test_torchao_that_is_not_installed_is_named_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs torchao, which is not installed; pip install 'sapo-rl\[optim\]'"):
        prove_optimizer("adamw_8bit", OptimizerOptions(), "cpu")


@pytest.mark.usefixtures("torchao")
def test_the_state_is_counted_by_its_bytes() -> None:
    for name in OPTIMIZERS:
        optimizer = make(name, fresh())
        train(optimizer, range(1))
        kept = {k: t for k, t in optimizer.state_tensors().items() if k != DESCRIPTION and not k.startswith("step/")}
        assert state_bytes(name, fresh()) == sum(t.numel() * t.element_size() for t in kept.values())
    # by hand: 64 x 64 + 32 x 256 = 12288 elements, each a byte in both moments; 48 blocks; 2 tables each; 7 in float32
    assert state_bytes("adamw_8bit", fresh()) == 2 * (12288 + 48 * 4 + 2 * 1024) + 2 * 4 * 7
    assert state_bytes("adamw", fresh(torch.bfloat16)) == 8 * (12288 + 7)
    # one mean in float32, measured on one parameter with the few bytes that it keeps beside
    assert state_bytes(OWN, fresh()) == pytest.approx(4 * (12288 + 7), rel=0.05)
