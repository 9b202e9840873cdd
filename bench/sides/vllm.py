"""vLLM's side: `LLM.generate` in its own environment (bench/vllm_cpu.sh), prompts as token ids, lengths as told.

A prompt's samples are one request of n where their lengths are equal; here they are not, so each is a request and
the prefix cache shares the prompt. The cache is emptied before each round, as new prompts would find it.
"""

from __future__ import annotations

import os
from typing import Any

from bench.sides.clock import timed
from bench.sides.serve import Commands, limits_of

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(commands: Commands) -> None:
    """Serve rounds until the parent hangs up."""
    os.environ.update(ENVIRONMENT)
    settings = commands.settings
    import torch
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != (settings["device"] == "cpu"):
        raise RuntimeError(
            f"vLLM must be built for {settings['device']}, where the others are; got one for "
            f"{current_platform.device_type}; --vllm names another environment"
        )

    torch.set_num_threads(settings["threads"])
    sequences = sum(map(len, settings["limits"]))
    longest = max(map(len, settings["prompts"])) + max(map(max, settings["limits"]))
    on_cpu: dict[str, Any] = {} if settings["device"] == "cuda" else {"distributed_executor_backend": "uni"}
    engine = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_model_len=longest,
        max_num_seqs=max(256, sequences),
        enforce_eager=settings["device"] != "cuda",
        enable_prefix_caching=True,
        seed=0,
        **on_cpu,
    )

    def work(limits: list[list[int]]) -> tuple[float, int]:
        prompts, params = [], []
        for ids, group in zip(settings["prompts"], limits, strict=True):
            for count in group:
                prompts.append({"prompt_token_ids": ids})
                params.append(
                    SamplingParams(temperature=1.0, max_tokens=count, ignore_eos=True, logprobs=0, detokenize=False)
                )
        engine.reset_prefix_cache()
        seconds, outputs = timed(lambda: engine.generate(prompts, params, use_tqdm=False), settings["device"])
        return seconds, sum(len(o.outputs[0].token_ids) for o in outputs)

    for _ in range(2):  # as often as the other sides, which are listened to the second time
        work(limits_of(settings, "warm"))
    commands.ready()
    for do in commands:
        seconds, tokens = work(limits_of(settings, do))
        commands.reply(seconds, tokens, tokens=tokens)
