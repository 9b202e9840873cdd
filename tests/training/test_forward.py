"""Forward passes of training: each is one `policy.run`, hidden states and head within it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sapo.model.policy import Policy
from sapo.objectives import KLPenalty, make_objective
from sapo.training.forward import loss_and_surrogate
from sapo.workflows.coldstart import train_coldstart
from support.trainer_cases import make_groups, make_policy, make_trainer


class Runs:
    """Counts runs of policies, and what is computed within each; anything computed outside of one is an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.within: list[list[str]] = []
        self.running = False
        run = Policy.run

        def counted(policy: Policy, work: Callable[[], Any]) -> Any:
            assert not self.running, "one run within another"
            self.running = True
            self.within.append([])
            try:
                return run(policy, work)
            finally:
                self.running = False

        monkeypatch.setattr(Policy, "run", counted)
        self._watch(monkeypatch, Policy, "hidden")
        for module, name in (
            ("sapo.training.forward", "policy_head"),
            ("sapo.training.forward", "token_logprobs"),
            ("sapo.workflows.coldstart", "policy_head"),
        ):
            self._watch(monkeypatch, pytest.importorskip(module), name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            assert self.running, f"{name} outside of a run"
            self.within[-1].append(name)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, watched)


@pytest.mark.parametrize(
    ("objective", "within"),
    [("sapo", ["hidden", "policy_head"]), ("gspo", ["hidden", "token_logprobs", "policy_head"])],
)
def test_an_update_runs_each_microbatch_once_head_and_hidden_states_together(
    objective: str, within: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(make_policy(), objective, tokens_per_microbatch=30)
    shares = trainer.pack(make_groups())
    runs = Runs(monkeypatch)
    trainer.update(shares, 1e-3)
    assert runs.within == [within] * len(shares.microbatches)
    runs.within.clear()
    trainer.gradients(shares, {"grpo": make_objective("grpo")})
    assert runs.within == [within] * len(shares.microbatches) + [["hidden", "policy_head"]] * len(shares.microbatches)


def test_logprobs_of_policy_and_reference_are_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_policy(), kl=KLPenalty(coefficient=0.1), reference=make_policy(seed=2))
    runs = Runs(monkeypatch)
    groups = trainer.groups.attach_reference(trainer.groups.attach_old(make_groups(), sampled_at=0))
    assert groups[0].completions[0].old_logprobs != groups[0].completions[0].reference_logprobs
    assert runs.within == [["hidden", "token_logprobs"]] * 2


def test_a_cold_start_is_made_of_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import sapo

    config = sapo.load_recipe(
        "quickstart",
        [
            *("model.coldstart.target=0", "model.coldstart.max_updates=2", "model.coldstart.eval_every=2"),
            *("model.coldstart.eval_problems=8", "model.coldstart.examples=70", "rollout.max_new_tokens=8"),
        ],
    )
    runs = Runs(monkeypatch)
    train_coldstart(config)
    assert runs.within.count(["hidden", "policy_head"]) == 2
    assert all(within == ["hidden"] for within in runs.within if "policy_head" not in within)  # the proof at its start


def test_the_loss_stands_beside_the_heads_output() -> None:
    """Sharding looks for what has a graph among the elements of a tuple."""
    policy = make_policy()
    trainer = make_trainer(policy)
    (batch,) = trainer.pack(make_groups()).microbatches
    seen: list[Any] = []
    policy.run = lambda work: seen.append(work()) or seen[-1]  # type: ignore[method-assign]
    loss, head, _ = loss_and_surrogate(policy, batch, trainer.settings)
    assert isinstance(seen[0], tuple)
    assert seen[0][0] is loss is head.loss
    assert loss.requires_grad


def test_gradients_compared_leave_weights_optimizer_and_mode_as_they_were() -> None:
    trainer = make_trainer(make_policy(torch.bfloat16), activation_checkpointing=True)
    shares = trainer.pack(make_groups())
    trainer.update(shares, 1e-3)
    weights = trainer.policy.model.state_dict
    before = {k: v.clone() for k, v in {**trainer.optimizer.state_tensors(), **weights()}.items()}
    figures = trainer.gradients(shares, {"grpo": make_objective("grpo")})
    assert figures.keys() == {"grpo/cosine", "grpo/norm_ratio"}
    after = {**trainer.optimizer.state_tensors(), **weights()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert trainer.optimizer.gradients() == {}
    assert not trainer.policy.model.training
