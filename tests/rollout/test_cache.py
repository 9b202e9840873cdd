"""The cache and the attention of a decode step, against attention written out for each row alone."""

import numpy as np
import pytest
import torch

from sapo.rollout.local import cache
from sapo.rollout.local.cache import KVCache
from sapo.rollout.local.cpu import native
from sapo.rollout.local.layouts import Arrangement, DecodeLayout, PrefillLayout

CPU = torch.device("cpu")
LENGTHS, SAMPLES, NEW = (3, 100, 7, 1, 90, 40), (2, 3, 1, 2, 1, 4), 40
"""Two pools: 100 and 90, and the rest within 32 tokens or half of 40."""


@pytest.fixture(params=["compiled", "torch"])
def kernels(request, monkeypatch):
    """With the kernel of kernels.c, and without."""
    if request.param == "torch":
        monkeypatch.setenv("SAPO_NATIVE", "0")
    elif native.kernels(CPU, torch.float32) is None:
        pytest.skip("there is no C compiler")
    return request.param


class Model:
    """Random queries, keys and values of every token of every row, by row and position."""

    def __init__(self, heads, kv_heads, size, preamble, dtype=torch.float32):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(1)
        self.heads, self.kv_heads, self.size, self.preamble = heads, kv_heads, size, preamble
        self.cache = KVCache(sum(SAMPLES), NEW, LENGTHS, SAMPLES, preamble)
        self.rows = []  # (group, keys, values) of each row
        if preamble:
            _, self.shared_key, self.shared_value = self.draw(preamble)
            self.prefill(None, self.shared_key, self.shared_value)

    def draw(self, count):
        return [
            torch.randn(count, heads, self.size, generator=self.generator).to(self.dtype)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]

    def prefill(self, groups, key, value):
        layout = PrefillLayout(self.cache, groups, CPU)
        return layout.attend(0, torch.zeros(len(key), self.heads, self.size, dtype=self.dtype), key, value, 1.0, None)

    def admit(self, groups):
        keys, values = [], []
        for group in groups:
            self.cache.admit(group)
            _, key, value = self.draw(LENGTHS[group])
            keys.append(key)
            values.append(value)
            if self.preamble:
                key, value = torch.cat([self.shared_key, key]), torch.cat([self.shared_value, value])
            self.rows += [(group, key, value)] * SAMPLES[group]
        self.prefill(groups, torch.cat(keys), torch.cat(values))

    def step(self, drawn, window, softcap):
        """One token for each row; what the layout computes and what every row alone gives, in float64."""
        query, key, value = self.draw(len(self.rows))
        arrangement = Arrangement(self.cache, np.array([group for group, _, _ in self.rows]), CPU)
        layout = DecodeLayout(arrangement, np.array(drawn))
        got = layout.attend(0, query, key, value, 0.25, window, softcap)
        expected = []
        for i, (group, keys, values) in enumerate(self.rows):
            keys, values = torch.cat([keys, key[i : i + 1]]), torch.cat([values, value[i : i + 1]])
            self.rows[i] = (group, keys, values)
            assert len(keys) == self.preamble + LENGTHS[group] + drawn[i] + 1
            first = 0 if window is None else max(0, len(keys) - window)
            repeats = self.heads // self.kv_heads
            k, v = (t[first:].double().repeat_interleave(repeats, dim=1) for t in (keys, values))
            scores = torch.einsum("hd,khd->hk", query[i].double(), k) * 0.25
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            expected.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v))
        return got, torch.stack(expected)

    def remove(self, rows):
        """As the engine does: the last rows in use move into the gaps."""
        remaining = len(self.rows) - len(rows)
        holes = [r for r in rows if r < remaining]
        movers = [r for r in range(remaining, len(self.rows)) if r not in rows]
        gone = {self.rows[r][0] for r in rows}
        if holes:
            self.cache.move(torch.tensor(movers), torch.tensor(holes), NEW)
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[remaining:]
        for group in gone - {group for group, _, _ in self.rows}:
            self.cache.release(group)
        return holes, movers


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5, 20, 60])
@pytest.mark.parametrize("preamble", [0, 17])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 3, 64), (6, 1, 80), (4, 2, 8)])
def test_each_row_attends_to_its_own_context_as_rows_and_groups_come_and_go(
    heads, kv_heads, size, preamble, window, softcap, kernels
):
    model = Model(heads, kv_heads, size, preamble)
    model.admit([0, 1, 2])
    drawn = [0] * len(model.rows)
    shared = []

    def steps(count):
        for _ in range(count):
            got, expected = model.step(drawn, window, softcap)
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
            drawn[:] = [d + 1 for d in drawn]
            shared.append(len(set(drawn)) == 1)

    steps(18)
    model.admit([3, 4, 5])
    drawn += [0] * (len(model.rows) - len(drawn))
    steps(2)
    # Rows of group 0 (both), 2 (its only one) and one of 1: two slots are freed, one of them in the middle of a pool.
    holes, movers = model.remove([0, 1, 3, 5])
    for hole, mover in zip(holes, movers, strict=True):
        drawn[hole] = drawn[mover]
    del drawn[len(model.rows) :]
    assert len({group for group, _, _ in model.rows}) == 4
    steps(17)
    assert {True, False} == set(shared)  # the same suffix length in all rows, and different ones


def test_the_compiled_kernel_is_the_one_that_runs(monkeypatch):
    found = native.kernels(CPU, torch.float32)
    if found is None:
        pytest.skip("there is no C compiler")
    calls = []
    attend = native.Kernels.attend
    monkeypatch.setattr(native.Kernels, "attend", lambda self, numbers: (calls.append(1), attend(self, numbers)))
    model = Model(4, 2, 16, 0)
    model.admit([0])
    model.step([0, 0], None, None)
    assert calls == [1]


def test_missing_memory_is_said(monkeypatch):
    found = native.kernels(CPU, torch.float32)
    if found is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setattr(found, "_attend", lambda numbers: 1)  # one thread found none
    with pytest.raises(MemoryError, match="sample fewer rows"):
        found.attend(np.zeros(1, dtype=np.int64))


def test_a_cache_of_float64_is_read_as_float64(kernels):
    model = Model(4, 2, 16, 17, torch.float64)
    model.admit([0, 1])
    for drawn in range(3):
        got, expected = model.step([drawn] * len(model.rows), None, None)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("preamble", [0, 17])
def test_a_cache_of_half_precision_keeps_scores_and_sums_in_float32(monkeypatch, preamble):
    # As on a GPU; on a CPU such keys and values are kept in float32.
    monkeypatch.setenv("SAPO_NATIVE", "0")
    monkeypatch.setattr(cache, "cache_dtype", lambda dtype, device: dtype)
    model = Model(4, 2, 16, preamble, torch.bfloat16)
    model.admit([0, 1, 5])
    draw = model.draw
    monkeypatch.setattr(
        model, "draw", lambda count: [x * scale for x, scale in zip(draw(count), (6, 1, 1), strict=True)]
    )
    errors = []
    for drawn in range(3):
        got, expected = model.step([drawn] * len(model.rows), 60, None)
        assert model.cache.layers[0][0].dtype == got.dtype == torch.bfloat16
        errors.append((got.double() - expected).abs().mean() / expected.abs().mean())
    # Weights of the softmax and results are rounded to 8 bits, 2^-9 at most. Scores of up to 25 rounded so are off by
    # .06, and their weights by 6%.
    assert max(errors) < 2**-8


def test_a_prompt_is_kept_once_whatever_its_samples():
    cache = KVCache(64, 9, [500] * 8, [8] * 8, preamble=100)
    # By hand: 8 prompts and a preamble, padded to odd numbers of 16: 33 x 16 = 528 and 7 x 16 = 112; 64 rows of 16.
    assert cache.num_places == 8 * 528 + 112 + 64 * 16
    assert len(cache.pools) == 1


def test_threads_change_no_bit(kernels):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            model = Model(4, 2, 16, 17)
            model.admit([0, 1, 2, 5])
            results.append(model.step([0] * len(model.rows), None, None)[0])
        finally:
            torch.set_num_threads(1)
    if kernels == "compiled":
        assert torch.equal(*results)
    torch.testing.assert_close(*results)
