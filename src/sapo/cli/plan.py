"""`sapo plan`: what a recipe needs of GPUs and time, computed from its model's config."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from sapo.cli.completion import complete_override, complete_recipe
from sapo.cli.terminal import console, say

GIB = 2**30


def plan(
    recipe: Annotated[
        str,
        typer.Argument(help="A YAML file, or the name of a shipped recipe.", autocompletion=complete_recipe),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings to change, as in train.tokens_per_microbatch=16384. device=cpu plans ranks of this machine.",
            autocompletion=complete_override,
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, max=65536, help="GPUs that train together.", show_default="train.ranks")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=10**7, help="Tokens of a prompt.")] = 512,
    completion_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**7,
            help="Mean tokens of a completion, for the seconds.",
            show_default="rollout.max_new_tokens",
        ),
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="Memory of a GPU in GiB.")] = 140.0,
    headroom: Annotated[float, typer.Option(help="Share of it that is left free.")] = 0.1,
    runtime: Annotated[float, typer.Option(help="GiB of it that CUDA, NCCL and the libraries take.")] = 2.0,
    tflops: Annotated[float, typer.Option(help="TFLOP/s of a GPU in large products.")] = 790.0,
    mfu: Annotated[float, typer.Option(help="Share of it that a dense model reaches.")] = 0.35,
    moe_mfu: Annotated[float, typer.Option(help="Share of it that a mixture of experts reaches.")] = 0.2,
    memory_bandwidth: Annotated[float, typer.Option(help="GB/s of a GPU's memory.")] = 4800.0,
    interconnect: Annotated[float, typer.Option(help="GB/s that a GPU sends within its node.")] = 450.0,
    network: Annotated[float, typer.Option(help="GB/s that a GPU sends to another node.")] = 50.0,
    node: Annotated[int, typer.Option(help="GPUs of a node.")] = 8,
    disk: Annotated[float, typer.Option(help="GB/s that a process writes to disk.")] = 2.0,
    hashing: Annotated[float, typer.Option(help="GB/s at which a process computes SHA-256.")] = 1.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compute the memory of each GPU and the seconds of each phase, and what to change where it does not fit.

    Nothing is loaded or downloaded: the model's config decides, from a local directory or known by name.
    """
    from sapo.config.recipes import load_recipe
    from sapo.workflows.planning.machine import Machine
    from sapo.workflows.planning.plan import make_plan
    from sapo.workflows.planning.proposal import propose

    asked = overrides or []
    config = load_recipe(recipe, asked if gpus is None else [*asked, f"train.ranks={gpus}"])
    machine = Machine(
        gpu_memory=gpu_memory,
        headroom=headroom,
        runtime=runtime,
        tflops=tflops,
        mfu=mfu,
        moe_mfu=moe_mfu,
        memory_bandwidth=memory_bandwidth,
        interconnect=interconnect,
        network=network,
        node=node,
        disk=disk,
        hashing=hashing,
    )
    made = make_plan(config, machine, prompt_tokens, completion_tokens)
    proposal = propose(made)
    if as_json:
        found = None if proposal is None else {"changes": proposal.changes, "remaining": proposal.remaining}
        print(json.dumps({**made.to_json(), "proposal": found}, indent=1))
        return
    _show(made, proposal)


def _show(made: Any, proposal: Any) -> None:
    shape, work, ranks = made.shape, made.work, made.config.train.ranks
    active = (shape.active + shape.head_elements) / 1e9
    say(f"{shape.name}: {shape.elements / 1e9:,.2f} billion parameters, {active:,.2f} billion at work for a token")
    say(made.config.batch_sentence())
    what = ("process" if ranks == 1 else "processes") if made.on_cpu else ("GPU" if ranks == 1 else "GPUs")
    say(f"{ranks} {what}, {work.microbatches} micro-batches an update")
    console.print(_memory_table(made))
    if made.seconds:
        console.print(_seconds_table(made))
    say("assumed:")
    for sentence in made.assumptions():
        say(f"  - {sentence}")
    if made.idle_ranks:
        say(
            f"{made.idle_ranks} of {ranks} ranks have no group in an update: whole groups are dealt, and an update "
            f"has {work.prompts // made.config.train.minibatches}; raise rollout.prompts_per_step, or lower "
            "train.minibatches"
        )
    say(_verdict(made, proposal))


def _verdict(made: Any, proposal: Any) -> str:
    size = f"{made.needed / GIB:,.1f} GiB of {made.capacity / GIB:,.1f}"
    if proposal is None:
        return f"it fits: {size}"
    lines = [f"it does not fit: {made.first_too_large()}"]
    if proposal.remaining is None:
        lines.append(f"it would fit with {proposal.overrides}")
    elif proposal.changes:
        lines.append(f"no settings make it fit; the nearest are {proposal.overrides}, and then {proposal.remaining}")
    else:
        lines.append("no setting makes it fit: a larger GPU or a smaller model would")
    return "\n".join(lines)


def _memory_table(made: Any) -> Table:
    """Make the table of every rank's parts, each in the phase in which the rank needs the most."""
    table = Table(box=None, pad_edge=False)
    table.add_column("memory, every completion at its full length")
    unit, places = (2**20, 0) if made.on_cpu else (GIB, 2)
    table.add_column("MiB" if made.on_cpu else "GiB", justify="right")
    for name, estimate in made.memory.ranks.items():
        table.add_row(f"{name if made.memory.other else 'the process'}: {estimate.largest_phase}", "", style="bold")
        for part, size in estimate.phases[estimate.largest_phase].items():
            table.add_row(f"  {part}", f"{size / unit:,.{places}f}")
        table.add_row("  peak", f"{estimate.peak / unit:,.{places}f}", style="bold")
        for phase, parts in estimate.phases.items():
            if phase != estimate.largest_phase:
                table.add_row(f"  total of {phase}", f"{sum(parts.values()) / unit:,.{places}f}")
    return table


def _seconds_table(made: Any) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("seconds of a step", "compute", "transfer", "the longer"):
        table.add_column(column, justify="left" if column == "seconds of a step" else "right")
    for name, phase in made.seconds.items():
        every = f" (every {made.config.checkpoint.every} steps)" if name == "checkpoint" else ""
        table.add_row(name + every, f"{phase.compute:,.1f}", f"{phase.transfer:,.1f}", f"{phase.seconds:,.1f}")
    total = sum(phase.seconds for name, phase in made.seconds.items() if name != "checkpoint")
    table.add_row("a step, without a checkpoint", "", "", f"{total:,.1f}", style="bold")
    return table
