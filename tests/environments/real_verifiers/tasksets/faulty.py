"""A verifiers taskset in which every task but the first goes wrong in a way of its own."""

import asyncio
import os
import time

import verifiers.v1 as vf

__all__ = ["FaultyEnv", "FaultyTaskset"]

MODES = ("good", "raises", "reward_raises", "nan", "hangs", "blocks", "crashes", "prints")


class Data(vf.TaskData):
    mode: str


class FaultyTask(vf.Task[Data]):
    @vf.reward(weight=1.0)
    async def reward(self, trace: vf.Trace) -> float:
        if self.data.mode == "reward_raises":
            raise RuntimeError("judge down")
        return float("nan") if self.data.mode == "nan" else 1.0


class Config(vf.TasksetConfig):
    pass


class FaultyTaskset(vf.Taskset[FaultyTask, Config]):
    def load(self):
        for mode in (*MODES, "held_out"):
            yield FaultyTask(Data(mode=mode, system_prompt="1"))


class FaultyEnv(vf.SingleAgentEnv):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as talk:
            await talk.turn("=")
            mode = task.data.mode
            if mode == "raises":
                raise RuntimeError("board gone")
            if mode == "hangs":
                await asyncio.sleep(999)
            if mode == "blocks":
                time.sleep(999)
            if mode == "crashes":
                os.abort()
            if mode == "prints":
                print('{"played": 1, "ok": true, "reward": 99}', flush=True)
                os.write(1, b"not on the wire\n")
            await talk.turn(";")
