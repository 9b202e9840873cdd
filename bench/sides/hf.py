"""transformers' side: `generate` with one padded batch, or continuous batching (`generate_batch`).

generate decodes every row until the last has its length, as it does wherever rows end at different tokens; the
criterion that stops it is one comparison. Continuous batching takes one length per call for all its requests, so its
manager is fed request by request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from bench.sides.clock import gemm_backends, timed, use_machine
from bench.sides.serve import Commands, limits_of

Limits = list[list[int]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class AtLength(StoppingCriteria):
    """Ends each row at its own length."""

    def __init__(self, limits_R: torch.Tensor, prompt_length: int) -> None:
        self.last_R = limits_R + prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """(R,) bool: which rows have their length."""
        return self.last_R <= input_ids.shape[1]


def generate(settings: dict[str, Any], device: torch.device) -> Callable[[Limits], tuple[float, int]]:
    """One call of `generate` on left-padded prompts, each repeated for its samples."""
    model = _model(settings, device)
    rows = [ids for ids in settings["prompts"] for _ in range(settings["samples"])]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)

    def work(limits: Limits) -> tuple[float, int]:
        limits_R = torch.tensor([n for group in limits for n in group], device=device)
        longest = int(limits_R.max())
        config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=longest, pad_token_id=0)
        criteria = StoppingCriteriaList([AtLength(limits_R, width)])

        def run() -> torch.Tensor:
            with torch.no_grad():
                return model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=criteria
                )

        seconds, output = timed(run, device)
        assert output.shape[1] == width + longest, "generate must not stop before the longest row"
        return seconds, int(limits_R.sum())

    return work


def continuous(settings: dict[str, Any], device: torch.device) -> Callable[[Limits], tuple[float, int]]:
    """Continuous batching with paged attention."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = _model(settings, device)
    rows = sum(map(len, settings["limits"]))
    longest_row = max(map(len, settings["prompts"])) + max(map(max, settings["limits"]))
    # Left alone it sizes its cache and batches by the whole memory of the machine and computes the padding: on a CPU
    # a step then takes minutes.
    sizes = ContinuousBatchingConfig(
        num_blocks=rows * -(-longest_row // 256) + 1,
        max_batch_tokens=max(256, rows),
        max_requests_per_batch=rows,
    )

    def work(limits: Limits) -> tuple[float, int]:
        longest = max(map(max, limits))
        config = GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, max_new_tokens=longest, pad_token_id=0, eos_token_id=-1
        )

        def run() -> int:
            tokens = 0
            with model.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=sizes, block=True
            ) as manager:
                wanted = 0
                for prompt, group in zip(settings["prompts"], limits, strict=True):
                    for count in group:
                        manager.add_request(list(prompt), max_new_tokens=count)
                        wanted += 1
                while wanted:
                    result = manager.get_result(timeout=1)
                    if result is None:
                        if not manager.is_running():
                            raise RuntimeError("its generation thread ended")
                    elif result.error is not None:
                        raise RuntimeError(result.error)
                    elif result.is_finished():
                        tokens += len(result.generated_tokens)
                        wanted -= 1
            return tokens

        return timed(run, device)

    return work


def _model(settings: dict[str, Any], device: torch.device) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=DTYPES[settings["dtype"]], attn_implementation="sdpa"
    )
    # generate fills what a config leaves open from the model's own, whose end tokens would cut rows short.
    model.generation_config = GenerationConfig()
    return model.to(device).eval()


ROLES = {"generate": generate, "continuous": continuous}


def main(commands: Commands) -> None:
    """Serve rounds until the parent hangs up."""
    settings = commands.settings
    device = use_machine(settings)
    commands.imported()
    work = ROLES[settings["role"]](settings, device)
    warm = limits_of(settings, "warm")
    work(warm)
    commands.ready(backends=gemm_backends(lambda: work(warm), device))
    for do in commands:
        seconds, tokens = work(limits_of(settings, do))
        commands.reply(seconds, tokens, tokens=tokens)
