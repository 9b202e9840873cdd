"""Lay out the tokens of one completion among packed inputs: a run, or a tree where its history was rewritten.

Only the policy's own tokens are predicted. What the environment said is read, and never a target. Branches of one
trajectory share what they have in common, so that nothing is computed twice, and stay one sequence of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sapo.data import Completion

PROMPT = -1
"""The end of the prompt, in place of a segment or an input of the trajectory."""
ROOT = -2
"""Nothing comes before: the trajectory has rewritten its prompt."""


@dataclass(frozen=True)
class Layout:
    """The packed inputs of one trajectory, R of them, after its prompt of P tokens.

    Two turns, `7 1` and `8 1`, with `5` between them; the last token predicts nothing:

    >>> from sapo.data import Observation
    >>> turns = Completion((7, 1, 8, 1), (-0.1,) * 4, "stop", observations=(Observation(2, (5,)),))
    >>> laid = lay_out(2, turns)
    >>> laid.source_R.tolist(), laid.predictor_T.tolist(), laid.segments
    ([2, 3, 4, 5], [-1, 0, 2, 3], ((0, 4, -1),))
    """

    source_R: NDArray[np.int64]
    """Which token of the prompt and the completion's `sequence`, end to end, each input is."""
    seen_R: NDArray[np.int64]
    """How many tokens the model sees before each input."""
    segments: tuple[tuple[int, int, int], ...]
    """First input, number of inputs, and the segment it continues: one of these, PROMPT or ROOT."""
    predictor_T: NDArray[np.int64]
    """For each of the policy's own tokens the input that predicts it, or PROMPT."""

    @property
    def num_inputs(self) -> int:
        """Return R."""
        return len(self.source_R)


def lay_out(prompt_length: int, completion: Completion) -> Layout:
    """Lay out the inputs of a completion of a token or more.

    Args:
        prompt_length: P.
    """
    if any(o.keep is not None for o in completion.observations):
        return _tree(prompt_length, completion)
    places_T = own_places(completion)
    inputs = int(places_T[-1])  # what comes after the last own token predicts nothing, nor does that token
    source_R = np.arange(prompt_length, prompt_length + inputs)
    return Layout(source_R, source_R, ((0, inputs, PROMPT),) if inputs else (), places_T - 1)


def own_places(completion: Completion) -> NDArray[np.int64]:
    """Return where each of the policy's own tokens lies in the sequence.

    >>> from sapo.data import Observation
    >>> own_places(Completion((7, 1), (-0.1, -0.2), "stop", observations=(Observation(1, (5, 6)),))).tolist()
    [0, 3]
    """
    places_T = np.arange(len(completion))
    for observation in completion.observations:
        places_T[observation.at :] += len(observation.token_ids)
    return places_T


class _Tree:
    """Tokens that a model sees one after the other; going back and on again makes a branch."""

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self.parents: list[int] = []
        self.sources: list[int] = []
        self.seen: list[int] = []
        self.path = [PROMPT] * prompt_length  # the node of each token that the model sees now

    @property
    def end(self) -> int:
        """Return the node that predicts the next token."""
        return self.path[-1] if self.path else ROOT

    def put(self, source: int) -> None:
        """Let the model see one more token."""
        self.parents.append(self.end)
        self.sources.append(source)
        self.seen.append(len(self.path))
        self.path.append(len(self.parents) - 1)

    def keep(self, tokens: int) -> None:
        """Let the model see no more than the first `tokens`."""
        inside_prompt = tokens < self.prompt_length and self.path[:1] == [PROMPT]
        self.path = [] if inside_prompt else self.path[:tokens]
        for source in range(tokens if inside_prompt else 0):  # the prompt's own segment cannot be left in its middle
            self.put(source)


def _tree(prompt_length: int, completion: Completion) -> Layout:
    """Lay out a completion with a rewritten history."""
    tree = _Tree(prompt_length)
    source, predicted_from = prompt_length, []

    def put(tokens: int, own: bool) -> None:
        nonlocal source
        for _ in range(tokens):
            if own:
                assert tree.end != ROOT, "an observation keeps nothing and says nothing: the next token has no past"
                predicted_from.append(tree.end)
            tree.put(source)
            source += 1

    starts = (0, *(o.at for o in completion.observations), len(completion))
    for observation, (start, stop) in zip((*completion.observations, None), pairwise(starts), strict=True):
        put(stop - start, own=True)
        if observation is not None:
            tree.keep(len(tree.path) if observation.keep is None else observation.keep)
            put(len(observation.token_ids), own=False)
    return _cut(tree, predicted_from)


def _cut(tree: _Tree, predicted_from: list[int]) -> Layout:
    """Cut a tree into segments. Tokens that lead to no prediction are no inputs."""
    used = {node for node in predicted_from if node >= 0}
    for node in range(len(tree.parents) - 1, -1, -1):
        if node in used and tree.parents[node] >= 0:
            used.add(tree.parents[node])
    children: dict[int, int] = {}
    for node in used:
        children[tree.parents[node]] = children.get(tree.parents[node], 0) + 1
    nodes = sorted(used)  # parents come before their children
    place, segment_of = {PROMPT: PROMPT}, {PROMPT: PROMPT, ROOT: ROOT}
    segments: list[tuple[int, int, int]] = []
    for at, node in enumerate(nodes):
        parent = tree.parents[node]
        if parent >= 0 and children[parent] == 1 and place[parent] == at - 1:
            segment_of[node] = segment_of[parent]
            start, length, above = segments[-1]
            segments[-1] = (start, length + 1, above)
        else:
            segment_of[node] = len(segments)
            segments.append((at, 1, segment_of[parent]))
        place[node] = at
    return Layout(
        source_R=np.array([tree.sources[n] for n in nodes], np.int64),
        seen_R=np.array([tree.seen[n] for n in nodes], np.int64),
        segments=tuple(segments),
        predictor_T=np.array([place[n] for n in predicted_from], np.int64),
    )
