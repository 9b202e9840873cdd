"""How TensorBoard lays out the figures of several tasks: a panel for each task, and one that compares them."""

from __future__ import annotations

import re
from collections.abc import Sequence

COMPARED = (
    "pass@1",
    "reward/mean",
    "length/mean",
    "status/truncated",
    "groups/zero_variance",
    "update/gate/eur",
    "update/entropy",
)

Panels = dict[str, dict[str, list[str | list[str]]]]


def task_panels(tasks: Sequence[str]) -> Panels:
    """Return panels as `SummaryWriter.add_custom_scalars` takes them: panel -> chart -> kind and patterns of tags.

    >>> panels = task_panels(["add", "times"])
    >>> panels["tasks"]["pass@1"]
    ['Multiline', ['task/add/pass@1$', 'task/times/pass@1$']]
    >>> panels["times"]["pass@1"]
    ['Multiline', ['task/times/pass@1$']]
    """

    def charts(names: Sequence[str]) -> dict[str, list[str | list[str]]]:
        return {f: ["Multiline", [re.escape(f"task/{name}/{f}") + "$" for name in names]] for f in COMPARED}

    return {"tasks": charts(tasks), **{name: charts([name]) for name in tasks}}
