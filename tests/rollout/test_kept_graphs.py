"""What a rollout leaves for the next one: cache, weights and CUDA graphs; and how often the host waits."""

import gc
import weakref

import numpy as np
import pytest
import torch

from sapo.errors import Interrupted
from sapo.model.adapters import adapter_off, add_adapter
from sapo.rollout.local import device_steps
from sapo.rollout.local import engine as local
from sapo.rollout.local.cache import KVCache
from sapo.rollout.local.device_steps import DeviceSteps, RowState
from sapo.rollout.local.engine import LocalEngine
from support.engine_cases import SAMPLES, params, ragged_requests, random_ids, request
from support.tracing import Tracing, assert_all_same


def changed(policy, seed):
    """Other weights at the addresses of the present ones, as an update leaves them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def test_a_second_rollout_repeats_the_graphs_of_the_first_with_the_weights_of_now(new_policy, monkeypatch):
    tracing = Tracing(monkeypatch)
    policy = new_policy("qwen3", layers=1)
    engine, expected = LocalEngine(policy, 256, "eager"), LocalEngine(policy, 256, False)
    engine.generate(ragged_requests(), params(max_new_tokens=10))
    changed(policy, seed=6)
    requests = [
        request(random_ids(length, seed=length), count, prompt_id=length)
        for length, count in zip((6, 2, 20, 8, 4, 13), SAMPLES, strict=True)
    ]
    kept, before = engine._kept, tracing.captured
    settings = params(max_new_tokens=10, seed=6)
    ours = engine.generate(requests, settings)
    assert engine._kept.device_steps is kept.device_steps
    assert tracing.captured - before <= 2  # shapes that the first had met once, or not at all
    assert_all_same(ours, expected.generate(requests, settings))


def test_graphs_are_not_kept_for_what_they_do_not_hold(policies, monkeypatch):
    monkeypatch.setenv("SAPO_NATIVE", "0")
    monkeypatch.setattr(local, "capture_on", lambda device, choice: lambda step: step)
    policy = policies("qwen3")
    engine, expected = LocalEngine(policy, 9, "eager"), LocalEngine(policy, 9, False)
    calls = [
        (ragged_requests(), params()),
        (ragged_requests(), params(temperature=0.5)),
        (ragged_requests()[:2], params(temperature=0.5)),  # fewer rows
        (ragged_requests(), params(max_new_tokens=20)),
        ([request(random_ids(70, seed=i), 3, prompt_id=i) for i in range(6)], params(max_new_tokens=20)),
    ]
    steps = []
    for requests, settings in calls:
        assert_all_same(engine.generate(requests, settings), expected.generate(requests, settings))
        steps.append(engine._kept.device_steps)
    assert len(set(map(id, steps))) == len(calls)


def test_nothing_is_kept_of_a_call_that_was_stopped(policies):
    engine = LocalEngine(policies("qwen3"), 9, "eager")
    engine.generate(ragged_requests(), params())
    with pytest.raises(Interrupted):
        engine.generate(ragged_requests(), params(), should_stop=lambda: True)
    assert engine._kept is None


def test_weights_that_were_given_are_let_go_in_sleep(policies, monkeypatch):
    monkeypatch.setenv("SAPO_NATIVE", "0")
    monkeypatch.setattr(local, "capture_on", lambda device, choice: lambda step: step)
    policy = policies("llama")
    engine = LocalEngine(policy, 9, "eager")
    given = {name: tensor.clone() for name, tensor in policy.weights()}
    engine.set_weights(iter(given.items()), 1)
    engine.generate(ragged_requests(), params(max_new_tokens=3))
    assert engine._kept is not None
    alive = [weakref.ref(tensor.untyped_storage()) for tensor in given.values()]
    del given
    engine.sleep()
    gc.collect()  # a capture that is the step itself refers to its owner
    assert [ref() for ref in alive if ref() is not None] == []
    # What was drawn with the policy's own weights stays for the next rollout.
    engine.wake()
    engine.generate(ragged_requests(), params(max_new_tokens=3))
    engine.sleep()
    assert engine._kept is not None


def test_an_adapter_that_was_off_is_never_folded_into_the_policys_own_weights(new_policy, monkeypatch):
    # While it is off, o_proj and down_proj are no copies: what the call leaves must not serve one where it is on.
    monkeypatch.setenv("SAPO_NATIVE", "0")
    monkeypatch.setattr(local, "capture_on", lambda device, choice: lambda step: step)
    policy, settings = new_policy("llama", layers=1), params(max_new_tokens=3)
    add_adapter(policy, rank=2, alpha=4.0, targets="all-linear", seed=0)
    engine, generator = LocalEngine(policy, 9, "eager"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    with adapter_off(policy):
        engine.generate(ragged_requests(), settings)
    kept = engine._kept
    assert kept is not None
    expected = LocalEngine(policy, 9, False).generate(ragged_requests(), settings)
    assert_all_same(engine.generate(ragged_requests(), settings), expected)
    assert engine._kept.device_steps is not kept.device_steps
    assert [name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])] == []


class Schedule:
    """The shapes of a rollout on a GPU, without a model: `DeviceSteps` as it is, and rows that end at their limits."""

    def __init__(self, rows, groups, samples, longest, prompt):
        cache = KVCache(rows, longest, [prompt] * groups, [samples] * groups, rounded=True)
        state = RowState(*(torch.zeros(rows, 1) for _ in range(6)))
        self.steps = DeviceSteps(None, cache, [samples] * groups, state, None, None, capture=lambda step: step)
        self.rows, self.groups, self.samples = rows, groups, samples
        self.read = self.needed = 0

    def rollout(self, limit_gs):
        """Draw all rows to their limits; return how many shapes were new."""
        steps, cache, before = self.steps, self.steps.cache, len(self.steps.met)
        assert cache.begin([cache.pools[0].length] * self.groups, [self.samples] * self.groups, 0)
        waiting, rows = list(range(self.groups)), np.zeros((0, 3), dtype=np.int64)  # group, limit, drawn
        while waiting or len(rows):
            while waiting and len(rows) + self.samples <= self.rows and cache.has_slot(waiting[0]):
                group = waiting.pop(0)
                cache.admit(group)
                rows = np.concatenate([rows, [[group, limit, 1] for limit in limit_gs[group]]])
            taken = min(device_steps.LOOK_EVERY, int((rows[:, 1] - rows[:, 2]).max()))
            shape = steps._captured_for(steps._shape(rows[:, 0], int(rows[:, 2].max()) + taken - 1))
            steps.met.add(shape)
            for step in range(taken):
                self.read += shape.rows * shape.own
                self.needed += int(np.minimum(rows[:, 2] + step, rows[:, 1]).sum())
            rows[:, 2] = np.minimum(rows[:, 2] + taken, rows[:, 1])
            left = rows[rows[:, 2] < rows[:, 1]]
            for group in set(rows[:, 0].tolist()) - set(left[:, 0].tolist()):
                cache.release(group)
            rows = left
        return len(steps.met) - before


def test_a_rollout_captures_at_most_16_graphs_and_the_next_ones_none():
    # 32 prompts of 8, 256 to 1024 tokens: 26 graphs for each rollout before.
    schedule, random = Schedule(256, 32, 8, 1024, 256), np.random.default_rng(0)
    new = [schedule.rollout(random.integers(256, 1025, (32, 8))) for _ in range(3)]
    assert new[0] <= device_steps.MOST_GRAPHS
    assert new[1:] == [0, 0]
    # What steps read of the rows' own tokens, over what those have: to be 1.15 once attention reads pages.
    assert schedule.read / schedule.needed <= 1.65


def test_the_host_waits_once_for_each_look_and_once_for_all_completions(policies, monkeypatch):
    # Patched, since on a CPU these are no operations: what would wait for a GPU. Three for each completion before.
    waits, looks = [], []
    for name in ("cpu", "tolist", "item", "__bool__", "numpy"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _own=own, _name=name: (waits.append(_name), _own(self, *a))[1]
        )
    run, retire = DeviceSteps.run, local.RowsInPlace.retire
    monkeypatch.setattr(DeviceSteps, "run", lambda self, *a: (looks.append(1), run(self, *a))[1])
    fetched = []

    def watched(self):
        before = len(waits)
        retire(self)
        fetched.append((len(looks), waits[before:]))

    monkeypatch.setattr(local.RowsInPlace, "retire", watched)
    engine = LocalEngine(policies("qwen3"), 256, "eager")
    waits.clear()
    looks.clear()
    fetched.clear()
    engine.generate(ragged_requests(), params(max_new_tokens=40))
    assert len(looks) >= 2
    # After the prefill the first draws have ended rows that only the device knows of; later nothing is asked for.
    assert [asked for at, asked in fetched if at] == [[]] * len(looks)
    of_looks = 2 * len(looks)  # one copy, seen by two names: .cpu().numpy()
    others = len(waits) - of_looks - sum(len(asked) for _, asked in fetched)
    assert others <= 12, waits  # the prefill and the last copy, whatever the number of rows and tokens
