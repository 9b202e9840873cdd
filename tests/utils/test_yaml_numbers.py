"""What YAML takes for a number is the whole of a value, and not its beginning."""

from __future__ import annotations

from sapo.utils.reading import parse_yaml


def test_a_commit_that_begins_like_a_number_is_a_text():
    text = "commit: 43e77a3fc0e4bb2ba1375763be85fca5b124a09a\nrate: 1e-4\nword: 1e4x"
    for quick in (False, True):
        commit, rate, word = parse_yaml(text, quick=quick).values()
        assert (commit, rate, word) == ("43e77a3fc0e4bb2ba1375763be85fca5b124a09a", 1e-4, "1e4x")
