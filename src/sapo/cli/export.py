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
    max_shard_size: Annotated[
        str, typer.Option(help="Largest file of weights; a larger model is written as several with an index.")
    ] = "5GB",
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also upload it to this repository of the Hugging Face hub."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public/--private", help="Who sees a repository that --push makes.")
    ] = False,
) -> None:
    """Write a run's model for transformers, vLLM and lm-eval to load."""
    from sapo.workflows.export import export_model
    from sapo.workflows.pushing import check_push
    from sapo.workflows.pushing import push as upload

    if push is not None:
        check_push(push)
    exported = export_model(source, directory, dtype, max_shard_size)
    print(f"wrote {exported.checkpoint.label} of {exported.run} to {directory}: model, tokenizer and model card")
    if push is not None:
        label = f"{exported.checkpoint.label} of {exported.run.name}"
        print(f"pushed to {upload(directory, push, private=not public, message=f'sapo: {label}')}")
    print(f"next: sapo generate {directory} 'a prompt'")
