"""`python -m trials.sanitizers`: the tests of kernels.c and packed.c with both built to look at each access to memory.

AddressSanitizer stops at a read or write beyond an array, UndefinedBehaviorSanitizer at a shift, an index or an address
that C does not define. The compiler has to bring both (gcc does). As a plugin of pytest, which the program starts, this
file sets the flags of the build, and has weights packed into memory that is looked at too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TESTS = ("test_native.py", "test_packed.py", "test_sampling.py", "test_decoder.py", "test_cache.py")
ROLLOUT = Path(__file__).parents[1] / "rollout"
OPTIONS = {
    # The interpreter and torch free little at their end, which is no fault; a library is looked at from its start only
    # where the sanitizer's own is loaded first.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:verify_asan_link_order=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_NUM_THREADS": "2",
}
RUNNING = "SAPO_TRIALS_SANITIZERS"

if os.environ.get(RUNNING):
    import torch

    from sapo.rollout.local.cpu import native, packed

    native.FLAGS = tuple(f for f in native.FLAGS if not f.startswith("-O")) + FLAGS
    # malloc puts poisoned bytes around a block, which the system's pages have not.
    packed.fresh_memory = lambda num_bytes: torch.zeros(num_bytes, dtype=torch.uint8)

    def pytest_collection_finish() -> None:
        """Refuse to begin without kernels: tests of what torch computes would look at nothing."""
        built = native.kernels(torch.device("cpu"), torch.float32)
        assert built is not None, "the kernels were not built: $CC has no sanitizers, or the processor is not known"


def libraries(compiler: str) -> str:
    """Return the libraries of the sanitizers, as LD_PRELOAD takes them."""
    names = ("libasan.so", "libubsan.so")
    command = [[compiler, f"-print-file-name={name}"] for name in names]
    found = [subprocess.run(c, capture_output=True, check=True, text=True).stdout.strip() for c in command]
    missing = [name for name, path in zip(names, found, strict=True) if not Path(path).is_absolute()]
    assert not missing, f"{compiler} has no {missing[0]}; take gcc, or install its sanitizers"
    return ":".join(found)


def main(arguments: list[str]) -> int:
    """Run the tests that were named, or all of TESTS, and return pytest's exit code."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, **OPTIONS, RUNNING: "1", "SAPO_CACHE": cache}
        environment["LD_PRELOAD"] = libraries(os.environ.get("CC", "cc"))
        tests = arguments or [str(ROLLOUT / name) for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-p", "trials.sanitizers", "-p", "no:cacheprovider", "-q", *tests]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
