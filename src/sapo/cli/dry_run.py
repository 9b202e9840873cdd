"""`sapo train --dry-run`: what a run would do, for a person to read."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from sapo.config.summary import replay_sentence, sampler_sentences
from sapo.conformance.objective_laws import Judgement
from sapo.workflows.dry_run import DryRun, SeenPrompt
from sapo.workflows.memory import MemoryEstimate

MIB = 2**20


def show_dry_run(run: DryRun, console: Console) -> None:
    """Print batches, model, held-out problems, prompts and memory."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(run.batch_sentence)
    if (replay := replay_sentence(run.config)) is not None:
        say(replay)
    for sentence in sampler_sentences(run.config):
        say(sentence)
    say(f"model: {run.model}")
    if run.coldstart_missing:
        say("the starting model is not made yet: an untrained model of its shape is used here")
    for text in run.warnings:
        say(f"warning: {text}")
    say("held-out problems: " + ", ".join(f"{task} {count}" for task, count in run.held_out.items()))
    for tried in run.rewards:
        say(tried.sentence)
    for number, prompt in enumerate(run.prompts, 1):
        say(f"\nprompt {number} of the first step, as the model sees it:\n" + describe_prompt(prompt))
    say("\nmemory, every completion at its full length")  # as a title, the table would wrap it
    if (ranks := run.config.train.ranks) > 1:
        say(
            f"as one process would need it; each of {ranks} ranks keeps its slices of weights, gradients and optimizer "
            "state, and the driver a whole copy of the weights as well (docs/scaling.md)"
        )
    console.print(_memory_table(run.memory))
    say("nothing was written")


def show_laws(judged: Judgement, console: Console) -> None:
    """Print which conformance laws an objective of the user's own keeps."""
    for line in judged.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def describe_prompt(prompt: SeenPrompt) -> str:
    r"""Write a prompt as text: its task, its text between bars, token ids with their texts, and what ends a completion.

    >>> print(describe_prompt(SeenPrompt("sums", (5, 0), ("7=", "<end>"), "7=<end>", "7", ("\n",))))
      task sums, 2 tokens, answer '7'
      | 7=<end>
      5 '7='  0 '<end>'
      a completion ends with the end token or '\n'
    """
    answer = "" if prompt.answer is None else f", answer {prompt.answer!r}"
    lines = [f"  task {prompt.task}, {len(prompt.token_ids)} tokens{answer}"]
    lines += [f"  | {line}" for line in prompt.text.split("\n")]
    lines.append("  " + "  ".join(f"{i} {t!r}" for i, t in zip(prompt.token_ids, prompt.tokens, strict=True)))
    lines.append("  a completion ends with " + " or ".join(["the end token", *map(repr, prompt.stop)]))
    return "\n".join(lines)


def _memory_table(memory: MemoryEstimate) -> Table:
    """Make the table of the largest phase part by part, with the totals of the others."""
    table = Table()
    table.add_column(f"{memory.largest_phase}, on {memory.device}")
    table.add_column("MiB", justify="right")
    for part, size in memory.phases[memory.largest_phase].items():
        table.add_row(part, f"{size / MIB:,.1f}")
    table.add_section()
    table.add_row("estimated peak", f"{memory.peak / MIB:,.0f}")
    table.add_section()
    for phase, parts in memory.phases.items():
        if phase != memory.largest_phase:
            table.add_row(f"total: {phase}", f"{sum(parts.values()) / MIB:,.0f}")
    return table
