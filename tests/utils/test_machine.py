"""Freed memory goes back to the system where glibc would keep it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sapo.utils import machine as heap

# Blocks small enough for the heap, one in sixteen kept: what is freed between them is no end that glibc would cut.
PROGRAM = """
import torch
from sapo.utils.machine import give_back_freed_memory

def resident():
    [line] = [s for s in open("/proc/self/status") if s.startswith("VmRSS")]
    return int(line.split()[1]) * 1024

blocks = [torch.ones(2**16) for _ in range(2048)]
before = resident()
kept = blocks[::16]
del blocks
freed = resident()
give_back_freed_memory()
assert all(block.sum() == 2**16 for block in kept)
print(before - freed, before - resident())
"""


@pytest.mark.skipif(heap._glibc() is None, reason="the C library is not glibc 2.33 or later")
def test_freed_blocks_between_others_go_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    by_itself, after = map(int, done.stdout.split())
    # 1920 blocks of 256 KiB were freed, 480 MiB; each keeps at most a page at its ends.
    assert after > 0.95 * 480 * 2**20
    assert by_itself < 0.5 * after, "otherwise there would be no need for it"
