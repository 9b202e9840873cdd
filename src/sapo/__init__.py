"""sapo: reinforcement-learning post-training of language models around Soft Adaptive Policy Optimization.

    import sapo
    run = sapo.train("quickstart", steps=20, run_dir="runs/short")
    print(run.summary["final"]["pass@1"])

The objectives alone, which need no library but torch, are in `sapo.objectives`. Names here are loaded when first used,
so that importing a part of the package costs only that part.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

# On some processors MKL rounds a product differently with the alignment of its buffers, and a resumed run would not be
# the run it continues. Read when MKL is first used, hence before torch. research/log.md has what was measured.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# Threads of GNU OpenMP wait for each other by spinning, 300,000 times by default, before they sleep. Beside another
# busy process they spin on the core that the one they wait for needs. Read when torch is loaded; research/log.md.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Below this level the library under torch.profiler writes its stages to standard error. Read when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
# transformers imports torchao where it is installed. On import torchao warns of GPU libraries it cannot load and of its
# enums, on the standard error of every command, and a user can do nothing about it.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

if TYPE_CHECKING:
    from sapo.config import RunConfig
    from sapo.config.recipes import load_recipe
    from sapo.evaluation import Evaluation
    from sapo.front.compare import compare
    from sapo.front.evaluate import evaluate
    from sapo.front.generate import generate
    from sapo.front.run import Run
    from sapo.front.train import resume, train
    from sapo.workflows.comparing import load_comparison

__version__ = "0.1.0"

__all__ = [
    "Evaluation",
    "Run",
    "RunConfig",
    "compare",
    "evaluate",
    "generate",
    "load_comparison",
    "load_recipe",
    "resume",
    "train",
]

_HOMES = {
    "Evaluation": "sapo.evaluation",
    "Run": "sapo.front.run",
    "RunConfig": "sapo.config",
    "compare": "sapo.front.compare",
    "evaluate": "sapo.front.evaluate",
    "generate": "sapo.front.generate",
    "load_comparison": "sapo.workflows.comparing",
    "load_recipe": "sapo.config.recipes",
    "resume": "sapo.front.train",
    "train": "sapo.front.train",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sapo' has no attribute {name!r}")
