"""`sapo diagnose`: what a sampler of another precision would do to training from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sapo.cli.completion import complete_model, complete_objective, complete_rounded, complete_task
from sapo.cli.terminal import console, say

if TYPE_CHECKING:
    from rich.table import Table

    from sapo.objectives import Objective
    from sapo.workflows.sampler_mismatch import MismatchDiagnosis

DEFAULT_OBJECTIVES = "sapo,grpo,gspo,cispo"


def diagnose(
    model: Annotated[
        Path,
        typer.Argument(
            help="A run directory, a checkpoint, a model directory, a .gguf file or a hub id.",
            autocompletion=complete_model,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings of the task, as in digits=4, and of its prompts, as in prompt.style=chat.",
        ),
    ] = None,
    sampler_dtype: Annotated[
        str,
        typer.Option(
            help="Precision of the sampler: bfloat16, float8_e4m3fn or float8_e5m2.", autocompletion=complete_rounded
        ),
    ] = "float8_e4m3fn",
    sampler_scaling: Annotated[str, typer.Option(help="Scales of 8-bit weights: none, tensor or channel.")] = "tensor",
    sampler_vectors: Annotated[
        bool, typer.Option("--sampler-vectors", help="Round norms and biases as well, which no engine does.")
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A task's name, or a .jsonl or .parquet file; repeatable.",
            show_default="the run's own tasks",
            autocompletion=complete_task,
        ),
    ] = None,
    objectives: Annotated[
        str,
        typer.Option(
            help="Names of objectives, between commas, each at its defaults.", autocompletion=complete_objective
        ),
    ] = DEFAULT_OBJECTIVES,
    problems: Annotated[int, typer.Option(min=2, max=10**6, help="Held-out problems of each task.")] = 64,
    samples: Annotated[int, typer.Option(min=2, max=10**6, help="Completions of each problem.")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, max=10**7, help="Longest completion.", show_default="64, or the run's")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Temperature of the sampler.", show_default="1, or the run's")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the draws and of the choice of problems.", show_default="12345, or the run's"),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="The engine: local, or module:Class.", show_default="local, or the run's"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16.", show_default="float32, or the run's")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the mismatch of a sampler of another precision, and what it would do to each objective.

    The completions are drawn from the model's weights, rounded to the sampler's precision, and scored by the weights as
    they are. Nothing is trained or written.
    """
    from sapo.cli.tables import Progress
    from sapo.errors import ConfigError
    from sapo.model.rounding import Rounding
    from sapo.model.sources import check_source
    from sapo.run.models import load_model
    from sapo.workflows.evaluation_plan import plan_evaluations
    from sapo.workflows.sampler_mismatch import diagnose as measure

    try:
        rounding = Rounding(sampler_dtype, sampler_scaling, sampler_vectors)
    except ValueError as error:
        raise ConfigError(f"--sampler-{error}") from error
    chosen = _objectives(model, objectives)
    check_source(model)  # before the rows of a task are downloaded
    asked = plan_evaluations(
        model,
        task or [],
        overrides or [],
        seed=seed,
        problems=problems,
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        engine=engine,
    )
    policy, directory = load_model(model, dtype, device)
    if as_json:
        print(json.dumps(measure(policy, asked, rounding, chosen, name=str(directory)).to_json(), indent=1))
        return
    with Progress(console, "batches of problems") as progress:
        found = measure(policy, asked, rounding, chosen, name=str(directory), on_progress=progress)
    console.print(table(found))
    for line in lines(found):
        say(line)


def _objectives(model: Path, names: str) -> dict[str, Objective]:
    """Make the objectives named, at their defaults, and before them the run's own where its settings differ."""
    from sapo.errors import ConfigError
    from sapo.objectives import make_objective
    from sapo.run.directory import RunDirectory
    from sapo.run.models import run_of

    try:
        chosen = {name: make_objective(name) for name in (part.strip() for part in names.split(",")) if name}
    except ValueError as error:
        raise ConfigError(f"--objectives: {error}") from error
    run = run_of(model)
    if run is not None:
        own = RunDirectory.read_config(run).objective
        try:
            objective = own.make()
        except ValueError as error:  # a module of the user's own that is not here
            raise ConfigError(f"{run}: {error}") from error
        if chosen.get(own.name) != objective:
            chosen = {f"{own.name} of the run": objective, **chosen}
    if not chosen:
        raise ConfigError(f"--objectives names objectives between commas, as in sapo,grpo; got {names!r}")
    return chosen


def table(found: MismatchDiagnosis) -> Table:
    """Make the table of forces, an objective a row."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(f"a sampler in {found.sampler_dtype} whose log-probabilities are taken for log pi_old"))
    for column in ("objective", "EUR", "silenced", "bias force", "beyond noise", "towards sampler"):
        shown.add_column(column, justify="left" if column == "objective" else "right")
    for force in found.forces:
        figures = (force.force, force.force_unbiased, force.cosine)
        shown.add_row(
            Text(force.objective),
            f"{force.eur:.4f}",
            f"{force.silenced:.4f}",
            *("-" if figure is None else f"{figure:.3f}" for figure in figures),
        )
    return shown


def lines(found: MismatchDiagnosis) -> list[str]:
    """Return the lines below the table: how to read it, what was measured, what to do."""
    from sapo.workflows.sampler_mismatch import SYMMETRIC

    scaling = {"none": "without scales", "tensor": "a scale a matrix", "channel": "a scale a row"}
    how = "" if found.sampler_dtype == "bfloat16" else f", {scaling[found.sampler_scaling]}"
    no_gradient = found.gradient_norm is None
    control = any(force.objective == SYMMETRIC for force in found.forces)
    what = "weights, norms and biases too," if found.sampler_vectors else "weights"
    return [
        "bias force: the pull of random advantages on the policy, over the norm of its policy gradient; 1 is as",
        "hard as rewards pull. beyond noise: the batch's noise subtracted; - where the batch does not resolve it.",
        "towards sampler: cosine of that pull with the direction to the sampler's policy",
        *[f"{SYMMETRIC}: the control, a clip that does not depend on the sign of A"] * control,
        f"{found.completions} completions of {', '.join(found.tasks)}, {found.tokens} tokens, mean reward "
        f"{found.reward:.3f}; {what} in {found.sampler_dtype}{how}",
        f"mean |r - 1| {found.dose:.4f} (99% below {found.dose_p99:.3f}): {found.verdict}",
        *(["every group has zero variance, so there is no policy gradient to compare a force with"] * no_gradient),
        f"recommendation: {found.recommendation}",
    ]
