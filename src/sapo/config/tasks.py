"""The tasks of a recipe, how their questions are put, and the curriculum of their rows."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from sapo.config.section import CheckedNumbers, Section


class ShotConfig(Section):
    """A worked example shown before the question."""

    prompt: str
    """The example's question, as the task would ask it."""
    answer: str
    """What a good completion of it says."""


class PromptConfig(Section):
    """How a task's question becomes what the model sees, and where a completion ends."""

    style: Literal["auto", "plain", "chat"] = "auto"
    """chat goes through the tokenizer's chat template, plain does not; auto takes chat for rows of messages, and for
    tasks written for chat models (the benchmarks) where the tokenizer has a template."""
    system: str | None = None
    """System message of a chat, unless the row brings one; the first paragraph of a plain prompt."""
    thinking: bool | None = None
    """Value of the chat template's enable_thinking; null leaves it to the template."""
    template: str = "{prompt}"
    """Wording around the question, as in "Q: {prompt}\\nA:"."""
    answer_template: str = " {answer}\n"
    """Wording of an example's answer in a plain prompt; in a chat the answer is the assistant's turn."""
    shots: int | list[ShotConfig] = 0
    """Few-shot examples before the question: a list, or a number that the task picks from its training split."""
    stop: list[str] = Field([])
    """Strings that end a completion. The token that completes one is kept and carries loss."""
    special_tokens: bool = False
    """Whether the text of a completion, as verifiers and logs get it, has special tokens in it, spelled out. The token
    that ends a completion is left out in any case."""

    @model_validator(mode="after")
    def _holds_its_places(self) -> PromptConfig:
        for name, place in (("template", "{prompt}"), ("answer_template", "{answer}")):
            if place not in getattr(self, name):
                raise ValueError(f"{name} must hold {place}; got {getattr(self, name)!r}")
        if isinstance(self.shots, int) and self.shots < 0:
            raise ValueError(f"shots must be 0 or more, or a list of examples; got {self.shots}")
        if "" in self.stop:
            raise ValueError("a stop string must not be empty; got ''")
        return self


class CurriculumConfig(Section):
    """Rows that are too easy or too hard are asked less often. For tasks with a finite number of rows."""

    low: float = Field(0.1, ge=0, le=1)
    """Rows with a pass rate below this are sampled less often."""
    high: float = Field(0.9, ge=0, le=1)
    """Rows with a pass rate above this are sampled less often."""
    outside: float = Field(0.25, gt=0, le=1)
    """Probability that such a row is sampled when its turn comes. Never 0, so that its pass rate stays current."""
    memory: float = Field(0.5, ge=0, lt=1)
    """Weight of a row's earlier pass rate when it is sampled again; 0 keeps the newest pass rate only."""

    @model_validator(mode="after")
    def _band(self) -> CurriculumConfig:
        if self.low > self.high:
            raise ValueError(f"low must not exceed high; got {self.low} and {self.high}; 0.1 and 0.9 are the defaults")
        return self


class TaskConfig(CheckedNumbers):
    """Where prompts come from and how answers are scored. Further settings are the task's own, checked by it."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    name: str
    """One of sapo.tasks.TASKS."""
    label: str | None = None
    """Name in logs and metrics; the task's own name when null. Two tasks of one kind need different labels."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Share of the prompts of each step, relative to the other tasks."""
    prompt: PromptConfig | None = None
    """Prompt format of this task; the recipe's `prompt` when null."""
    curriculum: CurriculumConfig | None = None
    """Curriculum of this task; the recipe's `curriculum` when null."""

    @model_validator(mode="after")
    def _seed_of_the_run(self) -> TaskConfig:
        if "seed" in (self.model_extra or {}):
            raise ValueError("a task has the seed of the run; got one of its own; set `seed` beside `tasks`")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Return the task's own settings."""
        options = dict(self.model_extra or {})
        return options if self.label is None else {**options, "name": self.label}
