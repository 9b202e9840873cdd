"""Cost per token as one thing grows at a time: `python -m bench.scaling`, a JSON file and docs/benchmarks-scaling.png.

Length of completions, samples of a prompt, prompts of a batch, vocabulary; for rollout and for update, each on a tiny
Qwen3 (hidden 128, 4 layers), where what is not a matrix product of the weights shows most. The slope is that of
log(cost per token) against log(size) over the upper half of the sizes: 0 is cost in proportion to the tokens, 1 is cost
that grows with their square, below 0 is overhead being shared.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.contest import Machine
from bench.machine import describe_machine
from bench.report import quick_or
from bench.sides import ours
from bench.workloads import TINY_VOCABULARY
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer, tiny_model

FILE = Path(__file__).parent / "results" / "scaling.json"
PLOT = Path(__file__).parents[1] / "docs" / "benchmarks-scaling.png"
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Size:
    """A batch. Each axis changes one of them.

    >>> Size(samples=16).tokens
    512
    """

    prompts: int = 1
    samples: int = 8
    new_tokens: int = 32
    vocabulary: int = TINY_VOCABULARY
    prompt_tokens: int = PROMPT_TOKENS

    @property
    def tokens(self) -> int:
        """Of completions."""
        return self.prompts * self.samples * self.new_tokens


AXES: dict[str, tuple[str, list[Size]]] = {
    "new_tokens": ("tokens of a completion", [Size(samples=4, new_tokens=2**k) for k in range(6, 13)]),
    "samples": (
        "samples of a prompt of 256 tokens",
        [Size(samples=2**k, prompt_tokens=256) for k in range(1, 8)],
    ),
    "prompts": ("prompts of a batch", [Size(prompts=2**k) for k in range(6)]),
    "vocabulary": ("vocabulary", [Size(vocabulary=2**k) for k in range(9, 18)]),
}
ROLES = ("rollout", "update")


def policy_of(size: Size, device: torch.device) -> Policy:
    """An untrained model with that vocabulary."""
    tokenizer = character_tokenizer("0123456789+-*%=;#")
    shape = {"hidden_size": 128, "layers": 4, "heads": 8, "kv_heads": 4, "intermediate_size": 256, "max_length": 8192}
    model = tiny_model("qwen3", size.vocabulary, seed=0, eos_token_id=17, pad_token_id=18, **shape)
    return prepare_policy(model.to(device), tokenizer)


def seconds_of(role: str, size: Size, device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repeat, after one that is not counted."""
    policy = policy_of(size, device)
    prompts = [[(7 * i + j) % 500 for j in range(size.prompt_tokens)] for i in range(size.prompts)]
    limits = [[size.new_tokens] * size.samples for _ in range(size.prompts)]
    settings = {"prompts": prompts, "limits": limits, "samples": size.samples, "minibatches": 1}
    work = {"rollout": ours.rollout_of, "update": ours.update_of}[role](policy, settings, device)
    work([[min(8, n) for n in group] for group in limits])
    return [work(limits)[0] for _ in range(repeats)]


def slope(sizes: list[float], costs: list[float]) -> float:
    """Of log cost against log size over the upper half, by least squares.

    >>> round(slope([1, 2, 4, 8], [9.0, 5.0, 10.0, 20.0]), 3)
    1.0
    """
    half = min(len(sizes) // 2, len(sizes) - 2)
    x, y = [math.log(s) for s in sizes[half:]], [math.log(c) for c in costs[half:]]
    return statistics.linear_regression(x, y).slope


def measure(machine: Machine, *, quick: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Every axis, rollout and update: microseconds per token of completions."""
    torch.set_num_threads(machine.threads)
    device = torch.device(machine.device)
    axes: dict[str, Any] = {}
    for role in ROLES:  # the first work of a process is slower, whatever its size
        seconds_of(role, Size(), device, 1)
    for axis, (title, sizes) in AXES.items():
        if quick:
            sizes = sizes[:2]
        found: dict[str, Any] = {"title": title, "sizes": [getattr(s, axis) for s in sizes], "base": asdict(sizes[0])}
        for role in ROLES:
            costs, spreads = [], []
            for size in sizes:
                times = seconds_of(role, size, device, 1 if quick or size.tokens > 4096 else 3)
                costs.append(statistics.median(times) / size.tokens * 1e6)
                spreads.append([min(times) / size.tokens * 1e6, max(times) / size.tokens * 1e6])
                say(f"{role}, {title} {getattr(size, axis)}: {costs[-1]:.0f} us/token")
            found[role] = {"us_per_token": costs, "range": spreads, "slope": slope(found["sizes"], costs)}
        axes[axis] = found
    return {"about": describe_machine(machine), "axes": axes}


def plot(result: dict[str, Any], file: Path) -> None:
    """Four panels, log against log, the slope beside each curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(16, 3.8), sharey=True, layout="constrained")
    for panel, found in zip(panels, result["axes"].values(), strict=True):
        for role, colour in zip(ROLES, ("#1b6ca8", "#c8553d"), strict=True):
            label = f"{role}, slope {found[role]['slope']:.2f}"
            panel.plot(found["sizes"], found[role]["us_per_token"], "o-", color=colour, label=label, markersize=4)
            low, high = zip(*found[role]["range"], strict=True)
            panel.fill_between(found["sizes"], low, high, color=colour, alpha=0.2, linewidth=0)
        panel.set(xscale="log", yscale="log", xlabel=found["title"])
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    panels[0].set_ylabel("microseconds per token")
    about = result["about"]
    figure.suptitle(
        f"tiny Qwen3, float32, {about['cpu']}, {about['threads']} thread, torch {about['torch']}, {about['date']}",
        fontsize=10,
    )
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the figures, draw them."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description="Cost per token as sizes grow.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two sizes of each axis, written elsewhere")
    parser.add_argument("--results", type=Path, help=f"default {FILE}")
    parser.add_argument("--plot", type=Path, help=f"default {PLOT}")
    options = parser.parse_args(arguments)
    results = options.results or quick_or(FILE, quick=options.quick)
    picture = options.plot or quick_or(PLOT, quick=options.quick)
    result = measure(Machine(options.threads, options.device), quick=options.quick)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, picture)
    print(f"wrote {results} and {picture}")


if __name__ == "__main__":
    main()
