"""The loss functions of TRL, Liger and verl as subjects, called as their trainers call them.

No code of theirs is copied. TRL's losses are methods of its trainers; they run here on a stand-in that holds the
settings they read. Liger's take hidden states and an output embedding, which are made so that log pi is that of the
case. verl's take its actor's configuration. Each subject names the objective it is compared with, at the neighbour's
settings where the objective has them and at the paper's otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sapo.conformance.cases import Batch
from sapo.conformance.subjects import MAX_LENGTH, Loss, Subject, Whole, own_subjects
from sapo.errors import ConfigError
from sapo.objectives import make_objective


@dataclass(frozen=True)
class Family:
    """A group of losses that are judged together: ours, or a neighbour's."""

    name: str
    package: str
    """Distribution whose version is reported."""
    install: str
    """Command that installs it."""
    subjects: Callable[[], list[Subject]]

    def version(self) -> str:
        """Return the installed version.

        Raises:
            ConfigError: it is not installed.
        """
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            raise ConfigError(f"{self.package} is not installed; {self.install}") from None

    def load(self) -> list[Subject]:
        """Return its subjects.

        Raises:
            ConfigError: it is not installed, or does not import here.
        """
        self.version()
        try:
            return self.subjects()
        except ImportError as error:
            raise ConfigError(
                f"{self.package} {self.version()} does not import here: {error}; {self.install}"
            ) from error


# TRL

CLIP = {"eps_low": 0.2, "eps_high": 0.28}
TRL_LOSSES: tuple[tuple[str, str, str, dict[str, Any], dict[str, Any]], ...] = (
    # name, objective, normalizer, settings of the objective, settings of TRL
    ("sapo", "sapo", "sequence_mean", {}, {}),
    ("grpo", "grpo", "sequence_mean", CLIP, {}),
    ("dr_grpo", "dr_grpo", "constant_length", CLIP, {}),
    ("dapo", "dapo", "token_mean", CLIP, {}),
    ("gspo", "gspo", "sequence_mean", CLIP, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ("luspo", "luspo", "sequence_sum", CLIP, {"importance_sampling_level": "sequence"}),
    ("cispo", "cispo", "token_mean", {"ratio_cap": 5.0}, {}),
    ("vespo", "vespo", "token_mean", {}, {}),
    ("rloo", "rloo", "sequence_sum", CLIP, {}),
    ("gmpo", "gmpo", "sequence_mean", {"log_low": 0.4, "log_high": 0.4}, {}),
)


def trl_subjects() -> list[Subject]:
    """Return the losses of TRL's GRPOTrainer under each loss_type, its RLOOTrainer and its experimental GMPOTrainer."""
    return [_trl(*row) for row in TRL_LOSSES]


def _trl(name: str, objective: str, normalizer: str, hyper: dict[str, Any], options: dict[str, Any]) -> Subject:
    where, class_name = {
        "rloo": ("trl.trainer.rloo_trainer", "RLOOTrainer"),
        "gmpo": ("trl.experimental.gmpo.gmpo_trainer", "GMPOTrainer"),
    }.get(name, ("trl.trainer.grpo_trainer", "GRPOTrainer"))
    trainer_class = getattr(import_module(where), class_name)
    settings = {"loss_type": name, "importance_sampling_level": "token", **options}
    claimed = make_objective(objective, **hyper)

    def with_settings(other: dict[str, Any]) -> Loss:
        if name == "sapo" and other:  # its configuration checks them
            renamed = {f"sapo_temperature_{k.removeprefix('tau_')}": v for k, v in other.items()}
            import_module("trl").GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **renamed)
        read = {**asdict(claimed), **other}

        def loss(batch: Batch, whole: Whole) -> Tensor:
            steps = whole.num_microbatches
            trainer = _trl_stand_in(trainer_class, batch.logp_BT, read, steps, settings)
            out: Tensor = trainer_class._compute_loss(trainer, None, _trl_inputs(batch, whole.num_tokens))
            # RLOOTrainer leaves the division to transformers' Trainer; the others divide themselves.
            return out / steps if name == "rloo" else out

        return loss

    shown = {k: v for k, v in settings.items() if k == "loss_type" or v == "sequence"}
    call = f"{class_name}._compute_loss" + ("" if name in ("rloo", "gmpo") else f", {shown}")
    remake = with_settings if name in ("sapo", "vespo") else None
    return Subject(f"trl {name}", claimed, normalizer, with_settings({}), remake, call=call)


def _trl_stand_in(
    trainer_class: Any, logp_BT: Tensor, hyper: dict[str, Any], steps: int, settings: dict[str, Any]
) -> SimpleNamespace:
    """Return the attributes of a trainer that `_compute_loss` reads."""
    temperatures = {f"sapo_temperature_{sign}": hyper.get(f"tau_{sign}", 1.0) for sign in ("pos", "neg")}
    gamma = {f"vespo_{k}": hyper.get(k, 1.0) for k in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp_BT, torch.zeros_like(logp_BT), None),
        args=SimpleNamespace(delta=None, steps_per_generation=steps, **temperatures, **gamma),
        get_gamma_weights=getattr(trainer_class, "get_gamma_weights", None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        epsilon_low=hyper.get("log_low", hyper.get("eps_low", 0.2)),
        epsilon_high=hyper.get("ratio_cap", hyper.get("log_high", hyper.get("eps_high", 0.2))),
        beta=0.0,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=steps,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        **settings,
    )


def _trl_inputs(batch: Batch, tokens: int) -> dict[str, Tensor]:
    ids_BT = torch.zeros(batch.mask_BT.shape, dtype=torch.int64)
    # RLOOTrainer is given sums over response tokens, masked where they were made.
    old_B = torch.where(batch.mask_BT, batch.logp_old_BT, 0.0).sum(1)
    return {
        "prompt_ids": ids_BT[:, :1],
        "prompt_mask": torch.ones_like(ids_BT[:, :1]),
        "completion_ids": ids_BT,
        "completion_mask": batch.mask_BT.long(),
        "advantages": batch.advantages_B,
        "old_per_token_logps": batch.logp_old_BT,
        "old_logps": old_B,
        "num_items_in_batch": torch.tensor(float(tokens)),
    }


# Liger

LIGER_LOSSES = tuple(row for row in TRL_LOSSES if row[0] not in ("rloo", "gmpo"))


def liger_subjects() -> list[Subject]:
    """Return LigerFusedLinearGRPOLoss under each loss_type; it computes in float32 only."""
    return [_liger(*row) for row in LIGER_LOSSES]


def _liger(name: str, objective: str, normalizer: str, hyper: dict[str, Any], options: dict[str, Any]) -> Subject:
    build = import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    claimed, settings = make_objective(objective, **hyper), {"loss_type": name, **options}

    def with_settings(other: dict[str, Any]) -> Loss:
        read = {**asdict(claimed), **other}
        module = build(
            beta=0.0,
            compiled=False,
            use_ref_model=False,
            max_completion_length=MAX_LENGTH,
            epsilon_low=read.get("eps_low", 0.2),
            epsilon_high=read.get("ratio_cap", read.get("eps_high", 0.2)),
            **{f"sapo_temperature_{k.removeprefix('tau_')}": v for k, v in read.items() if k.startswith("tau_")},
            **{f"vespo_{k}": v for k, v in read.items() if k.startswith(("k_", "lambda_"))},
            **settings,
        )

        def loss(batch: Batch, whole: Whole) -> Tensor:
            given, dtype = _liger_inputs(batch), batch.logp_BT.dtype
            out, _ = module(
                *given,
                batch.mask_BT.to(dtype),
                batch.advantages_B,
                old_per_token_logps=batch.logp_old_BT,
                num_items_in_batch=whole.num_tokens,
            )
            # A mean over responses is one of this micro-batch: its caller divides by the steps of accumulation.
            scaled: Tensor = out / (1 if normalizer == "token_mean" else whole.num_microbatches)
            return scaled

        return loss

    return Subject(
        name=f"liger {name}",
        objective=claimed,
        normalizer=normalizer,
        loss=with_settings({}),
        remake=with_settings if name in ("sapo", "vespo") else None,
        dtypes=(torch.float32,),
        rtol=2e-4,
        call=f"LigerFusedLinearGRPOLoss, {settings}",
    )


def _liger_inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, output embedding and tokens whose log-probabilities are the batch's.

    The log-probabilities are differentiable in the batch's. There are two logits, h and 0, and the first token is the
    sampled one: log pi = log sigmoid(h), so h = log pi - log(1 - pi).
    """
    hidden_BTH = (batch.logp_BT - torch.log(-torch.expm1(batch.logp_BT)))[..., None]
    head_VH = torch.tensor([[1.0], [0.0]], dtype=batch.logp_BT.dtype)
    return hidden_BTH, head_VH, torch.zeros(batch.mask_BT.shape, dtype=torch.int64)


# verl

VERL_LOSSES: tuple[tuple[str, str, str, dict[str, Any], dict[str, Any]], ...] = (
    # name, objective, normalizer, settings of the objective, settings of verl's actor
    ("sapo", "sapo", "sequence_mean", {}, {}),
    ("vanilla", "grpo", "sequence_mean", {"eps_low": 0.2, "eps_high": 0.27}, {"clip_ratio_high": 0.27}),
    ("gspo", "gspo", "sequence_mean", {}, {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
    # No lower bound, as in the paper: verl's is 1 - clip_ratio_low.
    ("cispo", "cispo", "token_mean", {"ratio_cap": 5.0}, {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
    ("geo_mean", "gmpo", "sequence_mean", {}, {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}),
    ("dppo_tv", "dppo_tv", "token_mean", {}, {"clip_ratio_c": 20.0}),
)
VERL_AGGREGATIONS = {"sequence_mean": "seq-mean-token-mean", "token_mean": "token-mean"}


def verl_subjects() -> list[Subject]:
    """Return verl's policy losses for which we have an objective, by their names in its registry."""
    return [_verl(*row) for row in VERL_LOSSES]


def _verl(name: str, objective: str, normalizer: str, hyper: dict[str, Any], options: dict[str, Any]) -> Subject:
    function = import_module("verl.trainer.ppo.core_algos").get_policy_loss_fn(name)
    actor_config = import_module("verl.workers.config").ActorConfig
    aggregation = VERL_AGGREGATIONS[normalizer]

    def with_settings(other: dict[str, Any]) -> Loss:
        config = actor_config(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **{**options, **other})

        def loss(batch: Batch, whole: Whole) -> Tensor:
            counts = {"batch_num_tokens": whole.num_tokens, "global_batch_size": whole.num_sequences}
            config.global_batch_info.update(dp_size=1, loss_scale_factor=None, **counts)
            out, _ = function(
                old_log_prob=batch.logp_old_BT,
                log_prob=batch.logp_BT,
                advantages=batch.advantages_B[:, None].expand_as(batch.logp_BT),
                response_mask=batch.mask_BT,
                loss_agg_mode=aggregation,
                config=config,
            )
            scalar: Tensor = out
            return scalar

        return loss

    claimed, shown = make_objective(objective, **hyper), {**options, "loss_agg_mode": aggregation}
    remake = with_settings if name == "sapo" else None
    call = f"get_policy_loss_fn({name!r}), {shown}"
    return Subject(f"verl {name}", claimed, normalizer, with_settings({}), remake, call=call)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("sapo", "sapo-rl", "pip install sapo-rl", own_subjects),
        Family("trl", "trl", "pip install 'sapo-rl[peers]'", trl_subjects),
        Family("liger", "liger-kernel", "pip install 'sapo-rl[peers]'", liger_subjects),
        Family(
            "verl", "verl", "make test-verl, then .venv-verl/bin/python -m sapo.cli conformance verl", verl_subjects
        ),
    )
}
"""The families by their names on the command line."""
