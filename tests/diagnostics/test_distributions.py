"""Histograms and scatter of an update: counts by hand, edges that never change."""

from __future__ import annotations

import json
import math

import numpy as np

from sapo.diagnostics import GatedTokens, distribution_record, sequence_figures
from sapo.diagnostics.distributions import LOG_RATIO_EDGES, SCATTER_POINTS, histogram


def tokens_of(log_ratios: list[list[float]], advantages: list[float]) -> GatedTokens:
    z_M = np.array([z for sequence in log_ratios for z in sequence])
    sequence_M = np.array([i for i, sequence in enumerate(log_ratios) for _ in sequence])
    return GatedTokens(
        z_M,
        np.ones(len(z_M)),
        np.ones(len(z_M)),
        np.array(advantages)[sequence_M],
        sequence_M,
        tuple(range(len(advantages))),
    )


def record_of(tokens: GatedTokens) -> dict:
    return distribution_record(tokens, sequence_figures(tokens, tau_pos=1.0, tau_neg=1.05))


def test_every_token_is_counted_once_in_its_bin_by_sign() -> None:
    record = record_of(tokens_of([[0.0, 0.15, 30.0], [-0.15, -30.0]], [1.0, -1.0]))["log_ratio"]
    edges, positive, negative = record["edges"], record["pos"], record["neg"]
    assert len(positive) == len(negative) == len(edges) + 1
    assert (sum(positive), sum(negative)) == (3, 2)
    assert positive[-1] == 1, "beyond the last edge"
    assert negative[0] == 1, "below the first"
    still = edges.index(1e-4)  # counts[i] is of [edges[i - 1], edges[i])
    assert edges[still - 1] == -1e-4
    assert positive[still] == 1
    (moved,) = (i for i in range(still + 1, len(positive) - 1) if positive[i])
    assert edges[moved - 1] <= 0.15 < edges[moved]
    json.dumps(record)


def test_the_edges_are_those_of_every_run() -> None:
    """Eight to a decade from 1e-4 to 10 on either side of 0: another choice would not add up with older runs."""
    assert len(LOG_RATIO_EDGES) == 82
    np.testing.assert_allclose(LOG_RATIO_EDGES[41:], [10 ** (-4 + i / 8) for i in range(41)])
    np.testing.assert_array_equal(LOG_RATIO_EDGES, -LOG_RATIO_EDGES[::-1])


def test_a_histogram_of_a_whole_is_the_sum_of_its_parts() -> None:
    values = np.random.default_rng(0).standard_cauchy(1000)
    parts = [histogram(part, LOG_RATIO_EDGES) for part in np.split(values, 4)]
    assert np.sum(parts, axis=0).tolist() == histogram(values, LOG_RATIO_EDGES)


def test_the_scatter_is_bounded_spread_over_the_variances_and_within_the_bound() -> None:
    generator = np.random.default_rng(1)
    scales = np.exp(generator.uniform(-6, 0, 300))
    tokens = tokens_of([(s * generator.standard_normal(5)).tolist() for s in scales], [1.0, -1.0] * 150)
    sequences = sequence_figures(tokens, tau_pos=1.0, tau_neg=1.05)
    scatter = record_of(tokens)["scatter"]
    assert {len(v) for v in scatter.values()} == {SCATTER_POINTS}
    assert scatter["variance"] == sorted(scatter["variance"])
    assert scatter["variance"][0] == sequences.variance_B.min()
    assert scatter["variance"][-1] == sequences.variance_B.max()
    assert math.isclose(np.median(scatter["variance"]), np.median(sequences.variance_B), rel_tol=0.2)
    for variance, discrepancy, bound, positive in zip(*scatter.values(), strict=True):
        assert bound == (1.0 if positive else 1.05) ** 2 / 4 * variance
        assert discrepancy <= bound
    assert record_of(tokens) == record_of(tokens)
