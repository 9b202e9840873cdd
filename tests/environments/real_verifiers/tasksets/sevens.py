"""A verifiers taskset of two user turns that want other digits."""

import verifiers.v1 as vf

__all__ = ["SevensEnv", "SevensTaskset"]


class Data(vf.TaskData):
    n: int


class SevensTask(vf.Task[Data]):
    @vf.reward(weight=1.0)
    async def sevens(self, trace: vf.Trace) -> float:
        said = [m.content or "" for m in trace.assistant_messages]
        return sum(min(3, text.count("7" if turn == 0 else "3")) for turn, text in enumerate(said)) / 6


class Config(vf.TasksetConfig):
    tasks: int = 6


class SevensTaskset(vf.Taskset[SevensTask, Config]):
    def load(self):
        for n in range(self.config.tasks):
            yield SevensTask(Data(n=n, system_prompt=f"{n}"))


class SevensEnv(vf.SingleAgentEnv):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as talk:
            if not (await talk.turn("=")).terminated:
                await talk.turn(";")
