"""Peak memory of responses that share a large picture: the picture is paid for once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc"),
]

CODE = """
import sys
from pathlib import Path
import torch
from sapo.data import Completion, Group
from sapo.training.batch import pack
from sapo.training.forward import response_states
from support.pictures import picture
from support.vision_cases import make_vision_policy, shown

responses, pictured = int(sys.argv[1]), sys.argv[2] == "picture"
torch.set_num_threads(1)
policy = make_vision_policy("qwen3_vl", gain=1.0, max_length=4096)
policy.vision.train("tower")
processor = policy.vision.family.processor
processor.size = type(processor.size)(shortest_edge=256, longest_edge=4096 * 256)
# Cells of 16 x 16 pixels: 50 x 40 = 2,000 tokens.
prompt = shown(policy, "=", picture(0, 800, 640)) if pictured else shown(policy, "=")
assert sum(map(len, prompt.picture_tokens.places)) == 2000 if pictured else prompt.picture_tokens is None

def update(prompt, responses, length):
    completion = Completion(tuple(range(1, 9)) * (length // 8), (-1.0,) * length, "stop", "")
    group = Group(prompt, (completion,) * responses, advantages=(1.0,) * responses)
    options = {"normalizer": "sequence_mean", "tokens_per_microbatch": 100_000, "max_new_tokens": length}
    (batch,) = pack([group], include_all=True, **options).microbatches
    policy.run(lambda: response_states(policy, batch).square().sum()).backward()
    policy.model.zero_grad(set_to_none=True)

def status(name):
    [line] = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(name)]
    return int(line.split()[1]) * 1024

update(shown(policy, "=", picture(1)), 1, 8)  # what is loaded and made once
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
update(prompt, responses, 64)
print(status("VmHWM") - before)
"""


def peak(responses: int, what: str) -> int:
    """Bytes of an update beyond those of the process before it."""
    tests = Path(__file__).parents[1]
    search = os.pathsep.join([str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(responses), what],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_32_responses_to_a_picture_of_2000_tokens_need_what_one_does_and_the_responses():
    one, group = peak(1, "picture"), peak(32, "picture")
    responses = peak(32, "text") - peak(1, "text")
    assert group <= 1.1 * (one + responses), (one, group, responses)
    assert one > 20 * 2**20  # the picture is what is measured
