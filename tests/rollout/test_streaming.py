"""Completions while they are drawn: the tokens of `generate`, and text that never has to be taken back."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sapo.data import Completion
from sapo.rollout.local.engine import LocalEngine, RowsInPlace
from sapo.rollout.local.rows import own_attention
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


def shared(engine, settings, monkeypatch):
    """Open a stream for each of the requests by settings of its own; count the steps that are taken from now on."""
    monkeypatch.setattr("sapo.rollout.local.engine.GROWING_TOKENS", 2)
    steps, step = [], RowsInPlace.step
    monkeypatch.setattr(RowsInPlace, "step", lambda rows: (steps.append(rows.active), step(rows)))
    return [partial(stream, engine, [r], p) for r, p in zip(ragged_requests(), settings, strict=True)], steps


MIXED = [
    params(),
    params(temperature=0.0),
    params(seed=9, temperature=0.7, top_p=0.8),
    params(max_new_tokens=21),
    params(temperature=0.7, top_p=0.8, max_new_tokens=3),
    params(min_p=0.1, top_k=5),
]


OUTLIVED = [
    *(replace(p, stop_token_ids=frozenset()) for p in MIXED[:5]),
    params(temperature=0.0, max_new_tokens=40, stop_token_ids=frozenset()),
]
"""The last goes on alone, in device steps that are made for it; the batch was begun by other settings."""


@pytest.mark.parametrize(
    ("family", "graphs", "settings"),
    [
        ("qwen3", "auto", MIXED),
        ("qwen3_5", "auto", MIXED),
        ("qwen3", "eager", [params()] * 6),
        ("qwen3_5", "eager", [params()] * 6),
        ("qwen3", "eager", OUTLIVED),
    ],
    ids=["qwen3", "qwen3_5", "qwen3 in device steps", "qwen3_5 in device steps", "outlived"],
)
def test_streams_share_steps_and_each_draws_what_it_draws_alone(policies, monkeypatch, family, graphs, settings):
    engine = LocalEngine(policies(family), max_rows=64, cuda_graphs=graphs)
    alone = [joined(stream(engine, [r], p)) for r, p in zip(ragged_requests(), settings, strict=True)]
    opens, steps = shared(engine, settings, monkeypatch)
    found = [[] for _ in opens]
    streams = {}
    for turn in itertools.count():  # one joins at each turn, and each is asked for its next tokens
        if turn < len(opens):
            streams[turn] = opens[turn]()
        for number, open_stream in list(streams.items()):
            if (new := next(open_stream, None)) is None:
                del streams[number]
            else:
                found[number].append(new)
        if not streams and turn >= len(opens):
            break
    for expected, got in zip(alone, found, strict=True):
        drawn = joined(got)
        assert drawn.keys() == expected.keys()
        for place in drawn:
            assert_same(drawn[place], expected[place])
    longest = max(len(c) for samples in alone for c in samples.values())
    assert len(steps) <= longest + len(opens), "a step is for all"


def test_who_leaves_a_shared_batch_takes_its_rows_along_and_disturbs_nobody(policies, monkeypatch):
    engine = LocalEngine(policies("qwen3"), max_rows=8)
    settings = [params(stop_token_ids=frozenset())] * 6
    alone = [joined(stream(engine, [r], p)) for r, p in zip(ragged_requests(), settings, strict=True)]
    opens, _ = shared(engine, settings, monkeypatch)
    streams = [begin() for begin in opens]  # 16 samples on 8 rows, so that the last ones wait
    found = [[next(streams[0])]]
    batch = streams[0]._batch
    assert len(batch.rows.waiting) > 1
    assert batch.rows.active == 8
    streams[1].close()
    assert batch.rows.active == 7
    streams.pop(2)  # dropped without a word
    batch.step()
    assert batch.rows.active == 6, "3 that go on, and 3 that have waited"
    last = streams.pop()
    last.close()
    assert next(streams[1], None) is None
    assert batch.rows.cache.rows == 8
    found = [found[0] + list(streams[0]), [], *(list(s) for s in streams[2:])]
    for number, got in ((0, found[0]), (3, found[2]), (4, found[3])):
        drawn = joined(got)
        for place, expected in alone[number].items():
            assert_same(drawn[place], expected)
    assert not batch.rows.unfinished
    assert batch.rows.cache.pool_of == {}


def test_a_step_that_fails_fails_every_stream_of_its_batch_and_no_later_one(policies, monkeypatch):
    engine, requests = engine_of(policies("qwen3")), ragged_requests()
    first, second = (stream(engine, [r], params()) for r in requests[:2])
    with monkeypatch.context() as broken:
        broken.setattr(RowsInPlace, "step", lambda rows: 1 / 0)
        for open_stream in (first, second):
            with pytest.raises(ZeroDivisionError):
                next(open_stream)
    with pytest.raises(ZeroDivisionError):
        next(second)
    first.close()
    assert joined(stream(engine, requests[:1], params())).keys() == {(0, 0), (0, 1), (0, 2)}


def test_who_leaves_leaves_no_completion_and_no_likeliest_tokens_behind(policies):
    engine, requests = engine_of(policies("qwen3")), ragged_requests()
    settings = params(stop_token_ids=frozenset())
    first = stream(engine, [replace(requests[0], top_logprobs=2)], settings)
    second = stream(engine, requests[1:2], settings)
    next(first)
    rows = first._batch.rows
    rows.admit()
    rows.step()  # whose tokens nobody has taken yet
    assert {request for request, _ in rows.likeliest} == {0}
    first.close()
    assert rows.results[0] == [None] * 3
    assert rows.likeliest == {}
    second.close()


@pytest.mark.parametrize("where", ["_run", "add"])
def test_a_batch_that_ctrl_c_has_interrupted_is_joined_by_nobody(policies, monkeypatch, where):
    # In a step, or while the second stream joins.
    engine, requests = engine_of(policies("qwen3")), ragged_requests()

    def interrupt(*_):
        raise KeyboardInterrupt

    first = stream(engine, requests[:1], params())
    with monkeypatch.context() as broken:
        broken.setattr(RowsInPlace, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(first) if where == "_run" else stream(engine, requests[1:2], params())
    later = stream(engine, requests[1:2], params())
    with pytest.raises(KeyboardInterrupt):
        next(first)
    assert_all_same(joined(later), engine.generate(requests[1:2], params()))


@pytest.mark.parametrize("way", [None, "rows", "whole rows"])
def test_the_likeliest_tokens_of_each_draw_are_those_of_a_plain_forward(policies, way):
    policy = policies("qwen3")
    engine, settings = engine_of(policy, way), params(temperature=0.7, max_new_tokens=5)
    first, second = ragged_requests()[0], ragged_requests()[3]
    steps = list(stream(engine, [replace(first, top_logprobs=3), second], settings))
    whole = joined(steps)
    for (number, sample), completion in whole.items():
        likeliest = [
            of
            for new in itertools.chain(*steps)
            if (new.request, new.sample) == (number, sample)
            for of in new.likeliest
        ]
        if number == 1:
            assert likeliest == []
            continue
        ids = [*first.prompt.token_ids, *completion.token_ids.tolist()]
        with torch.no_grad(), own_attention(policy):
            logits = policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        top = torch.log_softmax(logits / 0.7, -1)[-len(completion) - 1 : -1].topk(3)
        assert [[t for t, _ in of] for of in likeliest] == top.indices.tolist()
        assert [p for of in likeliest for _, p in of] == pytest.approx(top.values.flatten().tolist(), abs=1e-4)


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
