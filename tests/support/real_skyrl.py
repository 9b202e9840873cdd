"""An environment of a user's own on skyrl-gym's BaseTextEnv, with a tool of a ToolGroup."""

from __future__ import annotations

import re
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.tools.core import ToolGroup, tool

from support.real_trl import FAULTS


class Arithmetic(ToolGroup):
    """The tools of `Adding`."""

    def __init__(self) -> None:
        super().__init__(name="arithmetic")

    @tool
    def add(self, k: str) -> str:
        return str(3 + int(k))


class Adding(BaseTextEnv):
    """Carries out calls of `add`, at most three, and rewards seven. The column `fault` says how a reward goes wrong."""

    def __init__(self, env_config: Any = None, extras: Any = None) -> None:
        super().__init__()
        self.extras, self.max_turns = extras, env_config.get("max_turns", 3)
        self.init_tool_groups([Arithmetic()])

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        called = re.match(r"add\(k=(\d)\)", action)
        if called and self.turns < self.max_turns:
            said = self._execute_tool("arithmetic", "add", (called[1],))
            observations = [{"role": "user", "content": said}]
            return BaseTextEnvStepOutput(observations=observations, reward=0.25, done=False, metadata={})
        right = float(self.extras["reward_spec"]["ground_truth"] in action)
        reward = FAULTS.get(self.extras.get("fault"), lambda: right)()
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=True, metadata={})
