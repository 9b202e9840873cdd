"""Loss and gradient against the peers, run here: TRL's GRPOTrainer and Liger's fused loss, where they agree with the
papers. Where they do not (micro-batches, far log-ratios) the other tests of this folder hold us to the papers.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from sapo.objectives import make_objective, policy_loss
from support.objective_cases import leaf

TRL_CASES = {
    "sapo": ("sapo", {}, {"loss_type": "sapo"}),
    "grpo": ("grpo", {}, {"loss_type": "grpo"}),
    "dr_grpo": ("dr_grpo", {"max_length": 16}, {"loss_type": "dr_grpo"}),
    "dapo": ("dapo", {}, {"loss_type": "dapo"}),
    "luspo": ("luspo", {}, {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    "gspo": ("gspo", {}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "gspo_token": ("gspo_token", {}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
}
# 1.0625 and not 1.05: TRL rounds its temperatures to float32, and 17/16 survives that.
SOFT = {"tau_pos": 1.0, "tau_neg": 1.0625}
HARD = {"eps_low": 0.1, "eps_high": 0.15}
# Published as -sg(w) A log pi: the peers' loss is that number, ours the integral of its slope.
WEIGHTED = {"cispo": {"ratio_cap": 1.25}, "vespo": {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}}


def batch():
    """Five sequences, one of them A = 0; some ratios on each side of the band, by token and by sequence."""
    generator = torch.Generator().manual_seed(11)
    logp_BT = -2 * torch.rand(5, 8, generator=generator, dtype=torch.float64)
    shift_BT = torch.tensor([0.4, -0.4, 0.02, 0.0, 0.1], dtype=torch.float64)[:, None]
    logp_old_BT = logp_BT - shift_BT - 0.2 * torch.randn(5, 8, generator=generator, dtype=torch.float64)
    advantages_B = torch.tensor([1.1, -0.7, 0.4, -1.3, 0.0], dtype=torch.float64)
    mask_BT = torch.arange(8) < torch.tensor([8, 3, 5, 1, 6])[:, None]
    return logp_BT, logp_old_BT, advantages_B, mask_BT


def weighted_loss(name, logp_BT, logp_old_BT, advantages_B, mask_BT, **hyper):
    """-mean over tokens of slope log pi: what a loss -sg(w) A log pi is worth when its w A is our slope."""
    sequence_M = mask_BT.nonzero()[:, 0]
    log_ratio_M = (logp_BT - logp_old_BT)[mask_BT].detach()
    out = make_objective(name, **hyper).surrogate(log_ratio_M, advantages_B[sequence_M], sequence_M, len(mask_BT))
    return -(out.slope_M * logp_BT[mask_BT].detach()).sum() / mask_BT.sum()


def trl_loss(
    trainer_module,
    logp_BT,
    logp_old_BT,
    advantages_B,
    mask_BT,
    *,
    loss_type,
    importance_sampling_level="token",
    epsilon_high=HARD["eps_high"],
):
    """TRL's own arithmetic, called on a stand-in that holds just the settings it reads."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp_BT, torch.zeros_like(logp_BT), None),
        args=SimpleNamespace(
            delta=None,
            sapo_temperature_pos=SOFT["tau_pos"],
            sapo_temperature_neg=SOFT["tau_neg"],
            steps_per_generation=1,
            **{f"vespo_{option}": value for option, value in WEIGHTED["vespo"].items()},
        ),
        get_gamma_weights=trainer_module.GRPOTrainer.get_gamma_weights,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        epsilon_low=HARD["eps_low"],
        epsilon_high=epsilon_high,
        beta=0.0,
        max_completion_length=16,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(mask_BT.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask_BT.long(),
        "advantages": advantages_B,
        "old_per_token_logps": logp_old_BT,
        "num_items_in_batch": mask_BT.sum(),
    }
    return trainer_module.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize(("name", "options", "trl_options"), TRL_CASES.values(), ids=TRL_CASES)
def test_loss_and_gradient_equal_those_of_trl(name, options, trl_options):
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer")
    logp_BT, logp_old_BT, advantages_B, mask_BT = batch()
    theirs_BT, ours_BT = leaf(logp_BT), leaf(logp_BT)
    theirs = trl_loss(trainer_module, theirs_BT, logp_old_BT, advantages_B, mask_BT, **trl_options)
    hyper = SOFT if name == "sapo" else HARD
    ours = policy_loss(name, ours_BT, logp_old_BT, advantages_B, mask_BT, **options, **hyper)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    expected_BT = torch.autograd.grad(theirs, theirs_BT)[0]
    assert name == "sapo" or bool((expected_BT[mask_BT] == 0).sum() > 6)  # more than the six tokens with A = 0
    torch.testing.assert_close(torch.autograd.grad(ours, ours_BT)[0], expected_BT, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", WEIGHTED)
def test_gradient_and_weighted_log_probs_equal_those_of_trl(name):
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer")
    logp_BT, *rest = batch()
    theirs_BT, ours_BT = leaf(logp_BT), leaf(logp_BT)
    # For cispo TRL's epsilon_high is the cap itself.
    theirs = trl_loss(trainer_module, theirs_BT, *rest, loss_type=name, epsilon_high=WEIGHTED["cispo"]["ratio_cap"])
    torch.testing.assert_close(weighted_loss(name, logp_BT, *rest, **WEIGHTED[name]), theirs, rtol=1e-12, atol=0)
    ours = policy_loss(name, ours_BT, *rest, **WEIGHTED[name])
    expected_BT = torch.autograd.grad(theirs, theirs_BT)[0]
    assert bool((expected_BT != 0).any())
    torch.testing.assert_close(torch.autograd.grad(ours, ours_BT)[0], expected_BT, rtol=1e-12, atol=1e-15)


def test_rloo_loss_and_gradient_equal_those_of_trl():
    trainer_module = pytest.importorskip("trl.trainer.rloo_trainer")
    logp_BT, logp_old_BT, advantages_B, mask_BT = batch()
    theirs_BT, ours_BT = leaf(logp_BT), leaf(logp_BT)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (theirs_BT, torch.zeros_like(logp_BT), None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        epsilon_low=0.3,
        epsilon_high=0.4,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(mask_BT.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask_BT.long(),
        "advantages": advantages_B,
        "old_logps": (logp_old_BT * mask_BT).sum(1),
    }
    theirs = trainer_module.RLOOTrainer._compute_loss(trainer, None, inputs)
    ours = policy_loss("rloo", ours_BT, logp_old_BT, advantages_B, mask_BT, eps_low=0.3, eps_high=0.4)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    expected_BT = torch.autograd.grad(theirs, theirs_BT)[0]
    open_B = (expected_BT != 0).any(1)
    assert bool(open_B.any())
    assert not bool(open_B[:4].all())  # row 4 has A = 0
    torch.testing.assert_close(torch.autograd.grad(ours, ours_BT)[0], expected_BT, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["sapo", "grpo", "dr_grpo", "dapo", "luspo", "cispo", "vespo"])
def test_loss_and_gradient_equal_those_of_liger(name):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    _, _, advantages_B, mask_BT = batch()
    generator = torch.Generator().manual_seed(3)
    hidden_BTH = torch.randn(5, 8, 4, generator=generator)
    head_VH = torch.randn(7, 4, generator=generator)
    ids_BT = torch.randint(7, (5, 8), generator=generator)

    def logprobs(hidden_BTH):
        return (hidden_BTH @ head_VH.T).log_softmax(-1).gather(-1, ids_BT[..., None])[..., 0]

    logp_old_BT = logprobs(hidden_BTH) + 0.3 * torch.randn(5, 8, generator=generator)
    peer = liger.LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        loss_type=name,
        importance_sampling_level="sequence" if name == "luspo" else "token",
        max_completion_length=16,
        epsilon_low=HARD["eps_low"],
        epsilon_high=WEIGHTED["cispo"]["ratio_cap"] if name == "cispo" else HARD["eps_high"],
        sapo_temperature_pos=SOFT["tau_pos"],
        sapo_temperature_neg=SOFT["tau_neg"],
    )
    theirs_BTH, ours_BTH = leaf(hidden_BTH), leaf(hidden_BTH)
    theirs, _ = peer(
        theirs_BTH, head_VH, ids_BT, mask_BT.float(), advantages_B.float(), old_per_token_logps=logp_old_BT
    )
    hyper = SOFT if name == "sapo" else WEIGHTED.get(name, HARD)
    given = (logprobs(ours_BTH), logp_old_BT, advantages_B.float(), mask_BT)
    ours = policy_loss(name, *given, max_length=16, **hyper)
    worth = weighted_loss(name, *given, **hyper) if name in WEIGHTED else ours
    # float32 in the peer: 1e-5 is its rounding.
    torch.testing.assert_close(worth, theirs, rtol=1e-5, atol=1e-6)
    expected_BTH = torch.autograd.grad(theirs, theirs_BTH)[0]
    torch.testing.assert_close(torch.autograd.grad(ours, ours_BTH)[0], expected_BTH, rtol=1e-4, atol=1e-6)
