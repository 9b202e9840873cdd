"""The recipe: every setting of a run, documented once, checked before anything is loaded.

Each section is in a file of its own; `run.py` has the whole and the checks across sections, `recipes.py` finds, reads
and overrides recipes. Settings of an objective or a task are checked by the objective or task itself, which refuses
those it does not use.
"""

from sapo.config.cluster import ClusterConfig
from sapo.config.diagnostics import CounterfactualConfig, DiagnosticsConfig, WarningsConfig
from sapo.config.experiments import ExperimentsConfig, SamplerDtype, SamplerSwitchConfig
from sapo.config.logging import LogConfig, ProfileConfig, TrackioConfig, WandbConfig
from sapo.config.model import ColdStartConfig, LoraConfig, ModelConfig
from sapo.config.objective import KLConfig, ObjectiveConfig, TISConfig
from sapo.config.rollout import RolloutConfig, VllmConfig
from sapo.config.run import RunConfig
from sapo.config.section import Section
from sapo.config.tasks import CurriculumConfig, PromptConfig, ShotConfig, TaskConfig
from sapo.config.training import CheckpointConfig, EvalConfig, TrainConfig
from sapo.errors import ConfigError

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "ColdStartConfig",
    "ConfigError",
    "CounterfactualConfig",
    "CurriculumConfig",
    "DiagnosticsConfig",
    "EvalConfig",
    "ExperimentsConfig",
    "KLConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ProfileConfig",
    "PromptConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplerDtype",
    "SamplerSwitchConfig",
    "Section",
    "ShotConfig",
    "TISConfig",
    "TaskConfig",
    "TrackioConfig",
    "TrainConfig",
    "VllmConfig",
    "WandbConfig",
    "WarningsConfig",
]
