"""Kernels of kernels.c, compiled on first use for the machine at hand; None where that cannot be.

A decode step of a small model consists of many small operations, and calling torch for each takes longer than the
arithmetic. The C compiler of the machine (`cc`, or $CC) turns one file into a shared library in less than a second; it
is kept in the cache directory under a name that holds the source, the compiler and the processor. Without a compiler,
on another device, or with SAPO_NATIVE=0 everything runs through torch: the numbers differ in rounding only.
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

SOURCE = Path(__file__).with_name("kernels.c")

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared", "-std=gnu11")

LANES = 16
"""What the cache pads its keys to; the same in kernels.c."""

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Kernels:
    """The functions of a compiled kernels.c. Rows are contiguous in their last dimension unless said."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        for name in ("norm", "rotate", "gate"):
            for dtype, suffix in _NAMES.items():
                self._functions[name, dtype] = getattr(library, f"{name}_{suffix}")
        self._attend = library.attend
        for function in (*self._functions.values(), self._attend):
            function.argtypes, function.restype = [ctypes.c_void_p], None

    def norm(self, input_NH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        """RMSNorm, rounded before the weight multiplies."""
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
        """silu(gate) * up of both side by side."""
        rows, width = gate_up_NI.shape
        output_NI = gate_up_NI.new_empty(rows, width // 2)
        self._call("gate", gate_up_NI, gate_up_NI.data_ptr(), output_NI.data_ptr(), rows, width // 2)
        return output_NI

    def attend(self, numbers: np.ndarray) -> None:
        """One decode step's attention of one layer; rollout/layouts.py fills in the numbers."""
        self._attend(numbers.ctypes.data)

    def _call(self, name: str, like: Tensor, *numbers: int) -> None:
        self._functions[name, like.dtype]((ctypes.c_int64 * len(numbers))(*numbers))


def kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The kernels, where tensors of that kind can use them."""
    if device.type != "cpu" or dtype not in _NAMES or os.environ.get("SAPO_NATIVE", "1") == "0":
        return None
    return _load()


@functools.lru_cache(maxsize=64)
def _float(value: float) -> int:
    """Address of a float32 that stays where it is."""
    _kept.append(np.array([value], dtype=np.float32))
    return int(_kept[-1].ctypes.data)


_kept: list[np.ndarray] = []


@functools.cache
def _load() -> Kernels | None:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError, AttributeError):
        return Kernels(ctypes.CDLL(str(_library(compiler))))
    return None  # a compiler that does not know a flag, a directory that cannot be written, ...


def _library(compiler: list[str]) -> Path:
    """The compiled library, made if it is not there yet."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    parts = (SOURCE.read_bytes(), version, " ".join(FLAGS).encode(), _processor().encode())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = cache_directory() / "kernels" / f"{name}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made aside and renamed, for several processes may start at once.
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory) / path.name
            command = [*compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
            made.replace(path)
    return path


def _processor() -> str:
    """What -march=native depends on: a cache directory may be shared by different machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return " ".join(line for line in dict.fromkeys(lines) if line.startswith(("model name", "flags", "Features")))
    return platform.platform() + platform.processor()
