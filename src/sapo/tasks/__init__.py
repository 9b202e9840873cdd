"""Tasks: sources of prompts, and verifiers that score completions.

`prompts_for_step` says which prompts a step needs, a Task gives their text, and `score_completions` the rewards of
their completions. Tasks know only text: the caller makes token ids.
"""

from sapo.errors import TaskError
from sapo.tasks.base import FiniteTask, JudgedTask, Task, WorkedTask, notices_of
from sapo.tasks.broken import FailedCalls, TriedReward, failed_calls, try_reward
from sapo.tasks.generated.arithmetic import ALPHABET, ArithmeticTask
from sapo.tasks.generated.reasoning import ReasoningGymTask
from sapo.tasks.mixture import prompts_for_step
from sapo.tasks.registry import TASKS, make_task
from sapo.tasks.rows.datasets import DatasetSettings, DatasetTask
from sapo.tasks.rows.presets import PRESETS, Preset
from sapo.tasks.rows.task import FileSettings, FileTask, RowTask
from sapo.tasks.scoring import score_completions, score_groups, status_counts
from sapo.tasks.verifiers import VERIFIERS, load_verifier

__all__ = [
    "ALPHABET",
    "PRESETS",
    "TASKS",
    "VERIFIERS",
    "ArithmeticTask",
    "DatasetSettings",
    "DatasetTask",
    "FailedCalls",
    "FileSettings",
    "FileTask",
    "FiniteTask",
    "JudgedTask",
    "Preset",
    "ReasoningGymTask",
    "RowTask",
    "Task",
    "TaskError",
    "TriedReward",
    "WorkedTask",
    "failed_calls",
    "load_verifier",
    "make_task",
    "notices_of",
    "prompts_for_step",
    "score_completions",
    "score_groups",
    "status_counts",
    "try_reward",
]
