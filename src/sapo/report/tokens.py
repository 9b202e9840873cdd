"""The token view's data: what each update measured of each token, and what GRPO and GSPO would have done to it.

A sequence belongs to one mini-batch, so all numbers of a sample are of one update, which the view names. The data of
a logged step are one chunk, compressed, that the page unpacks when it is asked for. Numbers of tokens are rounded to
five significant digits; the files in rollouts/ have them whole.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from sapo.data.rollouts import Observation
from sapo.data.thumbnails import Thumbnails
from sapo.data.transcripts import Heard, heard
from sapo.report.gates import objective_of
from sapo.report.pictures import add_thumbnails
from sapo.report.rollouts import evenly, is_off_policy, rollouts_of
from sapo.report.runs import ReportedRun
from sapo.report.texts import TokenTexts

DEFAULT_TOKENS = 200_000
"""Response tokens that a page holds by default: about three megabytes."""

CLIPS: dict[str, tuple[str, str]] = {"grpo": ("GRPO", "0.2 / 0.27"), "gspo": ("GSPO", "3e-4 / 4e-4")}
"""Objectives to compare with, at the papers' settings, which are the objectives' defaults."""


@dataclass(frozen=True)
class Chunk:
    """One logged step of one run, compressed.

    >>> chunk = Chunk(run=0, step=5, samples=256, tokens=10_752, left_out=0, data="H4sI...")
    >>> chunk.to_json()["step"]
    5
    """

    run: int
    """Index of the run in the report."""
    step: int
    samples: int
    tokens: int
    left_out: int
    """Samples of the step that are not in the page."""
    data: str
    """gzip of JSON in base64: see `step_value`."""

    def to_json(self) -> dict[str, Any]:
        """Return what the page says of the chunk; its data have an element of their own."""
        fields = asdict(self)
        del fields["data"]
        return fields


@dataclass(frozen=True)
class TokenView:
    """Chunks, with counts of what was left out.

    >>> TokenView((), logged_steps=26, numbers_only=()).to_json()
    {'chunks': [], 'logged_steps': 26, 'numbers_only': [], 'thumbnails': {}}
    """

    chunks: tuple[Chunk, ...]
    logged_steps: int
    """Number of files of rollouts/ over all runs."""
    numbers_only: tuple[int, ...]
    """Runs without a tokenizer: their tokens are shown by number."""
    thumbnails: Mapping[str, str] = field(default_factory=dict)
    """Pictures of prompts by hash, small, as data: URIs; as many as the page has room for."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {**asdict(self), "chunks": [c.to_json() for c in self.chunks], "numbers_only": list(self.numbers_only)}


def token_view(runs: Sequence[ReportedRun], budget: int | None = DEFAULT_TOKENS) -> TokenView:
    """Choose the logged steps of all runs that a page holds: all, or as many as fit, evenly spaced, the last first.

    Args:
        budget: tokens in all, of responses and of what was said to the model between them; every run
            has the same share of it. None for no limit.
    """
    logged = {place: run.rollouts for place, run in enumerate(runs) if run.rollouts}
    share = None if budget is None else budget // max(len(logged), 1)
    chunks: list[Chunk] = []
    numbers_only = []
    thumbnails = Thumbnails()
    for place, files in logged.items():
        texts = TokenTexts(runs[place], runs)
        if texts.numbers_only:
            numbers_only.append(place)
        chunks += _chunks(runs[place], place, files, texts, share, thumbnails)
    return TokenView(tuple(chunks), sum(map(len, logged.values())), tuple(numbers_only), thumbnails.uris)


def _chunks(
    run: ReportedRun,
    place: int,
    files: dict[int, Any],
    texts: TokenTexts,
    share: int | None,
    thumbnails: Thumbnails,
) -> list[Chunk]:
    steps = list(files)
    if share is not None:
        last = _tokens_of(rollouts_of(files[steps[-1]]))
        steps = evenly(steps, max(1, share // max(last, 1)))
    chunks: list[Chunk] = []
    for number, step in enumerate(steps):
        rows = list(rollouts_of(files[step]))
        room = None if share is None else (share - sum(c.tokens for c in chunks)) // (len(steps) - number)
        kept = _within(rows, room)
        if kept:
            value = step_value(run, kept, texts)
            add_thumbnails(thumbnails, run, kept)
            chunks.append(Chunk(place, step, len(kept), _tokens_of(kept), len(rows) - len(kept), pack(value)))
    return chunks


def _tokens_of(rows: Sequence[dict[str, Any]]) -> int:
    """Count the tokens that samples show: their own, and those that were said to the model in between."""
    return sum(len(r["token_ids"]) + sum(len(said[1]) for said in r.get("observations") or ()) for r in rows)


def _within(rows: list[dict[str, Any]], room: int | None) -> list[dict[str, Any]]:
    """Keep whole prompts from the first on, as many as there is room for; of one longer prompt as many samples, at
    least one."""
    if room is None or _tokens_of(rows) <= room:
        return rows
    kept: list[dict[str, Any]] = []
    total = whole = 0
    for place, row in enumerate(rows):
        total += _tokens_of([row])
        if total > room:
            break
        kept.append(row)
        following = rows[place + 1] if place + 1 < len(rows) else None
        if following is None or following["prompt_id"] != row["prompt_id"]:
            whole = len(kept)
    return kept[:whole] or kept or rows[:1]


def pack(value: Any) -> str:
    """Return gzip of JSON in base64; the same value gives the same text."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "surrogatepass"), 6, mtime=0)).decode("ascii")


def step_value(run: ReportedRun, rows: Sequence[dict[str, Any]], texts: TokenTexts) -> dict[str, Any]:
    """Return a step as the page reads it: texts of tokens once each, and prompts with their samples.

    Prompts, samples and updates have the numbers of the file. A sample's lists have an entry for each token:
    `t` place in `texts`, `p` log pi_old, and where its update measured
    them `z` log r, `w` gate weight, `a` slope, `e` entropy; `grpo` is a string of 1 (kept) and 0 (clipped), `gspo` one
    such figure for all. `heard` has what an environment said: own tokens before it, who said what, and how many tokens
    of what came before were forgotten; `turns` are the advantages of turns that have their own.
    """
    known: dict[str, int] = {}
    prompts: dict[Any, dict[str, Any]] = {}
    judged = _judge(run, rows)
    for row, verdicts in zip(rows, judged, strict=True):
        prompt = prompts.setdefault(
            row["prompt_id"],
            {
                "id": str(row["prompt_id"]),
                "number": number_in_step(row["prompt_id"]),
                "task": row["task"],
                "text": row["prompt"],
                "answer": row.get("answer"),
                **({"pictures": _pictures(row)} if row.get("pictures") else {}),
                "samples": [],
            },
        )
        sample: dict[str, Any] = {
            "sample": row["sample"],
            "text": row["text"],
            "reward": row["reward"],
            "status": row["status"],
            "detail": row.get("detail") or "",
            "advantage": row["advantage"],
            "finish": row["finish_reason"],
            "t": [known.setdefault(text, len(known)) for text in texts.of(row["token_ids"])],
            "p": _rounded(row.get("old_logprobs") or row["logprobs"]),
            **verdicts,
        }
        if row.get("observations"):
            sample["heard"] = [[h.at, h.said, h.forgot] for h in _heard(row, texts)]
        if row.get("turn_advantages"):
            sample["turns"] = _rounded(row["turn_advantages"])
        if row.get("dropped"):
            sample["dropped"] = True
        if "shaped_reward" in row:  # the reward that the advantage was computed from
            sample["shaped"] = row["shaped_reward"]
        prompt["samples"].append(sample)
    return {"texts": list(known), "prompts": list(prompts.values())}


def _heard(row: dict[str, Any], texts: TokenTexts) -> list[Heard]:
    """Return what the environment said in an episode. Rows of earlier versions do not say which tools spoke."""
    observations = [
        Observation(at, tuple(ids), text, keep, tuple((who, length) for who, length in (more[0] if more else ())))
        for at, ids, text, keep, *more in row["observations"]
    ]
    return heard(observations, len(row["prompt_token_ids"]), lambda ids: "".join(texts.of(ids)))


def advantages_of_tokens(row: dict[str, Any]) -> list[float]:
    """Return the advantage of each own token of a row: that of its turn, where turns have their own.

    >>> row = {"token_ids": [7, 1, 8], "advantage": 0.5, "observations": [[2, [5], "12", None]]}
    >>> advantages_of_tokens(row), advantages_of_tokens({**row, "turn_advantages": [0.5, -0.5]})
    ([0.5, 0.5, 0.5], [0.5, 0.5, -0.5])
    """
    number = len(row["token_ids"])
    by_turn = row.get("turn_advantages")
    if not by_turn:
        return [row["advantage"]] * number
    ends = [0, *(at for at, *_ in row.get("observations", ())), number]
    lengths = [stop - start for start, stop in pairwise(ends) if start < stop]
    return [a for a, length in zip(by_turn, lengths, strict=True) for _ in range(length)]


def _pictures(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a row's prompt shows: hash, and where the run wrote them size in pixels, tokens and their grid."""
    more = {name: row.get(f"picture_{name}s") for name in ("size", "token", "grid")}
    return [
        {"hash": sha256, **{name: values[i] for name, values in more.items() if values}}
        for i, sha256 in enumerate(row["pictures"])
    ]


def number_in_step(prompt_id: Any) -> Any:
    """Return the prompt's number within its step, from 0: the low 32 bits of its prompt_id; the others count steps.

    >>> number_in_step(7 << 32 | 5)
    5
    """
    return prompt_id & 0xFFFFFFFF if isinstance(prompt_id, int) else prompt_id


def _judge(run: ReportedRun, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was measured of each row's tokens, the slope of the run's own objective, and the verdicts of the
    others."""
    import torch

    from sapo.objectives import make_objective

    measured = [r for r in rows if r.get("log_ratio")]
    judged: dict[int, dict[str, Any]] = {}
    if measured:
        lengths = [len(r["log_ratio"]) for r in measured]
        log_ratio_M = torch.tensor([z for r in measured for z in r["log_ratio"]], dtype=torch.float64)
        sequence_M = torch.repeat_interleave(torch.tensor(lengths))
        advantage_M = torch.tensor([a for r in measured for a in advantages_of_tokens(r)], dtype=torch.float64)
        old = [p for r in measured for p in r.get("old_logprobs") or r["logprobs"]]
        old_M = torch.tensor(old, dtype=torch.float64)
        own, slopes = objective_of(run.settings["objective"]), None
        if own is not None:
            slope_M = own.surrogate(log_ratio_M, advantage_M, sequence_M, len(measured), old_M).slope_M
            slopes = slope_M.split(lengths)
        others = {
            name: make_objective(name).surrogate(log_ratio_M, advantage_M, sequence_M, len(measured)).weight_M
            for name in CLIPS
        }
        kept = {name: (weight_M > 0).split(lengths) for name, weight_M in others.items()}
        for place, row in enumerate(measured):
            found: dict[str, Any] = {
                "update": row["update"],
                "off": is_off_policy(row),
                "z": _rounded(row["log_ratio"]),
                "w": _rounded(row["gate_weight"]),
                "low": min(row["gate_weight"]),
                "grpo": "".join("1" if k else "0" for k in kept["grpo"][place].tolist()),
                "gspo": int(bool(kept["gspo"][place].all())),
            }
            if slopes is not None:
                found["a"] = _rounded(slopes[place].tolist())
            if "entropy" in row:
                found["e"] = _rounded(row["entropy"])
            judged[id(row)] = found
    return [judged.get(id(row), {}) for row in rows]


def _rounded(values: Sequence[float]) -> list[float]:
    """Round to five significant digits."""
    return [float(f"{v:.5g}") for v in values]
