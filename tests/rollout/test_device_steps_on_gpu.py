"""What only a GPU can show of device steps: run by `make test-gpu`.

Captured graphs against the same steps uncaptured and against decoding step by step; that a step never waits for the
device; and that nothing of a graph is left behind.
"""

import itertools

import pytest
import torch

from sapo.model.loading import prepare_policy
from sapo.rollout.local import engine as local
from sapo.rollout.local.device_steps import CudaCapture, DeviceSteps
from sapo.rollout.local.engine import LocalEngine
from support.engine_cases import assert_same, flat, params, plain_logprobs, ragged_requests

pytestmark = pytest.mark.gpu

every_architecture = pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "llama", "mistral"])


@pytest.fixture
def on_gpu(new_policy):
    def make(architecture, **options):
        policy = new_policy(architecture, **options)
        return prepare_policy(policy.model.to("cuda"), policy.tokenizer)

    return make


class Captures(CudaCapture):
    """Counts."""

    def __init__(self, device):
        super().__init__(device)
        self.captured = self.repeated = 0

    def __call__(self, step):
        replay = super().__call__(step)
        self.captured += 1

        def repeat():
            self.repeated += 1
            replay()

        return repeat


@every_architecture
@pytest.mark.parametrize("max_rows", [5, 9, 256])
def test_graphs_draw_what_the_same_steps_and_decoding_step_by_step_draw(on_gpu, monkeypatch, architecture, max_rows):
    policy, requests = on_gpu(architecture), ragged_requests()
    captures = Captures(policy.device)
    monkeypatch.setattr(local, "capture_on", lambda device, choice: captures if choice is True else None)
    graphs = LocalEngine(policy, max_rows, True).generate(requests, params())
    assert captures.repeated > captures.captured > 0
    for choice in ("eager", False):
        for ours, theirs in zip(
            flat(graphs), flat(LocalEngine(policy, max_rows, choice).generate(requests, params())), strict=True
        ):
            assert_same(ours, theirs)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.8, "temperature": 0.7}, {"top_k": 3}], ids=str)
def test_graphs_draw_the_same_from_a_part_of_the_distribution(on_gpu, options):
    policy, requests = on_gpu("qwen3"), ragged_requests()
    ours, theirs = (LocalEngine(policy, 9, choice).generate(requests, params(**options)) for choice in (True, False))
    for mine, other in zip(flat(ours), flat(theirs), strict=True):
        assert_same(mine, other)


@every_architecture
def test_a_step_never_waits_for_the_device(on_gpu, monkeypatch, architecture):
    step = DeviceSteps.step
    taken = []

    def watched(self, shape):
        if taken:  # the first one may prepare libraries
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(self, shape)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        taken.append(shape)

    monkeypatch.setattr(DeviceSteps, "step", watched)
    LocalEngine(on_gpu(architecture), 9, "eager").generate(ragged_requests(), params())
    assert len(taken) > 8


def test_graphs_repeat_and_leave_nothing_behind(on_gpu):
    engine = LocalEngine(on_gpu("qwen3"), 9, True)
    first = engine.generate(ragged_requests(), params())
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        assert engine.generate(ragged_requests(), params()) == first
    assert torch.cuda.memory_allocated() == held


def test_streams_that_join_are_drawn_by_graphs_that_are_captured_anew(on_gpu, monkeypatch):
    # Whoever joins, and each growth of the cache, discards the graphs there were.
    monkeypatch.setattr(local, "GROWING_TOKENS", 2)
    policy, requests = on_gpu("qwen3"), ragged_requests()[:3]
    made = []
    make = DeviceSteps.__init__
    monkeypatch.setattr(DeviceSteps, "__init__", lambda self, *a: (made.append(self), make(self, *a))[1])
    settings = params(max_new_tokens=40, stop_token_ids=frozenset())
    engine = LocalEngine(policy, 64, True)
    expected = LocalEngine(policy, 64, False).generate(requests, settings)
    streams, drawn = {}, {}
    for number, request in enumerate(requests):
        streams[number] = engine.stream([request], settings)
        next(streams[number])
    for number, open_stream in streams.items():
        for new in itertools.chain.from_iterable(open_stream):
            if new.completion is not None:
                drawn[number, new.sample] = new.completion
    assert len(made) > len(requests)
    assert len(drawn) == sum(len(group) for group in expected)
    for (number, sample), completion in drawn.items():
        assert_same(completion, expected[number][sample])


def test_auto_takes_graphs_on_a_gpu_unless_told_not_to(on_gpu, monkeypatch):
    policy, runs = on_gpu("llama"), []
    run = DeviceSteps.run
    monkeypatch.setattr(DeviceSteps, "run", lambda self, *a: (runs.append(self.capture), run(self, *a))[1])
    LocalEngine(policy).generate(ragged_requests(), params())
    assert runs
    assert all(isinstance(capture, CudaCapture) for capture in runs)
    runs.clear()
    monkeypatch.setenv("SAPO_CUDA_GRAPHS", "0")
    LocalEngine(policy).generate(ragged_requests(), params())
    assert not runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_of_graphs_are_near_a_plain_forward(on_gpu, plain, dtype):
    # bfloat16 keeps 8 bits: see test_engine.py.
    policy, requests = on_gpu("qwen3", dtype=dtype), ragged_requests()
    drawn = LocalEngine(policy, 256, True).generate(requests, params())
    model = plain(policy).float().cpu()
    off = [
        (torch.tensor(c.logprobs) - plain_logprobs(model, r.prompt.token_ids, c, 1.0)).abs().mean()
        for r, group in zip(requests, drawn, strict=True)
        for c in group
    ]
    assert torch.stack(off).mean() < (1e-4 if dtype == torch.float32 else 0.03)
