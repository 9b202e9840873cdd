"""What of a run's state goes into state.json, what into batches.safetensors, and that both give it back."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sapo.data import Completion, Group, Prompt, RoutedExperts, Score, Status
from sapo.errors import CheckpointError
from sapo.run.state import RolloutBatch, RunState
from sapo.training.checkpoint import Checkpoint, save_checkpoint

TOKEN = 1_234_567
"""Stands in no text: where it is found, token data is."""


class NoWeights:
    """Stands for a policy that has nothing to save."""

    def save(self, directory: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (directory / name).write_bytes(b"")


def experts(seed: int, tokens: int, wide: bool = False) -> RoutedExperts:
    indices = np.random.default_rng(seed).integers(0, 256, tokens * 2 * 3 * (1 + wide)).astype(np.uint8)
    return RoutedExperts(indices.tobytes(), layers=2, per_token=3, wide=wide)


def completion(seed: int, tokens: int, *, routed: bool, **more) -> Completion:
    """All fields set; log-probabilities that no short decimal names."""
    generator = np.random.default_rng(seed)
    drawn = {n: -generator.random(tokens) for n in ("logprobs", "old_logprobs", "reference_logprobs")}
    return Completion(
        **{
            "token_ids": (TOKEN, *generator.integers(0, 99, tokens - 1).tolist()),
            "finish_reason": "length" if seed % 2 else "stop",
            "text": f"é {seed}",
            "score": Score(seed / 3, Status.UNPARSEABLE, "no number", "7", {"cells": 1 / (seed + 3)}),
            "experts": experts(seed, tokens - 1, wide=True) if routed else None,
            **drawn,
            **more,
        }
    )


def group(seed: int, *, routed: bool = True, **more) -> Group:
    members = tuple(completion(10 * seed + i, tokens, routed=routed, **more) for i, tokens in enumerate((5, 1, 9)))
    prompt = Prompt(seed, "t", f"{seed}+1=", (TOKEN, 1, 2), str(seed + 1), stop=("\n", "#"))
    return Group(
        prompt, members, (0.1, -1 / 3, 0.2), (0.5, 1.0, 2.0), (False, True, False), experts(seed, 3) if routed else None
    )


def state() -> RunState:
    """Half-way through a step, with two batches that wait, each field of a batch in use."""
    bare = group(3, routed=False, old_logprobs=(), reference_logprobs=())
    gates = {
        "4": {
            "update": 0,
            "on_policy": True,
            "log_ratio": np.array([1 / 3, -1e-9]),
            "entropy": np.array([0.1, 2.5], np.float32),
        },
        "7": {"update": 0, "on_policy": False, "log_ratio": np.array([0.7])},
    }
    return RunState(
        step=3,
        update=1,
        groups=[group(1), bare],
        dropped=[group(2)],
        ahead=[RolloutBatch([group(4), group(5)], [group(6)], {"x": 1 / 3}, 5), RolloutBatch([bare], [], {}, 7)],
        gates=gates,
        tokens={"generated": 99, "trained": 7},
    )


def save(directory: Path, kept: RunState) -> Checkpoint:
    fields, batches = kept.serialise()
    return save_checkpoint(
        directory,
        kept.step,
        kept.update,
        policy=NoWeights(),
        save_optimizer=lambda _: None,
        state=fields,
        batches=batches,
    )


def read(checkpoint: Checkpoint) -> RunState:
    checkpoint.verify()
    return RunState.deserialise(checkpoint.state(), checkpoint.batches())


def listed(gates: dict) -> dict:
    return {
        k: {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in gate.items()} for k, gate in gates.items()
    }


def assert_equal_states(found: RunState, expected: RunState) -> None:
    assert listed(found.gates) == listed(expected.gates)
    assert replace(found, gates={}) == replace(expected, gates={})


def test_every_field_of_every_batch_comes_back_to_the_bit(tmp_path: Path) -> None:
    found = read(save(tmp_path, state()))
    assert_equal_states(found, state())
    assert found.gates["4"]["entropy"].dtype == np.float32
    assert [*found.gates] == ["4", "7"]
    assert found.groups is not None
    assert found.groups[0].prompt.token_ids == (TOKEN, 1, 2)
    assert all(type(i) is int for i in found.groups[0].prompt.token_ids)
    bare = found.groups[1].completions[0]
    assert len(bare.old_logprobs) == len(bare.reference_logprobs) == 0
    assert bare.experts is None
    assert not found.ahead[0].dropped[0].completions[2].logprobs.flags.writeable
    assert_equal_states(read(save(tmp_path, found)), state())


def test_before_a_batch_is_sampled_there_is_none(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, RunState(step=2))
    assert checkpoint.batches() == {}
    assert read(checkpoint) == RunState(step=2)
    assert read(save(tmp_path, RunState(groups=[], step=4))).groups == []


def numbers_in(value: object, key: str = "") -> list[str]:
    """Paths of a JSON value to lists of numbers."""
    if isinstance(value, dict):
        return [path for k, v in value.items() for path in numbers_in(v, f"{key}/{k}")]
    if isinstance(value, list):
        own = [key] if value and all(type(v) in (int, float) for v in value) else []
        return own + [path for v in value for path in numbers_in(v, key)]
    return []


def test_state_json_holds_no_token_data(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, state())
    text = (checkpoint.path / "state.json").read_text()
    assert str(TOKEN) not in text
    per_group = {"advantages", "shaped_rewards"}
    assert {path.rsplit("/", 1)[-1] for path in numbers_in(json.loads(text))} == per_group
    short, long = (
        replace(state(), groups=[replace(group(1), completions=(completion(0, tokens, routed=True),) * 3)]).serialise()
        for tokens in (4, 4000)
    )
    assert short[0] == long[0], "whatever their lengths are"
    assert len(short[1]["logprobs"]) < len(long[1]["logprobs"])


def test_checkpoints_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Token data, experts in base64 and gates as lists, all of it in state.json; no batches.safetensors."""

    def encoded(routed: RoutedExperts | None) -> dict | None:
        return routed and {**vars(routed), "indices": base64.b64encode(routed.indices).decode()}

    def inline(of: Group) -> dict:
        completions = [
            {
                **vars(c),
                "score": vars(c.score),
                "experts": encoded(c.experts),
                **{n: getattr(c, n).tolist() for n in ("token_ids", "logprobs", "old_logprobs", "reference_logprobs")},
            }
            for c in of.completions
        ]
        prompt = {**vars(of.prompt), "metadata": {}}
        return {**vars(of), "prompt": prompt, "completions": completions, "prompt_experts": encoded(of.prompt_experts)}

    kept = state()
    assert kept.groups is not None
    fields = kept.serialise()[0] | {"gates": listed(kept.gates)}
    fields |= {"groups": [*map(inline, kept.groups)], "dropped": [*map(inline, kept.dropped)]}
    fields["ahead"] = [
        {**vars(b), "groups": [*map(inline, b.groups)], "dropped": [*map(inline, b.dropped)]} for b in kept.ahead
    ]
    assert_equal_states(
        RunState.deserialise(json.loads(json.dumps(fields)), Checkpoint(tmp_path, 1, 0).batches()), kept
    )


def test_a_state_whose_arrays_are_those_of_another_is_refused(tmp_path: Path) -> None:
    fields, _ = state().serialise()
    _, fewer = replace(state(), ahead=[]).serialise()
    with pytest.raises(CheckpointError, match="more token data"):
        RunState.deserialise(fields, fewer)
    with pytest.raises(CheckpointError, match=r"prompt\.token_ids"):
        RunState.deserialise(fields, {})
