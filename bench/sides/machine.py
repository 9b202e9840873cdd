"""The machine's side: what it can do at best, measured in the same rounds as everything else.

Matrix products of 512 tokens by 1024 x 4096, the fastest of the ways torch offers, and reading and adding up 256 MiB;
on a GPU, which would do these in microseconds, 8192 tokens by 8192 x 8192, and 4 GiB. One thread count for all.
These are the limits that a share of the limit refers to.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bench.sides.clock import timed, use_machine
from bench.sides.serve import Commands

PRODUCT = {"cpu": (512, 1024, 4096), "cuda": (8192, 8192, 8192)}
"""Tokens, input and output."""

BANDWIDTH_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}


def products(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to multiply, by name."""
    tokens, inputs, outputs = PRODUCT[device.type]
    x = torch.randn(tokens, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    ways: dict[str, Callable[[], torch.Tensor]] = {"torch.mm": lambda: x @ weight.T}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # The global switches for oneDNN would change the process; this is its matrix product called by name.
        pointwise = torch.ops.mkldnn._linear_pointwise
        ways["oneDNN linear"] = lambda: pointwise(x, weight, None, "none", [], "")
    return ways


def gemm_rate(device: torch.device, dtype: torch.dtype, repeats: int = 8) -> tuple[float, str]:
    """Floating-point operations per second of the fastest way, and its name."""
    flops = 2.0 * math.prod(PRODUCT[device.type]) * repeats
    rates = []
    for name, multiply in products(device, dtype).items():
        multiply()
        seconds, _ = timed(lambda multiply=multiply: [multiply() for _ in range(repeats)], device)  # type: ignore[misc]
        rates.append((flops / seconds, name))
    return max(rates)


def bandwidth(device: torch.device) -> float:
    """Bytes read per second."""
    size = BANDWIDTH_BYTES[device.type]
    x = torch.ones(size // 4, device=device)
    x.sum()
    seconds, _ = timed(lambda: [x.sum() for _ in range(4)], device)
    return 4 * size / seconds


def main(commands: Commands) -> None:
    """Serve rounds until the parent hangs up."""
    device = use_machine(commands.settings)
    commands.ready()
    for _ in commands:
        float32, float32_by = gemm_rate(device, torch.float32)
        bfloat16, bfloat16_by = gemm_rate(device, torch.bfloat16)
        read = bandwidth(device)
        commands.reply(
            1.0, 1.0, float32=float32, float32_by=float32_by, bfloat16=bfloat16, bfloat16_by=bfloat16_by, read=read
        )
