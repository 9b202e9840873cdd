"""Completions while they are drawn: the tokens of `generate`, and text that never has to be taken back."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from sapo.data import Completion
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.streaming import TextStream, stream
from support.engine_cases import assert_same, params, ragged_requests


def joined(steps):
    """Put the pieces of each sample together, and check that its completion comes with the last of them."""
    pieces, whole = {}, {}
    for new in itertools.chain.from_iterable(steps):
        place = new.request, new.sample
        assert place not in whole, "nothing comes after a completion"
        ids, logprobs = pieces.setdefault(place, ([], []))
        ids += new.token_ids
        logprobs += new.logprobs
        if new.completion is not None:
            whole[place] = new.completion
    for place, completion in whole.items():
        assert pieces[place][0] == completion.token_ids.tolist()
        np.testing.assert_array_equal(np.float32(pieces[place][1]), completion.logprobs)
    return whole


def assert_all_same(found, expected):
    """Compare the completions of a stream with those of `generate`."""
    assert len(found) == sum(map(len, expected))
    for (request, sample), drawn in found.items():
        assert_same(drawn, expected[request][sample])


def engine_of(policy, way=None, graphs="auto"):
    engine = LocalEngine(policy, max_rows=7, cuda_graphs=graphs)
    engine.way = way or engine.way
    return engine


@pytest.mark.parametrize("graphs", ["auto", "eager"])
def test_a_stream_has_the_completions_of_generate(policies, graphs):
    engine, requests = engine_of(policies("qwen3"), graphs=graphs), ragged_requests()
    expected = engine.generate(requests, params())
    found = joined(stream(engine, requests, params()))
    assert_all_same(found, expected)


def test_streams_that_take_turns_draw_what_each_draws_alone(policies):
    for policy in (policies("llama"), policies("qwen3_5")):
        for way in {engine_of(policy).way, "rows"}:
            engine, requests = engine_of(policy, way), ragged_requests()[:3]
            alone = [joined(stream(engine, [r], params())) for r in requests]
            open_streams = [stream(engine, [r], params()) for r in requests]
            turns = itertools.chain.from_iterable(itertools.zip_longest(*open_streams, fillvalue=()))
            by_stream = [[] for _ in requests]
            for number, new in enumerate(turns):
                by_stream[number % len(requests)].append(new)
            for expected, steps in zip(alone, by_stream, strict=True):
                found = joined(steps)
                assert found.keys() == expected.keys()
                for place, drawn in found.items():
                    assert_same(drawn, expected[place])


def test_an_engine_that_cannot_stream_gives_all_at_once(policies):
    engine, requests = engine_of(policies("qwen3")), ragged_requests()[:2]
    plain = SimpleNamespace(generate=engine.generate)
    steps = list(stream(plain, requests, params()))
    assert len(steps) == 1
    assert_all_same(joined(steps), engine.generate(requests, params()))


def of_bytes():
    """A policy whose tokens are bytes, 0 a special one."""
    read = lambda ids: bytes(i for i in ids if i).decode("utf-8", "replace")  # noqa: E731
    return SimpleNamespace(decode=read, show=lambda ids: bytes(ids).replace(b"\0", b"<s>").decode("utf-8", "replace"))


def completion(text, ids):
    return Completion(tuple(ids), (-1.0,) * len(ids), "stop", text)


def test_a_character_is_given_when_all_its_bytes_are_there():
    ids = list("aé😀b".encode())
    made = TextStream(of_bytes())
    pieces = [made.add([i]) for i in ids]
    assert [p for p in pieces if p] == ["a", "é", "😀", "b"]
    assert made.finish(completion("aé😀b", ids)) == ""


def test_what_may_begin_a_stop_string_waits_until_it_does_not():
    made = TextStream(of_bytes(), stop=("END", "\n\n"))
    pieces = [made.add([i]) for i in b"xE y\nz EN"]
    assert "".join(pieces) == "xE y\nz "
    assert pieces[1] == ""  # the E that the blank frees
    assert made.add(b"D!") == ""
    assert made.finish(completion("xE y\nz ", b"xE y\nz END!")) == ""


def test_the_end_token_and_special_tokens_are_no_text_unless_they_are_spelled():
    for special, expected in ((False, "ab"), (True, "a<s>b")):
        made = TextStream(of_bytes(), end_tokens=frozenset({7}), special=special)
        text = made.add([97, 0]) + made.add([98]) + made.add([7])
        assert text + made.finish(completion(expected, [97, 0, 98, 7])) == expected
