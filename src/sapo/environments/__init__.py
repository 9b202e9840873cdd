"""Environments: tasks in which the model takes several turns, and something answers it between them.

An environment is one coroutine, `play(prompt, ask)`, that plays an episode and returns its Score. It knows texts and
messages; token ids, budgets and failures are the affair of whoever calls it.
"""

from sapo.environments.base import (
    Answer,
    Ask,
    Drawing,
    Environment,
    Episode,
    JudgedEnvironment,
    Messages,
    OutOfBudget,
    Said,
    TokenAsk,
    TokenEnvironment,
    ToolCall,
    ToolError,
    Turn,
    WorkedEnvironment,
    is_environment,
)

__all__ = [
    "Answer",
    "Ask",
    "Drawing",
    "Environment",
    "Episode",
    "JudgedEnvironment",
    "Messages",
    "OutOfBudget",
    "Said",
    "TokenAsk",
    "TokenEnvironment",
    "ToolCall",
    "ToolError",
    "Turn",
    "WorkedEnvironment",
    "is_environment",
]
