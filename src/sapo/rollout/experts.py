"""The experts that an engine's own forwards chose (routing replay R3), taken down while it samples.

A completion's last token never goes through the model and has no record, as it has no place in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sapo.data import Completion, Group, RoutedExperts


class ExpertLog:
    """Takes down the experts of one call of `generate`.

    >>> from sapo.data import Prompt
    >>> log = ExpertLog()
    >>> log.note_prompt(0, RoutedExperts(b"\\x00\\x03", layers=1, per_token=1))
    >>> log.note_completion(0, 1, RoutedExperts(b"\\x02", layers=1, per_token=1))
    >>> drawn = tuple(Completion((7,) * n, (-0.1,) * n, "stop") for n in (1, 2))
    >>> [group] = log.attach([Group(Prompt(0, "t", "", (1, 2)), drawn)])
    >>> [c.experts.indices for c in group.completions]
    [b'', b'\\x02']
    """

    def __init__(self) -> None:
        self._prompts: dict[int, RoutedExperts] = {}
        self._completions: dict[tuple[int, int], RoutedExperts] = {}

    def note_prompt(self, request: int, experts: RoutedExperts) -> None:
        """Take down the experts of a prompt's tokens.

        Args:
            request: its place in the call.
        """
        self._prompts[request] = experts

    def note_completion(self, request: int, sample: int, experts: RoutedExperts) -> None:
        """Take down the experts of a completion's tokens but the last; one of a single token needs no note.

        Args:
            request, sample: its place in the call.
        """
        self._completions[request, sample] = experts

    def attach(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups, one for each request, with the experts of their prompts and completions.

        Every record goes to one completion, and none is left.
        """
        left = dict(self._completions)
        found = [
            replace(
                group,
                prompt_experts=self._prompts[i],
                completions=tuple(
                    replace(c, experts=self._of(c, left.pop((i, j), None))) for j, c in enumerate(group.completions)
                ),
            )
            for i, group in enumerate(groups)
        ]
        assert not left, f"experts were recorded of {len(left)} completions that are not there"
        return found

    def _of(self, completion: Completion, recorded: RoutedExperts | None) -> RoutedExperts:
        if recorded is None:
            recorded = replace(next(iter(self._prompts.values())), indices=b"")
        tokens = len(completion) - 1
        assert recorded.num_tokens == tokens, f"{recorded.num_tokens} records of {tokens} tokens"
        return recorded
