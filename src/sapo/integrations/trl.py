"""TRL's GRPOTrainer with our objectives and our policy head.

    from sapo.integrations.trl import SAPOConfig, SAPOTrainer

    args = SAPOConfig(output_dir="out", objective="sapo", objective_settings={"tau_neg": 1.05})
    SAPOTrainer(model, reward_funcs=reward, args=args, train_dataset=rows).train()

Generation, rewards, advantages and the rest stay TRL's. Of the loss, these are ours: any objective by name; the bound
on the log-ratio; one normalizer for the whole mini-batch, so that gradient accumulation changes nothing, where TRL
takes the mean of micro-batch means; the KL term (beta) under that same normalizer; the policy head, which never holds
more than a chunk of logits and sends no autograd graph through them; and what the gate did, as metrics. Options of
TRL's loss that do not fit are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

try:
    from trl import GRPOConfig, GRPOTrainer
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ModuleNotFoundError("trl is not installed; add it with: pip install 'sapo-rl[trl]'", name="trl") from None

from sapo.diagnostics import gate_metrics
from sapo.model.head import policy_head, token_logprobs
from sapo.objectives import LOG_RATIO_LIMIT, NORMALIZERS, Objective, Surrogate, make_objective, sequence_weights
from sapo.objectives.checks import unknown_option

MULTIMODAL = ("pixel_values", "num_images", "image_sizes", "token_type_ids", "mm_token_type_ids")
"""Inputs with which the model is called TRL's way."""
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Settings of a model that does more to its logits than one matrix product."""


@dataclass
class SAPOConfig(GRPOConfig):
    """GRPOConfig with the objective in place of `loss_type`, which is not read."""

    objective: str = field(
        default="sapo",
        metadata={"help": "A name in sapo.objectives.OBJECTIVES, or an objective of your own as module:Class."},
    )
    objective_settings: Any = field(
        default=None, metadata={"help": "Its hyperparameters, a dict or JSON; the paper's where left out."}
    )
    normalizer: str | None = field(
        default=None, metadata={"help": "A name in sapo.objectives.NORMALIZERS; the objective's own when left out."}
    )
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={"help": "TRL's ratio on the KL term: not here, where the term is the plain estimator k3."},
    )
    policy_head: bool = field(
        default=True, metadata={"help": "Use our policy head where the model allows it; otherwise TRL's."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.objective_settings, str):
            self.objective_settings = json.loads(self.objective_settings)
        objective = self.make_objective()
        if self.normalizer is None:
            self.normalizer = objective.normalizer
        if self.normalizer not in NORMALIZERS:
            raise unknown_option("normalizer", self.normalizer, NORMALIZERS)
        self._refuse_options_of_another_loss(objective)

    def make_objective(self) -> Objective:
        """Make the objective these settings name.

        Raises:
            ValueError: an unknown name or a wrong setting.
        """
        return make_objective(self.objective, **(self.objective_settings or {}))

    def _refuse_options_of_another_loss(self, objective: Objective) -> None:
        for name, neutral in (
            ("importance_sampling_level", "token"),
            ("delta", None),
            ("top_entropy_quantile", 1.0),
            ("off_policy_mask_threshold", None),
            ("use_bias_correction_kl", False),
            ("entropy_coef", 0.0),
            ("use_adaptive_entropy", False),
        ):
            if (got := getattr(self, name)) != neutral:
                raise ValueError(f"{name} is no part of {self.objective}; got {got!r}; leave it at {neutral!r}")
        assert self.steps_per_generation is not None, "GRPOConfig sets it"
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                "steps_per_generation must be a multiple of gradient_accumulation_steps, so that a mini-batch is known "
                f"at its start; got {self.steps_per_generation} and {self.gradient_accumulation_steps}; raise the first"
            )
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        by_token = not str(self.vllm_importance_sampling_mode).startswith("sequence")
        if corrected and (objective.name == "maspo" or (objective.shared_advantage and by_token)):
            raise ValueError(
                f"{objective.name} takes one advantage per response, which vLLM's correction of each token would vary; "
                f"got {self.vllm_importance_sampling_mode!r}; set vllm_importance_sampling_correction=False"
            )


@dataclass
class _Window:
    """The mini-batch whose micro-batches are under way, and what they have said so far."""

    num_sequences: int
    num_tokens: int
    left: int
    log_ratio_M: list[Tensor] = field(default_factory=list)
    weight_M: list[Tensor] = field(default_factory=list)
    advantage_M: list[Tensor] = field(default_factory=list)
    entropy_M: list[Tensor] = field(default_factory=list)
    kl_M: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Tokens:
    """The response tokens of a micro-batch, flat."""

    selected_BT: Tensor
    sequence_M: Tensor
    advantage_M: Tensor
    weight_M: Tensor
    """Weight of each in the loss of the mini-batch."""
    old_logprob_M: Tensor | None
    """None on policy: log pi itself."""
    ref_logprob_M: Tensor | None
    num_sequences: int


@dataclass(frozen=True)
class _Forward:
    """A micro-batch's part of the loss and what was seen on the way."""

    loss: Tensor
    log_ratio_M: Tensor
    surrogate: Surrogate
    entropy_M: Tensor
    kl_M: Tensor | None


class SAPOTrainer(GRPOTrainer):
    """GRPOTrainer whose loss is an objective of ours; see the head of this file.

    Args:
        args: a SAPOConfig; every other argument is GRPOTrainer's.
    """

    _tag_names = ["trl", "sapo"]  # noqa: RUF012 TRL's own way
    _name = "SAPO"
    args: SAPOConfig
    model: Any
    objective: Objective
    _buffered_inputs: Any

    def __init__(self, model: Any, reward_funcs: Any, args: SAPOConfig | None = None, **options: Any) -> None:
        if args is None:
            args = SAPOConfig(output_dir="sapo")
        if not isinstance(args, SAPOConfig):
            raise ValueError(f"args must be a SAPOConfig; got {type(args).__name__}; import it from here")
        self.objective = args.make_objective()
        self._window: _Window | None = None
        super().__init__(model, reward_funcs, args=args, **options)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        train = self.model.training
        if self._window is None:
            self._window = self._open_window(inputs, train)
        window = self._window
        try:
            tokens = self._select(inputs, window)
            run = self._through_policy_head if self._head_applies(model, inputs) else self._through_log_probs
            out = run(model, inputs, tokens)
        except BaseException:
            self._window = None
            raise
        window.log_ratio_M.append(out.log_ratio_M)
        window.weight_M.append(out.surrogate.weight_M)
        window.advantage_M.append(tokens.advantage_M)
        window.entropy_M.append(out.entropy_M)
        if out.kl_M is not None:
            window.kl_M.append(out.kl_M)
        window.left -= 1
        if window.left == 0:
            self._log_window(window, "train" if train else "eval")
            self._window = None
        # Gradients are averaged over processes, and the counts are those of all of them.
        return out.loss * self.accelerator.num_processes

    def _open_window(self, inputs: dict[str, Any], train: bool) -> _Window:
        """Count the mini-batch that begins here: its micro-batches lie in the buffer already."""
        parts = [inputs]
        if train:
            steps, held = self.current_gradient_accumulation_steps, self.args.steps_per_generation
            assert held is not None, "GRPOConfig sets it"
            first = self._step % held
            if first + steps > held:
                raise RuntimeError(
                    f"a mini-batch of {steps} micro-batches does not fit what is left of {held} in the buffer after "
                    f"{first}; set steps_per_generation to a multiple of gradient_accumulation_steps"
                )
            parts = [self._buffered_inputs[first + k] for k in range(steps)]
        masks = [_response_mask(part) for part in parts]
        own = torch.tensor([sum(m.shape[0] for m in masks), sum(int(m.sum()) for m in masks)], dtype=torch.float64)
        counts = self.accelerator.reduce(own.to(self.accelerator.device), reduction="sum").tolist()
        return _Window(int(counts[0]), int(counts[1]), len(parts))

    def _select(self, inputs: dict[str, Any], window: _Window) -> _Tokens:
        assert self.args.normalizer is not None, "SAPOConfig sets it"
        selected_BT = _response_mask(inputs)
        sequence_M = selected_BT.nonzero()[:, 0]
        weights_B = sequence_weights(
            selected_BT.sum(1),
            self.args.normalizer,
            num_sequences=window.num_sequences,
            num_tokens=window.num_tokens,
            max_length=self.max_completion_length,
        )
        advantages = inputs["advantages"]
        if self.use_vllm and self.vllm_importance_sampling_correction:
            advantages = advantages.reshape(len(selected_BT), -1) * inputs["importance_sampling_ratio"]
            advantages = advantages.expand_as(selected_BT)
        old_BT, ref_BT = inputs.get("old_per_token_logps"), inputs.get("ref_per_token_logps")
        return _Tokens(
            selected_BT=selected_BT,
            sequence_M=sequence_M,
            advantage_M=advantages[sequence_M] if advantages.dim() == 1 else advantages[selected_BT],
            weight_M=weights_B[sequence_M],
            old_logprob_M=None if old_BT is None else old_BT[selected_BT].double(),
            ref_logprob_M=ref_BT[selected_BT].double() if self.beta != 0.0 and ref_BT is not None else None,
            num_sequences=len(selected_BT),
        )

    def _head_applies(self, model: Any, inputs: dict[str, Any]) -> bool:
        """Return whether the policy head can replace the model's: one process, plain text, a plain output embedding."""
        if not self.args.policy_head or self.accelerator.num_processes > 1 or self.aux_loss_enabled:
            return False
        if self.args.cast_lm_head_to_fp32 or any(inputs.get(name) is not None for name in MULTIMODAL):
            return False
        inner = _inner_model(self.accelerator.unwrap_model(model))
        config = inner.config.get_text_config()
        # Not a subclass: an adapter on the output embedding is one.
        plain = type(inner.get_output_embeddings()) is nn.Linear
        return plain and all(getattr(config, name, None) is None for name in SCALED_LOGITS)

    def _through_policy_head(self, model: Any, inputs: dict[str, Any], tokens: _Tokens) -> _Forward:
        """Compute hidden states, then log pi, slopes and gradients one chunk of logits at a time."""
        inner = _inner_model(self.accelerator.unwrap_model(model))
        ids_BL = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask_BL = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            hidden_BLH = inner.base_model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
        length, head = tokens.selected_BT.shape[1], inner.get_output_embeddings()
        hidden_MH = hidden_BLH[:, -length - 1 : -1][tokens.selected_BT].to(head.weight.dtype)
        target_M = inputs["completion_ids"][tokens.selected_BT]
        options = {"bias_V": head.bias, "temperature": self.temperature}
        whole: Surrogate | None = None
        if self.objective.coupled:  # a token's slope needs the whole sequence: a first pass for log pi
            logprob_M = token_logprobs(hidden_MH.detach(), head.weight, target_M, **options).double()
            whole = self._surrogate(logprob_M, tokens, slice(None))
        parts: list[Surrogate] = []

        def loss_and_coefficient(logprob: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            logprob = logprob.double()
            part = self._surrogate(logprob, tokens, at) if whole is None else _slice(whole, at)
            parts.append(part)
            value, slope = part.value_M, part.slope_M
            if tokens.ref_logprob_M is not None:
                kl, kl_slope = _kl(logprob, tokens.ref_logprob_M[at])
                value, slope = value - self.beta * kl, slope - self.beta * kl_slope
            weight = tokens.weight_M[at]
            return -(weight * value).sum(), -weight * slope

        out = policy_head(hidden_MH, head.weight, target_M, loss_and_coefficient, entropy=True, **options)
        logprob_M = out.logprob_M.double()
        assert out.entropy_M is not None
        return _Forward(
            loss=out.loss,
            log_ratio_M=self._log_ratio(logprob_M, tokens, slice(None)),
            surrogate=_join(parts, logprob_M),
            entropy_M=out.entropy_M,
            kl_M=None if tokens.ref_logprob_M is None else _kl(logprob_M, tokens.ref_logprob_M)[0],
        )

    def _through_log_probs(self, model: Any, inputs: dict[str, Any], tokens: _Tokens) -> _Forward:
        """Apply our objective to TRL's differentiable log-probabilities, by autograd."""
        logprob_BT, entropy_BT, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in (*MULTIMODAL, "image_grid_thw", "pixel_attention_mask")},
            **{name: inputs.get(name) for name in ("spatial_shapes", "num_tiles", "image_position_ids")},
        )
        logprob_M = logprob_BT[tokens.selected_BT].double()
        surrogate = self._surrogate(logprob_M, tokens, slice(None))
        value_M, kl_M = surrogate.value_M, None
        if tokens.ref_logprob_M is not None:
            kl_M = _kl(logprob_M, tokens.ref_logprob_M)[0]
            value_M = value_M - self.beta * kl_M
        loss = -(tokens.weight_M * value_M).sum().to(logprob_BT.dtype)
        if aux_loss is not None:
            steps = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / steps / self.accelerator.num_processes
        return _Forward(
            loss=loss,
            log_ratio_M=self._log_ratio(logprob_M.detach(), tokens, slice(None)),
            surrogate=surrogate,
            entropy_M=entropy_BT[tokens.selected_BT].detach(),
            kl_M=None if kl_M is None else kl_M.detach(),
        )

    def _log_ratio(self, logprob: Tensor, tokens: _Tokens, at: slice) -> Tensor:
        return logprob - (logprob.detach() if tokens.old_logprob_M is None else tokens.old_logprob_M[at])

    def _surrogate(self, logprob: Tensor, tokens: _Tokens, at: slice) -> Surrogate:
        old = logprob.detach() if tokens.old_logprob_M is None else tokens.old_logprob_M[at]
        advantage, sequence = tokens.advantage_M[at].double(), tokens.sequence_M[at]
        return self.objective.surrogate(logprob - old, advantage, sequence, tokens.num_sequences, old)

    def _log_window(self, window: _Window, mode: str) -> None:
        """Log metrics of one mini-batch over the tokens of every process."""
        gathered = self._gather(window.log_ratio_M), self._gather(window.weight_M), self._gather(window.advantage_M)
        metrics = gate_metrics(*gathered)
        if metrics:
            metrics["entropy"] = self._gather(window.entropy_M).mean().item()
            if window.kl_M:
                metrics["kl"] = self._gather(window.kl_M).mean().item()
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _gather(self, parts: list[Tensor]) -> Tensor:
        own = torch.cat(parts).detach().double()
        if self.accelerator.num_processes == 1:
            return own
        padded = self.accelerator.pad_across_processes(own, dim=0, pad_index=float("nan"))
        everything: Tensor = self.accelerator.gather(padded)
        return everything[~everything.isnan()]


def _response_mask(inputs: dict[str, Any]) -> Tensor:
    """Return the tokens the policy wrote: those of a tool's answer are masked out."""
    mask_BT: Tensor = inputs["completion_mask"].bool()
    return mask_BT & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask_BT


def _inner_model(model: Any) -> Any:
    """Return the language model inside an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _kl(logprob: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate KL(pi, ref) at each token by k3, with its derivative in log pi, within the bound of our ratios."""
    gap = (reference - logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return gap.exp() - gap - 1, 1 - gap.detach().exp()


def _slice(surrogate: Surrogate, at: slice) -> Surrogate:
    return Surrogate(surrogate.value_M[at], surrogate.slope_M[at], surrogate.weight_M[at])


def _join(parts: list[Surrogate], like: Tensor) -> Surrogate:
    """Join the chunks of the head; empty where there was no response token."""
    pick: Callable[[str], Tensor] = lambda f: torch.cat([getattr(p, f) for p in parts] or [like.new_zeros(0)])  # noqa: E731
    return Surrogate(pick("value_M"), pick("slope_M"), pick("weight_M"))
