"""The benchmarks time a GPU's work and not its launch, and count its memory: run by `make test-gpu`."""

import time

import pytest
import torch
from bench.contest import Contest, Machine, SideSpec, run_contest
from bench.sides.clock import Stopwatch, timed
from bench.sides.serve import peak_bytes
from bench.workloads import Workload

from bench import contests

pytestmark = pytest.mark.gpu


def test_a_stopwatch_waits_for_what_was_launched():
    def launch(cycles):
        started = time.perf_counter()
        torch.cuda._sleep(cycles)
        return time.perf_counter() - started

    launch(1000)
    short, _ = timed(lambda: launch(10_000_000), "cuda")
    long, launching = timed(lambda: launch(100_000_000), "cuda")
    assert long > 5 * short  # ten times the cycles
    assert long > 5 * launching


def test_a_stopwatch_leaves_out_what_was_launched_before_it():
    whole, _ = timed(lambda: torch.cuda._sleep(100_000_000), "cuda")
    torch.cuda._sleep(100_000_000)
    watch = Stopwatch("cuda")
    torch.cuda._sleep(1000)
    assert watch.stop() < whole / 5


def test_the_peak_is_of_the_devices_memory():
    before = peak_bytes("cuda")
    held = torch.zeros(before // 4 + 2**22, device="cuda")
    assert peak_bytes("cuda") >= held.numel() * 4


def test_sides_run_on_the_gpu_and_do_the_same_work(tmp_path):
    workload = Workload("qwen3", 3, 4, (5, 9), (3, 12))
    sides: tuple[SideSpec, ...] = (contests._ours("rollout", "float32"), contests._hf("generate", "float32"))
    contest: Contest = contests._of("a-contest", "A contest", workload, sides, 2, quick=False, limit="decode")
    result = run_contest(contest, Machine(1, "cuda", 300.0), tmp_path, say=lambda _: None)
    for side in result["sides"].values():
        assert "error" not in side
        assert {f["tokens"] for f in side["facts"]} == {workload.tokens}
        assert side["backends"].startswith("cuBLAS")
