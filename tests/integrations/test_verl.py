"""Our objectives in verl's registry, and against verl's own losses where both have one. `make test-verl` runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl lives in .venv-verl: make test-verl")

from verl.workers.config import ActorConfig  # noqa: E402

from sapo.integrations.verl import ACTOR_SETTINGS, AGGREGATIONS, PREFIX, register  # noqa: E402
from sapo.objectives import OBJECTIVES, gate_weight, make_objective, policy_loss, sequence_weights  # noqa: E402

VERL_NAMES = {name: name for name in ("sapo", "gspo", "cispo", "dppo_tv")} | {"gmpo": "geo_mean", "grpo": "vanilla"}
SETTINGS: dict[str, dict[str, float]] = {
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "gspo": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15},
    "cispo": {"clip_ratio_low": 1.0, "clip_ratio_high": 0.25},  # verl's lower bound, 1 - clip_ratio_low, is then none
    "gmpo": {"clip_ratio_low": 0.3, "clip_ratio_high": 0.2},
    "dppo_tv": {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08, "clip_ratio_c": 1.5},
    "grpo": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "clip_ratio_c": 10.0},  # its dual clip out of reach
}
OURS: dict[str, dict[str, float]] = {
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "gspo": {"eps_low": 0.1, "eps_high": 0.15},
    "cispo": {"ratio_cap": 1.25},
    "gmpo": {"log_low": 0.3, "log_high": 0.2},
    "dppo_tv": {"tv_low": 0.05, "tv_high": 0.08, "ratio_cap": 1.5},
    "grpo": {"eps_low": 0.1, "eps_high": 0.15},
}
WEIGHTED = ("cispo", "dppo_tv")
"""Published as -sg(w) A log pi: verl's loss is that number, ours the integral of its slope."""


def actor(**options: Any) -> Any:
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Five sequences, one of them A = 0; some ratios on each side of each band, by token and by sequence."""
    generator = torch.Generator().manual_seed(11)
    logp_BT = -2 * torch.rand(5, 8, generator=generator, dtype=torch.float64)
    shift_BT = torch.tensor([0.4, -0.4, 0.02, 0.0, 0.1], dtype=torch.float64)[:, None]
    old_BT = logp_BT - shift_BT - 0.2 * torch.randn(5, 8, generator=generator, dtype=torch.float64)
    advantages_B = torch.tensor([1.1, -0.7, 0.4, -1.3, 0.0], dtype=torch.float64)
    return logp_BT, old_BT, advantages_B, torch.arange(8) < torch.tensor([8, 3, 5, 1, 6])[:, None]


def call(
    name: str, logp_BT: Tensor, old_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor, config: Any, **options: Any
):
    return core_algos.get_policy_loss_fn(name)(
        old_log_prob=old_BT,
        log_prob=logp_BT,
        advantages=advantages_B[:, None].expand_as(logp_BT),
        response_mask=mask_BT,
        config=config,
        **options,
    )


def gradient(loss: Tensor, logp_BT: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logp_BT)[0]


def leaf(values: Tensor) -> Tensor:
    return values.clone().requires_grad_()


def agree(ours: Tensor, theirs: Tensor, rtol: float = 1e-7) -> None:
    # verl computes a few of its masks and tau in float32, or adds 1e-8 to a length.
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("name", VERL_NAMES)
def test_loss_and_gradient_equal_those_of_verl(name: str, mode: str) -> None:
    # These two of verl's ignore the aggregation that is asked for.
    used = {"sapo": "seq-mean-token-mean", "gmpo": "seq-mean-token-mean"}.get(name, mode)
    logp_BT, *rest = batch()
    theirs_BT, ours_BT = leaf(logp_BT), leaf(logp_BT)
    theirs, _ = call(VERL_NAMES[name], theirs_BT, *rest, actor(**SETTINGS[name]), loss_agg_mode=mode)
    ours = policy_loss(name, ours_BT, *rest, normalizer=AGGREGATIONS[used], **OURS[name])
    expected_BT = gradient(theirs, theirs_BT)
    assert bool((expected_BT != 0).any())
    agree(gradient(ours, ours_BT), expected_BT)
    if name in WEIGHTED:
        old_BT, advantages_B, mask_BT = rest
        sequence_M = mask_BT.nonzero()[:, 0]
        old_M = old_BT[mask_BT]
        out = make_objective(name, **OURS[name]).surrogate(
            logp_BT[mask_BT] - old_M, advantages_B[sequence_M], sequence_M, len(mask_BT), old_M
        )
        weight_M = sequence_weights(mask_BT.sum(1), AGGREGATIONS[used])[sequence_M]
        ours = -(weight_M * out.slope_M * logp_BT[mask_BT]).sum()
    agree(ours, theirs)


@pytest.mark.parametrize("name", VERL_NAMES)
def test_our_loss_in_verls_registry_equals_verls_own_under_the_same_actor(name: str) -> None:
    logp_BT, *rest = batch()
    theirs_BT, ours_BT = leaf(logp_BT), leaf(logp_BT)
    options = {"config": actor(**SETTINGS[name]), "loss_agg_mode": "seq-mean-token-mean"}
    theirs, _ = call(VERL_NAMES[name], theirs_BT, *rest, **options)
    ours, _ = call(f"{PREFIX}{name}", ours_BT, *rest, **options)
    agree(gradient(ours, ours_BT), gradient(theirs, theirs_BT))


@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_aggregation_is_honoured_over_the_minibatch_verl_counts(mode: str, ranks: int) -> None:
    logp_BT, old_BT, advantages_B, mask_BT = batch()
    counts = {"dp_size": ranks, "batch_num_tokens": 31, "global_batch_size": 7, "loss_scale_factor": None}
    found = []
    for name in ("vanilla", f"{PREFIX}grpo"):
        config, variable_BT = actor(**SETTINGS["grpo"]), leaf(logp_BT)
        config.global_batch_info.update(counts)
        loss, _ = call(name, variable_BT, old_BT, advantages_B, mask_BT, config, loss_agg_mode=mode)
        found.append((loss, gradient(loss, variable_BT)))
    for theirs, ours in zip(*found, strict=True):
        agree(ours, theirs)


@pytest.mark.parametrize("factor", [None, 40])
def test_the_constant_length_is_verls(factor: int | None) -> None:
    found = []
    for name in ("vanilla", f"{PREFIX}grpo"):
        config = actor(**SETTINGS["grpo"])
        config.global_batch_info.update(loss_scale_factor=factor)
        found.append(call(name, *batch(), config, loss_agg_mode="seq-mean-token-sum-norm")[0])
    agree(found[1], found[0])


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_agg_mode must be one of token-mean, .*; got 'mean'; choose"):
        call(f"{PREFIX}sapo", *batch(), actor(), loss_agg_mode="mean")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_registered_with_the_settings_of_the_actor(name: str) -> None:
    config = actor(clip_ratio_low=0.12, clip_ratio_high=0.13, clip_ratio_c=4.0, tau_pos=1.5, tau_neg=2.5)
    expected = {option: read(config) for option, read in ACTOR_SETTINGS.get(name, {}).items()}
    logp_BT, old_BT, advantages_B, mask_BT = batch()
    loss, metrics = call(f"{PREFIX}{name}", logp_BT, old_BT, advantages_B, mask_BT, config)
    given = (logp_BT, old_BT, advantages_B, mask_BT)
    agree(loss, policy_loss(name, *given, normalizer="token_mean", **expected), rtol=1e-12)
    log_ratio_BT = logp_BT - old_BT
    weight_BT = gate_weight(name, log_ratio_BT, advantages_B, mask_BT, logp_old_BT=old_BT, **expected)
    assert metrics == {
        "actor/eur": pytest.approx(weight_BT[mask_BT].mean().item()),
        "actor/ratio_abs_dev": pytest.approx((log_ratio_BT[mask_BT].exp() - 1).abs().mean().item()),
        "actor/ppo_kl": pytest.approx(-log_ratio_BT[mask_BT].mean().item()),
    }


def test_what_the_actor_has_is_what_the_settings_say() -> None:
    config = actor(clip_ratio_low=0.12, clip_ratio_high=0.13, clip_ratio_c=4.0)
    read = {name: {k: f(config) for k, f in options.items()} for name, options in ACTOR_SETTINGS.items()}
    assert read["grpo"] == {"eps_low": 0.12, "eps_high": 0.13}
    assert read["cispo"] == {"ratio_cap": 1.13}
    assert read["dppo_tv"] == {"tv_low": 0.12, "tv_high": 0.13, "ratio_cap": 4.0}
    assert read["gmpo"] == {"log_low": 0.12, "log_high": 0.13}


def test_rollout_weights_scale_each_token_as_in_verl() -> None:
    logp_BT, old_BT, advantages_B, mask_BT = batch()
    weights_BT = 0.5 + torch.rand(logp_BT.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = (logp_BT, old_BT, advantages_B, mask_BT, actor())
    options = {"loss_agg_mode": "seq-mean-token-mean", "rollout_is_weights": weights_BT}
    agree(call(f"{PREFIX}sapo", *given, **options)[0], call("sapo", *given, **options)[0])
    by_response = {**options, "rollout_is_weights": weights_BT[:, :1].expand_as(weights_BT)}
    agree(call(f"{PREFIX}gspo", *given, **by_response)[0], call("gspo", *given, **by_response)[0])
    with pytest.raises(ValueError, match="gspo takes one advantage per sequence"):
        call(f"{PREFIX}gspo", *given, **options)
    with pytest.raises(ValueError, match="maspo's gate reads the advantage"):
        call(f"{PREFIX}maspo", *given, **options)


def test_a_loss_with_settings_of_ones_own_can_be_registered_and_verls_names_are_kept() -> None:
    register("wide_maspo", "maspo", sigma=3.0)
    given = batch()
    loss, _ = call("wide_maspo", *given, actor())
    agree(loss, policy_loss("maspo", *given, normalizer="token_mean", sigma=3.0), rtol=1e-12)
    register("wide_maspo", "maspo", sigma=4.0)  # one's own may be registered again
    with pytest.raises(ValueError, match="the name must be free in verl's registry; got 'sapo', verl's own"):
        register("sapo", "sapo")
    with pytest.raises(ValueError, match="tau_pos must be positive"):
        register("mine", "sapo", tau_pos=-1.0)


def test_padding_and_far_ratios_leave_our_loss_finite() -> None:
    logp_BT, old_BT, advantages_B, mask_BT = batch()
    old_BT = torch.where(mask_BT, old_BT, torch.nan)
    old_BT[0, 0] = logp_BT[0, 0] - 100
    variable_BT = leaf(logp_BT)
    loss, metrics = call(f"{PREFIX}sapo", variable_BT, old_BT, advantages_B, mask_BT, actor())
    assert loss.isfinite()
    assert bool(gradient(loss, variable_BT).isfinite().all())
    assert all(value == value for value in metrics.values())


def test_verl_loads_our_losses_by_its_environment_variable() -> None:
    code = "import verl.trainer.ppo.core_algos as c; print('sapo_rl_sapo' in c.POLICY_LOSS_REGISTRY)"
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "sapo.integrations.verl"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("True"), done.stderr
