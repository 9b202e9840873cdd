"""SAPOTrainer in real runs of TRL on a tiny model: the gradient of its mini-batches is that of our policy_loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from sapo.model.tiny import character_tokenizer, tiny_model
from sapo.objectives import OBJECTIVES, gate_weight, policy_loss
from support.policies import compute_in_double

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from sapo.integrations.trl import SAPOConfig, SAPOTrainer  # noqa: E402

MOVING = 0.05
"""A learning rate at which the second mini-batch of a generation is visibly off policy."""


def share_of_sevens(completions: list[str], **_: Any) -> list[float]:
    """A reward that varies in every group of an untrained model."""
    return [text.count("7") / 4 + 0.01 * len(text) for text in completions]


class Recorder(SAPOTrainer):
    """Keeps, for each update, its micro-batches, the weights before it and the gradient TRL handed the optimizer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.parts: list[dict[str, Any]] = []
        self.updates: list[tuple[list[dict[str, Any]], Any, list[torch.Tensor]]] = []
        self.seen: list[dict[str, float]] = []
        self.through_head = 0

    def _through_policy_head(self, *args: Any) -> Any:
        self.through_head += 1
        return super()._through_policy_head(*args)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.parts.append(inputs)
        loss = super()._compute_loss(model, inputs)
        if self._window is None:
            self.seen.append({k: v[-1] for k, v in self._metrics["train"].items() if k.startswith(("gate", "ratio"))})
        return loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if len(self.parts) == self.current_gradient_accumulation_steps:
            gradient = [p.grad.clone() for p in self.model.parameters() if p.requires_grad]
            self.updates.append((self.parts, copy.deepcopy(self.model), gradient))
            self.parts = []
        return loss


def train(tmp_path: Path, *, double: bool = True, steps: int = 2, peft_config: Any = None, **options: Any) -> Recorder:
    tokenizer = character_tokenizer("0123456789+-*%=;#")
    model = tiny_model(
        "qwen3",
        len(tokenizer),
        seed=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=16,
        layers=1,
        heads=2,
        kv_heads=1,
        intermediate_size=24,
        max_length=64,
    )
    model.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")  # where TRL finds the reference model
    if double:
        compute_in_double(model)
        model = model.double()
    rows = datasets.Dataset.from_list([{"prompt": f"{i}+{i % 7}="} for i in range(16)])
    settings = {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "temperature": 0.9,
        "learning_rate": MOVING,
        "max_steps": steps,
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        **options,
    }
    trainer = Recorder(
        model,
        share_of_sevens,
        args=SAPOConfig(**settings),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def padded(parts: list[dict[str, Any]]) -> tuple[torch.Tensor, ...]:
    """The micro-batches of a mini-batch as one batch: prompt ids and mask, completion ids and mask, advantages."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
    return tuple(torch.cat([part[name] for part in parts]) for name in names)


def plain_logprobs(model: Any, parts: list[dict[str, Any]], temperature: float) -> torch.Tensor:
    """log pi of the completion tokens by the model's ordinary forward pass, at the temperature."""
    prompt_ids, prompt_mask, completion_ids, completion_mask, _ = padded(parts)
    ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
    logits = type(model).forward(model, input_ids=ids, attention_mask=mask).logits / temperature
    length = completion_ids.shape[1]
    return logits[:, -length - 1 : -1].log_softmax(-1).gather(-1, completion_ids[..., None])[..., 0]


def expected_gradient(trainer: Recorder, update: int, name: str, **options: Any) -> list[torch.Tensor]:
    """The gradient of our policy_loss of a whole mini-batch, by autograd through the plain forward pass."""
    parts, model, _ = trainer.updates[update]
    model.zero_grad()
    logp_BT = plain_logprobs(model, parts, trainer.temperature)
    _, _, _, mask_BT, advantages_B = padded(parts)
    old_BT = torch.cat([part["old_per_token_logps"] for part in parts])
    policy_loss(name, logp_BT, old_BT, advantages_B, mask_BT, max_length=6, **options).backward()
    return [p.grad for p in model.parameters()]


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor], rtol: float = 1e-8) -> None:
    largest = max(g.abs().max().item() for g in expected)
    assert largest > 0
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * largest)


WIDE = {
    "gspo": {"eps_low": 0.1, "eps_high": 0.2},
    "gspo_token": {"eps_low": 0.1, "eps_high": 0.2},
    "luspo": {"eps_low": 0.1, "eps_high": 0.2},
    "rloo": {"eps_low": 0.5, "eps_high": 0.5},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_of_accumulated_microbatches_is_that_of_our_loss_on_the_minibatch(
    name: str, tmp_path: Path
) -> None:
    hyper = WIDE.get(name, {})
    trainer = train(tmp_path, objective=name, objective_settings=hyper)
    lengths = [part["completion_mask"].sum().item() for part in trainer.updates[1][0]]
    assert lengths[0] != lengths[1], "micro-batches of unequal length are what is tested"
    for update in (0, 1):
        assert_same(trainer.updates[update][2], expected_gradient(trainer, update, name, **hyper))
    assert trainer.seen[0]["ratio/abs_dev"] == pytest.approx(0, abs=1e-6)
    assert trainer.seen[1]["ratio/abs_dev"] > 1e-3  # the second mini-batch is off policy


@pytest.mark.parametrize("name", ["sapo", "gspo", "maspo"])
def test_the_policy_head_gives_the_gradient_of_trls_log_probabilities(name: str, tmp_path: Path) -> None:
    options = {"objective": name, "objective_settings": WIDE.get(name, {}), "beta": 0.3}
    with_head, without = (train(tmp_path / str(head), policy_head=head, **options) for head in (True, False))
    assert (with_head.through_head, without.through_head) == (4, 0)  # two updates of two micro-batches
    for update in (0, 1):
        # TRL's fused head computes in float32.
        assert_same(with_head.updates[update][2], without.updates[update][2], rtol=2e-4)
    for ours, theirs in zip(with_head.seen, without.seen, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_an_adapter_gets_the_same_gradient_through_the_head(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    runs = [train(tmp_path / str(head), policy_head=head, peft_config=lora, double=False) for head in (True, False)]
    assert [run.through_head for run in runs] == [4, 0]
    for update in (0, 1):
        assert_same(runs[0].updates[update][2], runs[1].updates[update][2], rtol=1e-3)


def test_the_kl_term_has_the_normalizer_of_the_policy_term(tmp_path: Path) -> None:
    trainer = train(tmp_path, objective="sapo", beta=0.5)
    parts, model, got = trainer.updates[1]
    model.zero_grad()
    logp_BT = plain_logprobs(model, parts, trainer.temperature)
    *_, mask_BT, advantages_B = padded(parts)
    old_BT = torch.cat([part["old_per_token_logps"] for part in parts])
    gap_BT = torch.cat([part["ref_per_token_logps"] for part in parts]).double() - logp_BT
    kl_BT = (gap_BT.exp() - gap_BT - 1) * mask_BT
    kl = (kl_BT.sum(1) / mask_BT.sum(1)).mean()
    assert kl.item() > 1e-4
    (policy_loss("sapo", logp_BT, old_BT, advantages_B, mask_BT) + 0.5 * kl).backward()
    assert_same(got, [p.grad for p in model.parameters()])
    logged = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert logged[1] == pytest.approx((kl_BT.sum() / mask_BT.sum()).item(), rel=1e-6)


def test_trls_own_loss_depends_on_the_accumulation_where_ours_does_not(tmp_path: Path) -> None:
    # TRL's dr_grpo and grpo average micro-batches; token_mean over two unequal ones shows the difference.
    trainer = train(tmp_path, objective="sapo", normalizer="token_mean")
    assert_same(trainer.updates[1][2], expected_gradient(trainer, 1, "sapo", normalizer="token_mean"))
    parts, model, _ = trainer.updates[1]
    model.zero_grad()
    for part in parts:  # the mean of micro-batch means
        logp_BT = plain_logprobs(model, [part], trainer.temperature)
        tensors = (part["old_per_token_logps"], part["advantages"], part["completion_mask"])
        (policy_loss("sapo", logp_BT, *tensors, normalizer="token_mean") / len(parts)).backward()
    with pytest.raises(AssertionError):
        assert_same(trainer.updates[1][2], [p.grad for p in model.parameters()], rtol=1e-3)


def test_the_gate_diagnostics_are_those_of_the_minibatch(tmp_path: Path) -> None:
    trainer = train(tmp_path, objective="sapo", objective_settings={"tau_pos": 4.0, "tau_neg": 6.0})
    parts, model, _ = trainer.updates[1]
    with torch.no_grad():
        logp_BT = plain_logprobs(model, parts, trainer.temperature)
    *_, mask_BT, advantages_B = padded(parts)
    mask_BT = mask_BT.bool()
    log_ratio_BT = logp_BT - torch.cat([part["old_per_token_logps"] for part in parts])
    weight_BT = gate_weight("sapo", log_ratio_BT, advantages_B, mask_BT, tau_pos=4.0, tau_neg=6.0)
    positive_BT = mask_BT & (advantages_B > 0)[:, None]
    expected = {
        "gate/eur": weight_BT[mask_BT].mean().item(),
        "gate/eur_pos": weight_BT[positive_BT].mean().item(),
        "gate/eur_neg": weight_BT[mask_BT & ~positive_BT].mean().item(),
        "gate/min": weight_BT[mask_BT].min().item(),
        "ratio/max": log_ratio_BT[mask_BT].exp().max().item(),
        "ratio/abs_dev": (log_ratio_BT[mask_BT].exp() - 1).abs().mean().item(),
    }
    assert expected["gate/eur"] < 0.999
    logged = [line for line in trainer.state.log_history if "gate/eur" in line][1]
    for name, value in expected.items():
        assert trainer.seen[1][name] == pytest.approx(value, rel=1e-9)
        assert logged[name] == pytest.approx(value, rel=1e-9)
    assert {"ratio/p01", "ratio/p99", "entropy"} <= logged.keys()


def test_an_ordinary_float32_run_learns_and_evaluates(tmp_path: Path) -> None:
    trainer = train(
        tmp_path, double=False, steps=24, learning_rate=1e-2, temperature=1.0, per_device_train_batch_size=16
    )
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[-6:]) > 1.3 * sum(rewards[:6])
    rows = datasets.Dataset.from_list([{"prompt": "1+1="}] * 4)
    loss = trainer.evaluate(rows)["eval_loss"]
    assert loss == loss
    assert any("eval_gate/eur" in line for line in trainer.state.log_history)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "spao"}, "objective must be one of .*; got 'spao'; did you mean 'sapo'"),
        ({"objective_settings": {"tau_pos": 0.0}}, "tau_pos must be positive and finite; got 0.0"),
        ({"objective_settings": '{"eps_low": 0.1}'}, "hyperparameter of sapo must be one of .*; got 'eps_low'"),
        ({"normalizer": "tokens"}, "normalizer must be one of .*; got 'tokens'"),
        ({"delta": 2.0}, "delta is no part of sapo; got 2.0; leave it at None"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level is no part of sapo; got 'sequence'"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile is no part of sapo; got 0.5; leave it at 1.0"),
        ({"entropy_coef": 0.1}, "entropy_coef is no part of sapo; got 0.1; leave it at 0.0"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
            "must be a multiple of gradient_accumulation_steps.*; got 2 and 4; raise the first",
        ),
        (
            {"objective": "gspo", "use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"},
            "gspo takes one advantage per response.*; got 'token_truncate'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SAPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)
    assert "\n" not in str(error.value)


def test_another_config_is_refused(tmp_path: Path) -> None:
    from trl import GRPOConfig

    with pytest.raises(ValueError, match="args must be a SAPOConfig; got GRPOConfig"):
        SAPOTrainer("unused", share_of_sevens, args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
