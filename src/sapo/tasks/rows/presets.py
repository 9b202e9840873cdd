r"""Benchmarks by name. A preset is a set of options of the task `dataset` under a name.

    sapo eval MODEL --task aime25                          # from the hub
    sapo eval MODEL --task aime25 path=aime25.jsonl        # from a file or a directory, without a connection

Options of the recipe override those of the preset. gsm8k trains on its training split and holds out its test split.
All others are for evaluation: every row is held out, and training is refused unless `held_out_fraction` or
`held_out_path` says what to hold out instead. A single file given as `path` is held out in full in the same way.

The wordings are those with which the benchmarks are reported. The rows of a benchmark keep their own licence, which is
named beside them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sapo.data import Prompt
from sapo.data.pictures import PICTURE_MARKER
from sapo.tasks.rows.columns import Names
from sapo.tasks.rows.datasets import HELD_OUT_SIDES, DatasetTask
from sapo.tasks.rows.reading import Row
from sapo.tasks.rows.reshaping import (
    finish_livecodebench,
    reshape_humaneval,
    reshape_livecodebench,
    reshape_mathvision,
    reshape_mbpp,
    reshape_zebralogic,
)

BOXED = "{prompt}\nPut your final answer within \\boxed{}."

_OF_PRESETS_ONLY = ("dataset", "adapt", "finish")


@dataclass(frozen=True)
class Preset:
    """A benchmark: where its rows are, what its columns mean, how it words questions and how it scores answers.

    Calling it makes the task. Its fields are those of `DatasetSettings`, which documents them.

    >>> PRESETS["aime25"].verifier, PRESETS["aime25"].licence
    ('boxed_integer', 'CC-BY-NC-SA-4.0')
    """

    name: str
    dataset: str
    licence: str
    """Licence of the dataset, as its card states it."""
    split: str = "test"
    config: str | None = None
    data_files: Names = None
    prompt_field: Names = "problem"
    answer_field: Names = "answer"
    answer_after: str | None = None
    subject_field: Names = None
    image_field: Names = ("images", "image", None)
    picture_marker: str | None = PICTURE_MARKER
    template: str = BOXED
    verifier: Any = "math"
    held_out_split: str | None = None
    """Split that is held out; None for a benchmark without training rows."""
    adapt: Callable[[str, Row], Row] | None = None
    finish: Callable[[Prompt], Prompt] | None = None

    def __call__(self, **overrides: Any) -> DatasetTask:
        """Make the task, with `overrides` in place of the preset's options.

        Raises:
            TaskError: as from `DatasetTask`.
        """
        options: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "licence"}
        options |= {"prefers_chat": True, **overrides}
        if all(overrides.get(side) is None for side in HELD_OUT_SIDES):
            path = overrides.get("path")
            # A file is not divided into the splits of the hub, and the caller has not said which side it is.
            if self.held_out_split is None or (path is not None and not Path(path).is_dir()):
                options |= {"held_out_split": None, "held_out_fraction": 1}
        elif overrides.get("held_out_split") is None:
            options["held_out_split"] = None
        return DatasetTask(**options)

    @property
    def __signature__(self) -> inspect.Signature:
        """Return the options that a recipe may give: those of `DatasetTask` without those only a preset sets."""
        own = inspect.signature(DatasetTask)
        return own.replace(parameters=[p for p in own.parameters.values() if p.name not in _OF_PRESETS_ONLY])


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "gsm8k",
            "openai/gsm8k",
            licence="MIT",
            config="main",
            split="train",
            held_out_split="test",
            prompt_field="question",
            answer_after="####",
        ),
        Preset("math500", "HuggingFaceH4/MATH-500", licence="MIT", subject_field="subject"),
        Preset(
            "aime24",
            "Maxwell-Jia/AIME_2024",
            licence="MIT",
            split="train",
            prompt_field=["Problem", "problem"],
            answer_field=["Answer", "answer"],
            template=BOXED + " The answer is an integer between 0 and 999 inclusive.",
            verifier="boxed_integer",
        ),
        Preset(
            "aime25",
            "MathArena/aime_2025",
            licence="CC-BY-NC-SA-4.0",
            split="train",
            subject_field=["problem_type", None],
            template=BOXED + " The answer is an integer between 0 and 999 inclusive.",
            verifier="boxed_integer",
        ),
        Preset(
            "hmmt25_feb",
            "MathArena/hmmt_feb_2025",
            licence="CC-BY-NC-SA-4.0",
            split="train",
            subject_field=["problem_type", None],
        ),
        Preset(
            "hmmt25_nov",
            "MathArena/hmmt_nov_2025",
            licence="CC-BY-NC-SA-4.0",
            split="train",
            subject_field=["problem_type", None],
        ),
        Preset(
            "beyond_aime",
            "ByteDance-Seed/BeyondAIME",
            licence="CC0-1.0",
            template=BOXED + " The answer is an integer.",
            verifier="boxed_integer",
        ),
        Preset(
            "zebralogic",
            "WildEval/ZebraLogic",
            licence="Apache-2.0",
            config="grid_mode",
            prompt_field="puzzle",
            answer_field=None,
            subject_field="size",
            template="{prompt}",
            verifier="zebra",
            adapt=reshape_zebralogic,
        ),
        # The repository has a loading script, which is never run. Its six files are release v6, with 1,055 rows and
        # some gigabytes. data_files=test6.jsonl takes only the newest.
        Preset(
            "livecodebench",
            "livecodebench/code_generation_lite",
            licence="CC",
            data_files=["test.jsonl", *(f"test{number}.jsonl" for number in range(2, 7))],
            prompt_field="question_content",
            answer_field=None,
            subject_field="difficulty",
            template="{prompt}",
            verifier="code",
            adapt=reshape_livecodebench,
            finish=finish_livecodebench,
        ),
        Preset(
            "humaneval",
            "openai/openai_humaneval",
            licence="MIT",
            prompt_field="prompt",
            answer_field=None,
            template="{prompt}",
            verifier="code",
            adapt=reshape_humaneval,
        ),
        Preset(
            "mbpp",
            "google-research-datasets/mbpp",
            licence="CC-BY-4.0",
            config="full",
            prompt_field=["text", "prompt"],
            answer_field=None,
            template="{prompt}",
            verifier="code",
            adapt=reshape_mbpp,
        ),
        Preset(
            "mathvision",
            "MathLLMs/MathVision",
            licence="MIT",
            prompt_field="question",
            subject_field="subject",
            # One picture a row, whatever the markers <image1>, <image2> of the question: they stay text, as officially.
            image_field=["decoded_image", "image"],
            picture_marker=None,
            verifier="choice_or_math",
            adapt=reshape_mathvision,
        ),
    )
}

ALIASES = {"hmmt25": "hmmt25_feb"}
