"""The first look at a GPU: rates, head, attention, decoding, an update and a step, in one process without disk or hub.

    python -m bench.gpu ceilings head flex decode update step --shape 0.6B --results bench/results/h200
    python -m bench.gpu all --device cpu --quick          that it works; its figures mean nothing

Models are built from their shapes on the device with random weights, and lengths are forced by limits. Each part
prints a line (seconds, share of the rate measured in the same call, peak bytes) and appends it as JSON to the results.
No GPU has run it yet.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.contest import Machine
from bench.limits import Rates, Shape, decode_seconds, train_seconds
from bench.machine import describe_machine
from sapo.data import Completion, Group, Prompt, Segment
from sapo.model.attention import TreeLayout
from sapo.model.head import policy_head
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer
from sapo.objectives import make_objective
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.training.batch import pack
from sapo.training.optimizer import PolicyOptimizer
from sapo.training.settings import TrainerSettings
from sapo.training.trainer import Trainer

ALPHABET = "0123456789+-*%=;#"

SHAPES: dict[str, dict[str, int]] = {
    name: {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": size, "intermediate_size": inner, "vocab_size": vocabulary,
    }
    for name, (hidden, layers, heads, kv_heads, size, inner, vocabulary) in {
        "tiny": (32, 2, 2, 1, 16, 48, 64),
        "0.6B": (1024, 28, 16, 8, 128, 3072, 151936),
        "4B": (2560, 36, 32, 8, 128, 9728, 151936),
    }.items()
}  # fmt: skip
"""Qwen3's, with tied embeddings, and one that a processor has done with in a second."""


@dataclass(frozen=True)
class Work:
    """How much is drawn and trained on: prompts, samples of each, and the bounds of their lengths."""

    prompts: int
    samples: int
    prompt: tuple[int, int]
    completion: tuple[int, int]
    response_tokens: int
    """Of the head alone."""


WHOLE = Work(32, 8, (200, 300), (256, 1024), 8192)
QUICK = Work(2, 2, (4, 8), (4, 12), 16)


class Bench:
    """One model on one device, and what is measured of it."""

    def __init__(self, shape: str, device: str, work: Work, results: Path | None) -> None:
        self.name, self.shape, self.device, self.work = shape, SHAPES[shape], torch.device(device), work
        self.on_gpu = self.device.type == "cuda"
        self.results = results
        random = np.random.default_rng(0)
        self.prompt_lengths = random.integers(*work.prompt, work.prompts, endpoint=True).tolist()
        self.limits = random.integers(*work.completion, (work.prompts, work.samples), endpoint=True).tolist()

    def report(self, part: str, seconds: float, limit: float | None = None, **more: Any) -> None:
        """Print a line, and append it to the results."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.on_gpu else None
        found = {"part": part, "shape": self.name, "seconds": seconds, "limit": limit, "peak_bytes": peak, **more}
        share = "" if limit is None else f", {limit / seconds:.0%} of the limit"
        memory = "" if peak is None else f", peak {peak / 1e9:.1f} GB"
        rest = "".join(f", {key} {value:.4g}" for key, value in more.items())
        print(f"{part:10} {self.name:5} {seconds * 1e3:10.2f} ms{share}{memory}{rest}", flush=True)
        if self.results is not None:
            about = describe_machine(Machine(torch.get_num_threads(), self.device.type))
            with (self.results / "gpu.jsonl").open("a") as file:
                file.write(json.dumps({**found, "about": about}) + "\n")

    def seconds(self, run: Callable[[], Any], times: int = 3) -> float:
        """The least of a few rounds, after one that warms up."""
        run()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        taken = []
        for _ in range(times):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            taken.append(time.perf_counter() - started)
        return min(taken)

    def wait(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @cached_property
    def rates(self) -> Rates:
        """Products and reading of this device, measured."""
        side, elements = (8192, 2**28) if self.on_gpu else (256, 2**20)
        left, right = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        read = torch.zeros(elements, device=self.device)
        flops = 2 * side**3 / self.seconds(lambda: left @ right)
        return Rates(flops, 4 * elements / self.seconds(read.sum))

    @cached_property
    def policy(self) -> Policy:
        """A policy of random weights."""
        tokenizer = character_tokenizer(ALPHABET)
        config = Qwen3Config(
            **self.shape, tie_word_embeddings=True, max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        with torch.device(self.device):
            torch.manual_seed(0)
            model = Qwen3ForCausalLM(config).to(torch.bfloat16)
        return prepare_policy(model, tokenizer)

    @cached_property
    def groups(self) -> list[Group]:
        """What `decode` would draw, with advantages of both signs."""
        random = np.random.default_rng(1)
        return [
            Group(
                Prompt(i, "bench", "", tuple(random.integers(0, len(ALPHABET), length).tolist())),
                tuple(Completion((3,) * n, (-1.0,) * n, "length", "") for n in limits),
                tuple(float((-1) ** j) for j in range(len(limits))),
            )
            for i, (length, limits) in enumerate(zip(self.prompt_lengths, self.limits, strict=True))
        ]

    @cached_property
    def trainer(self) -> Trainer:
        """SAPO with AdamW."""
        named = list(self.policy.model.named_parameters())
        optimizer = PolicyOptimizer(named, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, grad_clip=1.0)
        return Trainer(self.policy, optimizer, TrainerSettings(objective=make_objective("sapo"), temperature=1.0))

    @cached_property
    def engine(self) -> LocalEngine:
        """Our own, with graphs where there are any."""
        return LocalEngine(self.policy)

    def ceilings(self) -> None:
        """Products and reading."""
        self.report("ceilings", 1e-3, TFLOPs=self.rates.flops / 1e12, GBps=self.rates.read / 1e9)

    def head(self) -> None:
        """The policy head, forward and backward."""
        tokens, hidden, vocabulary = self.work.response_tokens, self.shape["hidden_size"], self.shape["vocab_size"]
        hidden_MH, weight_VH = (
            (torch.randn(n, hidden, device=self.device) * 0.02).to(torch.bfloat16).requires_grad_()
            for n in (tokens, vocabulary)
        )
        target_M = torch.arange(tokens, device=self.device) % vocabulary

        def run() -> None:
            policy_head(hidden_MH, weight_VH, target_M, lambda lp, _: (lp.sum(), torch.ones_like(lp))).loss.backward()
            hidden_MH.grad = weight_VH.grad = None

        self.report("head", self.seconds(run), 6 * tokens * vocabulary * hidden / self.rates.flops)

    def flex(self) -> None:
        """Attention of one layer over a tree, forward and backward; the first call compiles."""
        segments = [Segment(0, self.prompt_lengths[0], -1)]
        for limit in self.limits[0]:
            segments.append(Segment(segments[-1].stop, limit, 0))
        heads, kv, size = (self.shape[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        inputs = [
            torch.randn(segments[-1].stop, n, size, device=self.device, dtype=torch.bfloat16, requires_grad=True)
            for n in (heads, kv, kv)
        ]
        layout = TreeLayout(segments, self.device)

        def run() -> None:
            output = layout.attend(0, *inputs, size**-0.5, None)
            torch.autograd.grad(output.sum(), inputs)

        started = time.perf_counter()
        run()
        self.wait()
        first = time.perf_counter() - started
        self.report("flex", self.seconds(run), first=first, tokens=segments[-1].stop)

    def draw(self) -> None:
        """One rollout of forced lengths."""
        requests = [
            Request(group.prompt, len(limits), limits=tuple(limits))
            for group, limits in zip(self.groups, self.limits, strict=True)
        ]
        self.engine.generate(requests, SamplingParams(max_new_tokens=max(map(max, self.limits))))

    def decode(self) -> None:
        """Two rollouts: the second repeats the graphs of the first."""
        tokens = sum(map(sum, self.limits))
        limit = decode_seconds(Shape.of(self.shape), self.prompt_lengths, self.limits, self.rates, 2)
        started = time.perf_counter()
        self.draw()
        self.wait()
        first = time.perf_counter() - started
        taken = self.seconds(self.draw, times=1)
        kept = self.engine._kept
        graphs = 0 if kept is None or kept.device_steps is None else len(kept.device_steps.captured)
        self.report("decode", taken, limit, first=first, tokens_per_second=tokens / taken, graphs=graphs)

    def learn(self) -> None:
        """One update."""
        shares = pack(
            self.groups, normalizer="sequence_mean", tokens_per_microbatch=8192, device=self.device,
            max_new_tokens=self.work.completion[1], include_all=True,
        )  # fmt: skip
        self.trainer.update(shares, 1e-6)

    def update(self) -> None:
        """Forward, backward and optimizer over what was drawn."""
        tokens = sum(map(sum, self.limits))
        limit = train_seconds(Shape.of(self.shape), self.prompt_lengths, self.limits, self.rates, 1)
        taken = self.seconds(self.learn)
        self.report("update", taken, limit, tokens_per_second=tokens / taken)

    def step(self) -> None:
        """A rollout and an update of it, three times."""

        def both() -> None:
            self.draw()
            self.learn()

        self.report("step", self.seconds(both))


PARTS = ("ceilings", "head", "flex", "decode", "update", "step")


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts named, of each shape."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="A first look at a GPU.")
    parser.add_argument("parts", nargs="+", choices=(*PARTS, "all"))
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=["0.6B"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny shape and short texts: shows that it works")
    parser.add_argument("--results", type=Path, help="directory that gpu.jsonl is appended to")
    options = parser.parse_args(arguments)
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
    for shape in ["tiny"] if options.quick else options.shape:
        bench = Bench(shape, options.device, QUICK if options.quick else WHOLE, options.results)
        for part in _chosen(options.parts):
            getattr(bench, part)()


def _chosen(parts: list[str]) -> Iterator[str]:
    yield from PARTS if "all" in parts else parts


if __name__ == "__main__":
    main()
