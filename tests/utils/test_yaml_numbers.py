"""What YAML takes for a number is the whole of a value, and not its beginning; a key stands once, and may be merged."""

from __future__ import annotations

import pytest

from sapo.utils.reading import parse_yaml


def test_a_commit_that_begins_like_a_number_is_a_text():
    text = "commit: 43e77a3fc0e4bb2ba1375763be85fca5b124a09a\nrate: 1e-4\nword: 1e4x"
    for quick in (False, True):
        commit, rate, word = parse_yaml(text, quick=quick).values()
        assert (commit, rate, word) == ("43e77a3fc0e4bb2ba1375763be85fca5b124a09a", 1e-4, "1e4x")


MERGED_TWICE = """
base: &base {x: 0, z: 1}
deep: {more: {a: &a {<<: *base, x: 1}}}
b: {<<: *a, y: 2}
c: {<<: [*a, *base], z: 3}
"""


def test_a_mapping_that_overrides_what_it_merges_may_be_merged_itself():
    """By hand, after https://yaml.org/type/merge.html: own keys before merged ones, earlier ones before later ones."""
    a = {"x": 1, "z": 1}
    of_the_file = {"base": {"x": 0, "z": 1}, "deep": {"more": {"a": a}}, "b": {**a, "y": 2}, "c": {"x": 1, "z": 3}}
    assert parse_yaml(MERGED_TWICE) == parse_yaml(MERGED_TWICE, quick=True) == of_the_file


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: 1\nb: 2\na: 3\nb: 4", "line 3, column 1"),
        ("x: [1, {c: {d: 1, d: 1}}]", "line 1, column 19"),
        ("x: &x {<<: {d: 1}, d: 2, d: 3}\ny: *x", "line 1, column 26"),
        ("? {d: 1, d: 2}\n: 3", "line 1, column 10"),
        ("x: !!set {d, d}", "line 1, column 14"),
        ("x: &x [*x, {d: 1, d: 2}]", "line 1, column 19"),
    ],
)
def test_a_key_that_stands_twice_is_refused_wherever_it_stands(text, place):
    with pytest.raises(ValueError, match=f"the key '[ad]' stands twice.*{place}"):
        parse_yaml(text)
