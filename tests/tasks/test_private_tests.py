"""The reader of LiveCodeBench's private tests, given real pickles of its form and hostile ones."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import zlib

import pytest

from sapo.errors import TaskError
from sapo.tasks.verifiers.private_tests import decode_private_tests

TESTS = [
    {"input": "1 2\n", "output": "3\n", "testtype": "stdin"},
    {"input": "é\n\U0001f600", "output": "x" * 70_000, "testtype": "stdin"},
]


def packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("tests", [[], TESTS[:1], TESTS], ids=["none", "short", "long"])
def test_a_pickled_json_text_of_every_protocol_is_read(protocol, tests):
    text = json.dumps(tests)
    assert decode_private_tests(packed(pickle.dumps(text, protocol))) == tests


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_plain_json_is_read_as_it_is(ensure_ascii):
    assert decode_private_tests(" " + json.dumps(TESTS[:1], ensure_ascii=ensure_ascii)) == TESTS[:1]


class Runs:
    """Pickled, it calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [os.system, subprocess.getoutput, eval, exec], ids=lambda f: f.__name__)
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, protocol, function):
    target = tmp_path / "was-run"
    command = f"touch {target}" if function in (os.system, subprocess.getoutput) else f"open({str(target)!r}, 'w')"
    hostile = pickle.dumps(Runs(function, command), protocol)
    with pytest.raises(TaskError, match="one string; got the instruction"):
        decode_private_tests(packed(hostile))
    assert not target.exists()
    # It is a real one: pickle itself does run it.
    pickle.loads(hostile)
    assert target.exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps([Runs(os.getcwd)]),
        pickle.dumps(("[]", Runs(os.getcwd))),
        b"cos\nsystem\n(S'true'\ntR.",  # by hand, protocol 0: GLOBAL, MARK, STRING, TUPLE, REDUCE
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL of two strings
        b"(S'true'\nios\nsystem\n.",  # INST
        pickle.dumps(b"[]"),
        pickle.dumps(["[]"]),
        pickle.dumps({"a": "[]"}),
        pickle.dumps(7),
        pickle.dumps(None),
        b"\x80\x04\x82\x01.",  # EXT1: an object of the extension registry
        b"\x80\x04Ppersistent\n.",  # PERSID
    ],
)
def test_a_pickle_of_anything_but_a_string_is_refused(content):
    with pytest.raises(TaskError, match="one string; got the instruction") as caught:
        decode_private_tests(packed(content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps("[]") + pickle.dumps("[]"), "further bytes after its end"),
        (b"\x80\x04\x8c\x02[]\x8c\x02[].", "got 2 strings"),
        (b"\x80\x04.", "got 0 strings"),
        (pickle.dumps("[]")[:-1], "whole pickle"),
        (b"", "whole pickle"),
        (b"\x80\x04\x8c\xff[].", "whole pickle"),
        (b"\xff", "whole pickle"),
        (pickle.dumps("no JSON"), "JSON list; got 'no JSON'"),
        (pickle.dumps('{"input": 1}'), "JSON list; got dict"),
        (pickle.dumps('[{"input": "1"}]'), "test 0 is"),
        (pickle.dumps('[{"input": 1, "output": "1", "testtype": "stdin"}]'), "strings input, output, testtype"),
        (pickle.dumps("[" * 100_000), "JSON list"),
    ],
)
def test_a_damaged_payload_is_refused_in_one_line(content, message):
    with pytest.raises(TaskError, match=message) as caught:
        decode_private_tests(packed(content))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["{}", "not base64!", "abc", base64.b64encode(b"not zlib").decode(), ""])
def test_a_text_of_another_form_is_refused(text):
    with pytest.raises(TaskError, match="private tests must"):
        decode_private_tests(text)


def test_a_decompression_bomb_is_stopped_at_the_limit():
    bomb = packed(pickle.dumps("[" + " " * 50_000_000 + "]"))
    assert len(bomb) < 100_000
    with pytest.raises(TaskError, match="may have 1000000 bytes; got more; raise max_bytes"):
        decode_private_tests(bomb, max_bytes=1_000_000)


def test_a_stream_that_is_cut_off_is_refused():
    cut = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(TESTS)))[:-8]).decode()
    with pytest.raises(TaskError, match="cut off"):
        decode_private_tests(cut)
