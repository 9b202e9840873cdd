"""Kernels of kernels.c and packed.c, compiled on first use for the machine at hand; None where that cannot be.

A decode step of a small model consists of many small operations, and calling torch for each takes longer than the
arithmetic. The C compiler of the machine (`cc`, or $CC) turns the files into a shared library in a few seconds. It is
kept in the cache directory under a name that holds the source, the compiler and the processor; where that directory
cannot be written or is open to other users, whose code would then be run, each process makes its own. Without a
compiler, on another device, or with SAPO_NATIVE=0 everything runs through torch: the numbers differ in rounding only,
and a run keeps on record which of the two it had.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sapo.model.sources import cache_directory
from sapo.utils.machine import cpuinfo_lines

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.c", "packed.c"))

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared", "-std=gnu11")

LANES = 16
"""Multiple that the cache pads its keys to; the same in kernels.c."""

_PACKED = ("pack", "multiply", "step", "room", "draw")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Kernels:
    """The functions of the compiled SOURCES. Tensors are contiguous unless said.

    Args:
        library: the compiled SOURCES.
        name: what tells it from those of another source, compiler or processor.
    """

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        self._functions = {}
        for name in ("norm", "rotate", "gate"):
            for dtype, suffix in _NAMES.items():
                self._functions[name, dtype] = getattr(library, f"{name}_{suffix}")
        self._attend = library.attend
        self._packed = {name: getattr(library, f"packed_{name}") for name in _PACKED}
        for function in (*self._functions.values(), self._attend, *self._packed.values()):
            function.argtypes, function.restype = [ctypes.c_void_p], None
        self._attend.restype = ctypes.c_int64
        self._packed["room"].restype = library.packed_precisions.restype = ctypes.c_int64
        known = library.packed_precisions()
        self.packed_precisions = {dtype for bit, dtype in ((1, torch.float32), (2, torch.bfloat16)) if known & bit}
        """Number formats that packed.c multiplies on this processor."""

    def norm(self, input_NH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        """Compute RMSNorm, rounded before the weight multiplies."""
        output_NH = torch.empty_like(input_NH)
        addresses = (input_NH.data_ptr(), weight_H.data_ptr(), output_NH.data_ptr())
        self._call("norm", input_NH, *addresses, *input_NH.shape, _float(epsilon))
        return output_NH

    def rotate(
        self, both_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor, weight_HD: Tensor | None = None, epsilon: float = 0.0
    ) -> None:
        """Turn queries and keys in place, first normed per head where a weight is given; rows may have a stride."""
        rows, heads, size = both_NHD.shape
        weight = 0 if weight_HD is None else weight_HD.data_ptr()
        place = (both_NHD.data_ptr(), rows, both_NHD.stride(0), heads, size)
        self._call("rotate", both_NHD, *place, cos_ND.data_ptr(), sin_ND.data_ptr(), weight, _float(epsilon))

    def gate(self, gate_up_NI: Tensor) -> Tensor:
        """Compute silu(gate) * up of both side by side."""
        rows, width = gate_up_NI.shape
        output_NI = gate_up_NI.new_empty(rows, width // 2)
        self._call("gate", gate_up_NI, gate_up_NI.data_ptr(), output_NI.data_ptr(), rows, width // 2)
        return output_NI

    def attend(self, numbers: np.ndarray) -> None:
        """Compute one decode step's attention of one layer; rollout/local/places.py fills in the numbers.

        Raises:
            MemoryError: there was none for the scores.
        """
        if self._attend(numbers.ctypes.data):
            raise MemoryError("no memory for the scores of a decode step; sample fewer rows or shorter completions")

    def packed(self, name: str, *numbers: int) -> int | None:
        """Call a function of packed.c; cpu/packed.py says with what."""
        result: int | None = self._packed[name]((ctypes.c_int64 * len(numbers))(*numbers))
        return result

    def _call(self, name: str, like: Tensor, *numbers: int) -> None:
        self._functions[name, like.dtype]((ctypes.c_int64 * len(numbers))(*numbers))


def kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """Return the kernels, where tensors of that kind can use them."""
    if device.type != "cpu" or dtype not in _NAMES or os.environ.get("SAPO_NATIVE", "1") == "0":
        return None
    return _load()


def kernels_in_use() -> str:
    """Return which kernels this process has on a CPU: "torch", or the name of the compiled ones.

    Others round differently, so that a run which goes on with them does not go on to the bit.
    """
    native = kernels(torch.device("cpu"), torch.float32)
    return "torch" if native is None else f"compiled {native.name}"


@functools.lru_cache(maxsize=64)
def _float(value: float) -> int:
    """Return the address of a float32 that stays where it is."""
    _floats.append(np.array([value], dtype=np.float32))
    return int(_floats[-1].ctypes.data)


_floats: list[np.ndarray] = []


def compiles_here() -> bool:
    """Return whether a compiler has made kernels that can be loaded, or does so now; nothing new is kept."""
    try:
        compiler = _compiler()
        if compiler is None:
            return False
        made = cache_directory() / "kernels" / f"{_name(compiler)}.so"
        if made.exists():
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(made)) is not None
        return _own(compiler, "trial") is not None
    except (OSError, ValueError, subprocess.SubprocessError):
        return False


def _compiler() -> list[str] | None:
    """Return the command of $CC or cc, if there is such a program."""
    command = shlex.split(os.environ.get("CC", "cc"))
    return command if command and shutil.which(command[0]) is not None else None


@functools.cache
def _load() -> Kernels | None:
    try:
        compiler = _compiler()
        if compiler is None:
            return None
        name = _name(compiler)
        try:
            return Kernels(_kept(compiler, name), name)
        except (OSError, RuntimeError):  # a cache that cannot be written, that runs no programs, no home, ...
            return Kernels(_own(compiler, name), name)
    except (OSError, ValueError, subprocess.SubprocessError):  # a compiler that does not know a flag, ...
        return None


def _name(compiler: list[str]) -> str:
    """Name the library by all that it depends on."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    sources = b"".join(source.read_bytes() for source in SOURCES)
    parts = (sources, version, " ".join((*compiler, *FLAGS)).encode(), _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _kept(compiler: list[str], name: str) -> ctypes.CDLL:
    """Load the library in the cache directory, made if it is not there yet or cannot be loaded.

    Raises:
        OSError: the directory cannot be used, or others may write to it.
    """
    directory = cache_directory() / "kernels"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = directory.stat()
    if about.st_uid not in (0, os.geteuid()) or about.st_mode & 0o022:
        raise PermissionError(f"{directory} may be written by others")
    path = directory / f"{name}.so"
    if path.exists():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    # Made aside and renamed, for several processes may start at once.
    with tempfile.TemporaryDirectory(dir=directory) as aside:
        _compile(compiler, Path(aside) / path.name).replace(path)
    return ctypes.CDLL(str(path))


def _own(compiler: list[str], name: str) -> ctypes.CDLL:
    """Load a library of this process alone; once it is loaded, its file is not needed."""
    with tempfile.TemporaryDirectory(prefix="sapo-") as directory:
        return ctypes.CDLL(str(_compile(compiler, Path(directory) / f"{name}.so")))


def _compile(compiler: list[str], target: Path) -> Path:
    command = [*compiler, *FLAGS, *map(str, SOURCES), "-o", str(target), "-lm"]
    subprocess.run(command, capture_output=True, check=True, timeout=600)
    return target


def _processor() -> str:
    """Return what -march=native depends on: a cache directory may be shared by different machines."""
    lines = dict.fromkeys(cpuinfo_lines())
    named = " ".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
    return named or platform.platform() + platform.processor()
