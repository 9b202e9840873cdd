"""Run every measurement and write bench/results/*.json: `python -m bench`."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import head, rollout

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print a table, write the figures with the machine they were taken on."""
    console = Console()
    machine = {
        "date": date.today().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gemm": "MKL" if torch.backends.mkl.is_available() else "other",
    }
    rows = [
        *rollout.measure("qwen3"),
        *rollout.measure("qwen3_moe"),
        *head.measure(),
    ]
    table = Table(title=", ".join(f"{k} {v}" for k, v in machine.items()))
    for column in ("measure", "peer", "peer takes", "range", "memory, ours / peer"):
        table.add_column(column)
    for row in rows:
        memory = f"{row['ours_mib']:.0f} / {row['peer_mib']:.0f} MiB" if "ours_mib" in row else ""
        spread = f"{row['ratio_min']:.2f} .. {row['ratio_max']:.2f}"
        table.add_row(row["measure"], row["peer"], f"{row['ratio']:.2f} x", spread, memory)
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "tiny.json"
    file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    console.print(f"wrote {file}")


if __name__ == "__main__":
    main()
