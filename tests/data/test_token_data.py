"""Token data of completions: read-only arrays, equal and hashed by their bytes."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from sapo.data import Completion, Group, Observation, Prompt, Score
from sapo.data.arrays import ArrayReader, FlatArrays
from sapo.data.serialisation import group_from_json, group_to_json
from sapo.errors import CheckpointError

NAMES = ("token_ids", "logprobs", "old_logprobs", "reference_logprobs")


def completion(**changes) -> Completion:
    fields = {
        "token_ids": (7, 9, 1),
        "logprobs": (-0.1, -0.2, -0.5),
        "finish_reason": "stop",
        "text": "46",
        "old_logprobs": (-0.25, -0.5, -1.0),
        "reference_logprobs": (-1.0, -2.0, -3.0),
    }
    return Completion(**{**fields, **changes})


@pytest.mark.parametrize("kind", [tuple, list, np.array, torch.tensor], ids=["tuple", "list", "array", "tensor"])
def test_any_sequence_of_numbers_becomes_arrays_of_32_bits(kind) -> None:
    made = Completion(kind([7, 9, 1]), kind([-0.1, -0.2, -0.5]), "stop")
    assert made.token_ids.dtype == np.int32
    assert made.token_ids.tolist() == [7, 9, 1]
    assert made.logprobs.dtype == np.float32
    assert made.logprobs.tolist() == torch.tensor([-0.1, -0.2, -0.5]).tolist(), "rounded to float32 as torch rounds"
    for name in ("old_logprobs", "reference_logprobs"):
        assert getattr(made, name).dtype == np.float32
        assert len(getattr(made, name)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_no_array_can_be_written_to(name: str) -> None:
    made = [completion(), completion(**{name: ()}), replace(completion(), text="47")]
    made += [copy.deepcopy(completion()), pickle.loads(pickle.dumps(completion()))]
    for array in (getattr(c, name) for c in made):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_a_buffer_filled_again_changes_no_completion() -> None:
    ids, logprobs = np.arange(4, dtype=np.int32), np.zeros(4, np.float32)
    made = Completion(ids[:2], logprobs[:2], "length")
    ids[:], logprobs[:] = 9, -9
    assert (made.token_ids.tolist(), made.logprobs.tolist()) == ([0, 1], [0, 0])
    assert made.token_ids.base is None, "the rest of the buffer is not kept alive"


def test_slices_of_a_read_only_array_are_not_copied() -> None:
    ids = np.arange(1000, dtype=np.int32)
    ids.flags.writeable = False
    made = Completion(ids[200:300], (), "length")
    assert np.shares_memory(made.token_ids, ids)
    assert replace(made, text="x").token_ids is made.token_ids


@pytest.mark.parametrize("name", NAMES)
def test_a_bit_of_any_array_makes_completions_unequal(name: str) -> None:
    same, other = completion(), completion(**{name: [*getattr(completion(), name)[:-1], 2]})
    assert completion() == same
    assert hash(completion()) == hash(same)
    assert completion() != other
    assert hash(completion()) != hash(other)
    assert len({completion(), same, other}) == 2


def test_all_else_counts_as_well_and_a_number_that_is_none_equals_itself() -> None:
    for change in ({"text": "47"}, {"finish_reason": "length"}, {"score": Score(1.0)}, {"logprobs": (-0.1, -0.2)}):
        assert completion() != completion(**change)
    assert completion() != "46"
    nan = completion(logprobs=(np.nan, -0.0, 0.0))
    assert nan == completion(logprobs=(np.nan, -0.0, 0.0))
    assert nan != completion(logprobs=(np.nan, 0.0, 0.0)), "bytes, not values"
    scored = completion(score=Score(1.0, figures={"cells": 0.5}))
    assert hash(scored) == hash(completion()), "equal completions have equal hashes, and figures may be a dict"


@pytest.mark.parametrize("ids", [(1.5,), (2**31,), np.array([2**40]), (float("nan"),)])
def test_token_ids_that_would_change_are_refused(ids) -> None:
    with pytest.raises(ValueError, match=r"token ids must be whole numbers of 32 bits; got"):
        Completion(ids, (0.0,), "stop")


def test_token_data_of_two_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one dimension; got the shape \(1, 2\)"):
        Completion(np.zeros((1, 2), np.int32), (0.0,), "stop")


def test_judges_of_text_load_no_numpy() -> None:
    code = "import sys, sapo.data as d; d.Prompt(0, 't', ''), d.Score(1.0); assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_flat_arrays_give_back_each_name_in_its_own_order() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, 99, n).astype(np.int32) for n in (3, 0, 5, 1)]
    arrays = FlatArrays()
    for part in parts:
        arrays.put("a", part)
        arrays.put("b", part.astype(np.float32)[:1])
    reader = ArrayReader(arrays.joined())
    for part in parts:
        taken = reader.take("a")
        assert np.array_equal(taken, part)
        assert taken.dtype == part.dtype
        assert not taken.flags.writeable
    assert [len(reader.take("b")) for _ in parts] == [1, 0, 1, 1]
    for name in ("a", "c"):
        with pytest.raises(CheckpointError, match=rf"more token data \({name}\) than batches.safetensors holds"):
            reader.take(name)


OBSERVATIONS = (
    Observation(0, (4,), "go"),
    Observation(2, (5, 6), "\N{SNOWMAN}", keep=3),
    Observation(3, (), speakers=(("tool add", 0),)),
)


def test_observations_survive_a_checkpoint_and_a_copy() -> None:
    played = completion(observations=OBSERVATIONS)
    group = Group(Prompt(1, "t", "?", (1, 2)), (completion(), played, played), (1.0, 0.0, -1.0))
    arrays = FlatArrays()
    value = json.loads(json.dumps(group_to_json(group, arrays)))
    assert group_from_json(value, ArrayReader(arrays.joined())) == group
    assert copy.deepcopy(played) == pickle.loads(pickle.dumps(played)) == played
    assert played != completion()
    assert played != completion(observations=OBSERVATIONS[:2])


def test_observations_lie_in_their_places_and_the_length_is_of_own_tokens() -> None:
    played = completion(observations=OBSERVATIONS)
    assert len(played) == 3
    assert played.sequence.tolist() == [4, 7, 9, 5, 6, 1]
    assert [(own, ids.tolist()) for own, ids in played.spans] == [
        (False, [4]),
        (True, [7, 9]),
        (False, [5, 6]),
        (True, [1]),
    ]
    assert played.turns == ((0, 2), (2, 3))
    assert completion().sequence.tolist() == [7, 9, 1]
    assert completion().turns == ((0, 3),)


@pytest.mark.parametrize("places", [(4,), (2, 1), (-1,)])
def test_observations_that_lie_nowhere_are_refused(places: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="observations must lie between a completion's 3 tokens, in their order"):
        completion(observations=tuple(Observation(at, (5,)) for at in places))
