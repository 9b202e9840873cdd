"""`sapo export`: a run's model as an ordinary Hugging Face directory with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sapo.cli.completion import complete_run


def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run directory, or one of its checkpoints.", autocompletion=complete_run),
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; must not exist, or be empty.")],
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the run's.")] = None,
) -> None:
    """Write a run's model for transformers, vLLM and lm-eval to load."""
    from sapo.workflows.export import export_model

    exported = export_model(source, directory, dtype)
    print(f"wrote {exported.checkpoint.label} of {exported.run} to {directory}: model, tokenizer and model card")
    print(f"next: sapo generate {directory} 'a prompt'")
