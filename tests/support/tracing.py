"""Steps taken down in place of a CUDA graph: see tests/rollout/test_device_steps.py."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sapo.rollout.local import engine as local
from support.engine_cases import assert_same, flat

CPU = torch.device("cpu")


def trace(step):
    """A `Capture`: like a CUDA graph it takes the step down without doing it, and repeats nothing but what it saw."""

    def run():
        step()
        return ()

    with FakeTensorMode(allow_non_fake_inputs=True):  # here a number that somebody reads is an error
        step()
    program = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)()
    for node in program.graph.nodes:  # tensors made of the host's numbers, and copies from device to device
        if "lift_fresh" in str(node.target) or node.kwargs.get("device", CPU) != CPU:
            raise AssertionError(f"{node.target} goes through the host")
    return program


class Tracing:
    """Captures by tracing, and counts."""

    def __init__(self, monkeypatch):
        self.captured = self.repeated = 0
        monkeypatch.setenv("SAPO_NATIVE", "0")  # compiled kernels are of the CPU and cannot be traced
        monkeypatch.setattr(local, "capture_on", lambda device, choice: self)

    def __call__(self, step):
        graph = trace(step)
        self.captured += 1

        def repeat():
            self.repeated += 1
            graph()

        return repeat


def assert_all_same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(flat(ours), flat(theirs), strict=True):
        assert_same(mine, other)
