"""The machine that a plan assumes. Every number is an option of `sapo plan`, and is printed with the plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from sapo.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Rates and sizes of the GPUs of a plan; the defaults are those of nodes of eight H200.

    >>> Machine(tflops=1000.0).rate(share=0.35) == 0.35e15
    True
    """

    gpu_memory: float = 140.0
    """Memory of a GPU in GiB."""
    headroom: float = 0.1
    """Share of a GPU's memory that a plan leaves free, for fragments and what is not counted."""
    runtime: float = 2.0
    """GiB of a GPU that CUDA, NCCL and the libraries' workspaces take."""
    tflops: float = 790.0
    """TFLOP/s of a GPU in large bfloat16 products."""
    mfu: float = 0.35
    """Share of it that passes over a dense model reach."""
    moe_mfu: float = 0.2
    """Share of it that passes over a mixture of experts reach."""
    memory_bandwidth: float = 4800.0
    """GB/s of a GPU's memory."""
    interconnect: float = 450.0
    """GB/s that a GPU sends to others of its node."""
    network: float = 50.0
    """GB/s that a GPU sends to another node."""
    node: int = 8
    """GPUs of a node."""
    disk: float = 2.0
    """GB/s that a process writes to disk."""
    hashing: float = 1.5
    """GB/s at which the driver computes SHA-256 of a checkpoint's files."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = {"headroom": (0.0, 0.9), "mfu": (0.0, 1.0), "moe_mfu": (0.0, 1.0)}.get(field.name, (0.0, 1e9))
            allows_zero = field.name in ("headroom", "runtime")
            if not (low <= value <= high and (value > 0 or allows_zero)):
                rule = f"lie in {low:g}..{high:g}" if high < 1e9 else "be a finite number above 0"
                raise ConfigError(
                    f"--{field.name.replace('_', '-')} must {rule}; got {value:g}; the default is {field.default:g}"
                )

    @property
    def usable_bytes(self) -> float:
        """Return the bytes of a GPU that a plan may fill."""
        return self.gpu_memory * GIB * (1 - self.headroom)

    def rate(self, share: float) -> float:
        """Return the FLOP/s of a GPU at a share of its products' rate."""
        return self.tflops * 1e12 * share

    def link(self, ranks: int) -> float:
        """Return the bytes a second that a GPU exchanges within a group of so many."""
        return (self.interconnect if ranks <= self.node else self.network) * 1e9

    def to_json(self) -> dict[str, float]:
        """Return a JSON value."""
        return asdict(self)
