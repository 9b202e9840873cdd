"""A padded batch on transformers' own forward: each response behind its own copy of the prompt, the loss by sapo's.

What a trainer does that shares no prompt. Log pi_old is log pi without its gradient, as in the first mini-batch of a
step; the head multiplies response tokens alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.rewards import of_place
from bench.sides.clock import gemm_backends, timed, use_machine
from bench.sides.hf import DTYPES
from bench.sides.serve import LEARNING_RATE, Commands, completions_of, limits_of
from sapo.objectives import group_advantages, policy_loss

Limits = list[list[int]]


class RowsTrainer:
    """A model and its optimizer."""

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=DTYPES[settings["dtype"]], attn_implementation="sdpa"
        ).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def update(self, limits: Limits) -> dict[str, Any]:
        """Make one step of the optimizer on the given completions."""
        ids_BT, mask_BT, advantages = self._rows(limits)
        hidden_BTH = self.model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
        at = mask_BT[:, 1:].nonzero(as_tuple=True)
        logits_MV = self.model.get_output_embeddings()(hidden_BTH[:, :-1][at]).float()
        logp_M = -F.cross_entropy(logits_MV, ids_BT[:, 1:][at], reduction="none")
        logp_BT = logp_M.new_zeros(mask_BT[:, 1:].shape).index_put(at, logp_M)
        loss = policy_loss("sapo", logp_BT, logp_BT.detach(), advantages, mask_BT[:, 1:])
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {"tokens": sum(map(sum, limits)), "losses": [float(loss)], "norms": [float(norm)]}

    def _rows(self, limits: Limits) -> tuple[Tensor, Tensor, Tensor]:
        rows, lengths, advantages = [], [], []
        for prompt, samples in zip(self.settings["prompts"], completions_of(limits), strict=True):
            rows += [prompt + ids for ids in samples]
            lengths += [len(prompt)] * len(samples)
            group = torch.tensor([of_place(len(advantages) * len(samples) + j) for j in range(len(samples))])
            advantages.append(group_advantages(group.double(), "group_std").float())
        width = max(map(len, rows))
        ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        place_T = torch.arange(width)
        mask_BT = torch.stack([(place_T >= n) & (place_T < len(row)) for n, row in zip(lengths, rows, strict=True)]).to(
            self.device
        )
        return ids_BT, mask_BT, torch.cat(advantages).to(self.device)


def main(commands: Commands) -> None:
    """Serve rounds until the parent hangs up."""
    settings = commands.settings
    assert settings["minibatches"] == 1, "log pi_old is log pi in the first mini-batch alone"
    device = use_machine(settings)
    commands.imported()
    trainer = RowsTrainer(settings, device)
    warm = limits_of(settings, "warm")
    trainer.update(warm)
    backends = gemm_backends(lambda: trainer.update(warm), device, {})
    commands.ready(backends=backends)
    for do in commands:
        limits = limits_of(settings, do)
        seconds, facts = timed(lambda limits=limits: trainer.update(limits), device)
        commands.reply(seconds, sum(map(sum, limits)), **facts)
