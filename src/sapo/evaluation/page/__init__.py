"""The completions of an evaluation as one HTML file that needs nothing else: no server, no network.

The data are JSON in the page. completions.js draws what comes into view, so that thousands of completions cost no more
than the few that are read. Texts of a model are only ever put into text nodes. Besides, the page's content security
policy admits its own script and style by their hashes and nothing else, so that markup in a completion has no effect.

The parts serve other pages too: `page_data` and `embedded` give the data, `part` the script, whose function
`showCompletions(root, data)` draws them into any element, and the style.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from sapo.data import Picture
from sapo.data.thumbnails import Thumbnails
from sapo.evaluation.figures import Evaluation
from sapo.evaluation.records import GROUPINGS
from sapo.evaluation.results import Results
from sapo.utils.files import write_whole
from sapo.utils.html import content_security_policy, embedded, filled
from sapo.utils.text import visible


def write_page(results: Results, path: str | Path, pictures: Iterable[Picture] = ()) -> Path:
    """Write the page of an evaluation's completions, whole or not at all.

    Args:
        pictures: of the problems; the page shows as many as it has room for.
    """
    thumbnails = Thumbnails()
    for picture in pictures:
        thumbnails.add(picture.sha256, lambda picture=picture: picture)  # type: ignore[misc]
    path = Path(path)
    script, style = part("completions.js"), part("completions.css")
    fields = {
        "title": html.escape(f"{results.evaluation.task}: {results.about['model']['path']}"),
        "policy": html.escape(content_security_policy([script], [style]) + "; img-src data:"),
        "style": style,
        "data": embedded(page_data(results) | ({"thumbnails": thumbnails.uris} if thumbnails.uris else {})),
        "script": script,
    }
    write_whole(path, filled(part("completions.html"), fields))
    return path


def page_data(results: Results) -> dict[str, Any]:
    """Return what the page shows as a JSON value: the figures in words, and every problem with its completions."""
    evaluation = results.evaluation
    # Examples before the question are the same in every prompt; they are kept once.
    opening = _common_opening([p.seen for p in evaluation.answered])
    problems = []
    for problem in evaluation.answered:
        record = problem.to_json()
        record["seen"] = None if problem.seen == problem.prompt else problem.seen[len(opening) :]
        for sample in [record["greedy"] or {}, *record["samples"]]:
            # Tools, environments and verifiers wrote these, and could put them in another order on the screen.
            sample |= {
                name: visible(sample[name]) for name in ("answer", "detail") if isinstance(sample.get(name), str)
            }
            if "transcript" in sample:
                sample["transcript"] = [[visible(who), visible(text)] for who, text in sample["transcript"]]
        problems.append(record)
    return {
        "task": evaluation.task,
        "model": results.about["model"]["path"],
        "samples": evaluation.samples,
        "threshold": evaluation.threshold,
        "figures": figures_in_words(evaluation),
        "slices": {name: [s.to_json(evaluation.samples) for s in rows] for name, rows in evaluation.slices.items()},
        "groupings": [name for name in GROUPINGS if any(name in p.groups for p in evaluation.answered)],
        "opening": opening,
        "problems": problems,
    }


def figures_in_words(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return the figures that were measured, with their intervals, as a person reads them."""
    n = evaluation.samples
    estimates = [
        (f"mean@{n}", evaluation.mean),
        *((f"pass@{k}", estimate) for k, estimate in evaluation.pass_at.items() if k > 1),
        (f"majority@{n}", evaluation.majority if n > 1 else None),
        ("greedy", evaluation.greedy),
        *((name.replace("_", " "), figure.mean) for name, figure in evaluation.figures.items()),
    ]
    if not evaluation.binary:  # shares of right completions say little of other rewards than 0 and 1
        estimates = [(name.replace("_", " "), figure.mean) for name, figure in evaluation.figures.items()]
    reward = "not judged" if evaluation.reward_mean is None else f"{evaluation.reward_mean:.3f}"
    words = [{"name": "mean reward", "value": reward, "more": ""}]
    words += [
        {"name": name, "value": f"{e.value:.3f}", "more": f"{e.low:.3f} to {e.high:.3f}"}
        for name, e in estimates
        if e is not None
    ]
    if evaluation.constant is not None and evaluation.binary:
        constant = evaluation.constant
        answer = constant.answer if len(constant.answer) <= 24 else f"{constant.answer[:23]}…"
        words.append({"name": "best constant", "value": f"{constant.share:.3f}", "more": f"always {answer}"})
    total = evaluation.problems * n
    for status, count in evaluation.statuses.items():
        if count and status != "scored":
            words.append(
                {"name": status.replace("_", " "), "value": f"{count / total:.1%}", "more": f"{count:,} of {total:,}"}
            )
    longest = f"on average, {evaluation.length_max:,} at most"
    words.append({"name": "tokens", "value": f"{evaluation.length_mean:,.0f}", "more": longest})
    return words


def _common_opening(texts: list[str]) -> str:
    """Return what all texts begin with. It is what the first and the last of them in sorted order begin with.

    >>> _common_opening(["Q: 1\\nQ: 2", "Q: 1\\nQ: 3"])
    'Q: 1\\nQ: '
    """
    if len(texts) < 2:
        return ""
    first, last = min(texts), max(texts)
    differs = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(differs, min(len(first), len(last)))]


def part(name: str) -> str:
    """Read completions.html, .css or .js from the package."""
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
