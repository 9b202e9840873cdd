"""The counter-based generator: known answers, range, uniformity, and that a number depends on its token alone."""

import numpy as np
import pytest
from scipy import stats

from sapo.utils import rng
from sapo.utils.rng import philox, token_uniforms

FULL = 0xFFFFFFFF
# counter, key, answer: philox4x32 with 10 rounds in kat_vectors of the authors' Random123 library.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL, FULL, FULL, FULL), (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    assert tuple(philox(np.array(counter, dtype=np.uint64), key).tolist()) == answer


def test_philox_of_many_counters_is_that_of_each():
    counters = np.array([c for c, _, _ in KNOWN_ANSWERS] * 2, dtype=np.uint64).reshape(2, 3, 4)
    key = KNOWN_ANSWERS[2][1]
    together = philox(counters, key)
    assert together.shape == (2, 3, 4)
    for i in np.ndindex(2, 3):
        assert together[i].tolist() == philox(counters[i], key).tolist()


def test_the_counter_is_prompt_sample_position_and_the_key_is_the_seed():
    seed, prompt = 0x299F31D0_A4093822, 0x85A308D3_243F6A88
    sample, position = 5, 3
    words = philox(np.array([0x243F6A88, 0x85A308D3, sample, position]), (0xA4093822, 0x299F31D0)).tolist()
    # 27 bits of the first word over 25 of the second, and half a bit more: exact in a double.
    expected = ((words[0] >> 5) * 2**25 + (words[1] >> 7) + 0.5) / 2**52
    uniform = token_uniforms(seed, prompt, np.array([sample]), position + 1)[0, position]
    assert uniform == expected


@pytest.mark.parametrize("word", [0, FULL])
def test_uniforms_never_reach_zero_or_one(word, monkeypatch):
    # The extremes of the generator, which no search would meet.
    monkeypatch.setattr(rng, "philox", lambda counter, key: np.full(counter.shape, word, dtype=np.uint64))
    uniforms = token_uniforms(0, 0, np.arange(3), 4)
    assert uniforms.shape == (3, 4)
    assert uniforms.dtype == np.float64
    assert bool(((uniforms > 0) & (uniforms < 1)).all())


def test_uniforms_are_uniform_and_neighbours_independent():
    uniforms = token_uniforms(1, 2, np.arange(300), 300)
    assert bool(((uniforms > 0) & (uniforms < 1)).all())
    assert stats.kstest(uniforms.ravel(), "uniform").pvalue > 1e-3
    cell = (uniforms * 16).astype(int)
    for a, b in ((cell[:, :-1], cell[:, 1:]), (cell[:-1], cell[1:])):  # next position, next sample
        counts = np.bincount((a * 16 + b).ravel(), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-3
    across = np.stack([token_uniforms(1, prompt, np.arange(1), 1)[0, 0] for prompt in range(3000)])
    assert stats.kstest(across, "uniform").pvalue > 1e-3


def test_a_number_depends_on_seed_prompt_sample_and_position_alone():
    whole = token_uniforms(3, 8, np.arange(6), 20)
    assert np.array_equal(token_uniforms(3, 8, np.arange(6), 20), whole)
    assert np.array_equal(token_uniforms(3, 8, np.array([4, 1]), 7), whole[[4, 1], :7])
    assert token_uniforms(3, 8, np.array([2]), 11)[0, 10] == whole[2, 10]


def test_other_seeds_prompts_samples_and_positions_draw_other_numbers():
    big = 2**32
    names = [(seed, prompt) for seed in (0, 1, big, big + 1, 2**63) for prompt in (0, 1, big, 2**63, 2**64 - 1)]
    uniforms = [token_uniforms(seed, prompt, np.arange(10), 10) for seed, prompt in names]
    assert len(np.unique(uniforms)) == len(names) * 100
