"""`sapo chat`: a conversation with a model, in the terminal or line by line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sapo.cli.completion import complete_model
from sapo.cli.terminal import say
from sapo.utils.text import visible

if TYPE_CHECKING:
    from sapo.workflows.chat import Conversation

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = (
    "/reset forgets the conversation, /system TEXT sets the system message and /system alone takes it back, "
    "/exit ends; Ctrl-C ends an answer"
)
BEGINS, ENDS = "<think>", "</think>"


def chat(
    model: Annotated[
        Path,
        typer.Argument(
            help="A run directory, a checkpoint, a model directory, a .gguf file or a hub id.",
            autocompletion=complete_model,
        ),
    ],
    system: Annotated[
        str | None, typer.Option(help="System message.", show_default="the run's own, if it has one")
    ] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Set the chat template's switch.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=10**7, help="Longest answer.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**63 - 1, help="Seed of the first answer.", show_default="each is drawn anew"),
    ] = None,
    engine: Annotated[str, typer.Option(help="The engine: local, vllm, or module:Class of your own.")] = "local",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16.", show_default="float32, or the run's")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Talk to a model; of what is no terminal every line of standard input is a message."""
    from sapo.errors import ConfigError
    from sapo.run.models import load_model
    from sapo.workflows.chat import Conversation
    from sapo.workflows.generate import format_of_run
    from sapo.workflows.serving.served import Order, ServedModel, serving_engine

    order = Order(
        prompts=lambda _: [],
        max_new_tokens=None,
        temperature=temperature,
        top_p=top_p,
    )
    try:
        order.sampling(max_new_tokens)
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('_', '-', 1)}") from error
    policy, _ = load_model(model, dtype, device)
    with serving_engine(policy, engine) as drawer:
        served = ServedModel(model.name, policy, drawer, format_of_run(model), max_new_tokens)
        conversation = Conversation(served, order, system=system, thinking=thinking, seed=seed)
        if not conversation.remembers and (system is not None or thinking is not None):
            option = "--system" if system is not None else "--thinking" if thinking else "--no-thinking"
            raise ConfigError(f"{option} needs a model with a chat template; {served.name} has none; leave it out")
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if terminal:
            say(HELP)
        if not conversation.remembers:
            print("no chat template: each message is a question of its own", file=sys.stderr)
        talk(conversation, _lines(terminal), dim=sys.stdout.isatty())


def talk(conversation: Conversation, lines: Iterable[str], *, dim: bool) -> None:
    """Answer messages and commands until there are no more, or /exit.

    Args:
        dim: write for a terminal: thoughts dim, and control characters escaped.
    """
    for line in lines:
        text = line.strip()
        word, _, rest = text.partition(" ")
        if not text:
            continue
        if word in ("/exit", "/quit"):
            return
        if word == "/reset":
            conversation.reset()
            say("forgotten")
        elif word == "/system" and not conversation.remembers:
            say("a system message needs a chat template, and this model has none")
        elif word == "/system":
            conversation.system = rest.strip() or None
            own = conversation.served.form.system
            none = f"the run's own system message holds again: {visible(own)}" if own else "no system message"
            say("system message set" if conversation.system else none)
        elif word == "/help" or (word.startswith("/") and word[1:].isalpha()):
            say(HELP if word == "/help" else f"there is no command {word}; {HELP}")
        else:
            _answer(conversation, text, dim=dim)


def _answer(conversation: Conversation, text: str, *, dim: bool) -> None:
    """Print an answer as it comes; Ctrl-C ends it, and a refusal is a line."""
    from sapo.errors import UserError

    pieces = conversation.say(text)
    guarded: AbstractContextManager[list[int]] = _interrupts() if dim else nullcontext([])
    with guarded as interrupted:
        try:
            for shown in dimmed(pieces) if dim else pieces:
                sys.stdout.write(shown)
                sys.stdout.flush()
                if interrupted:
                    break
        except UserError as error:
            print(f"sapo: {error}", file=sys.stderr)
            return
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()
    sys.stdout.write(f"{PLAIN}\n" if dim else "\n")
    sys.stdout.flush()


def dimmed(pieces: Iterable[str]) -> Iterator[str]:
    r"""Yield text for a terminal: what stands in think tags dim, and what would steer the terminal escaped.

    A tag may come in several pieces; what may begin one waits for the rest.

    >>> "".join(dimmed(["a<thi", "nk>b</think>", "c"])) == f"a{DIM}<think>b</think>{PLAIN}c"
    True
    """
    waiting, tag, other = "", BEGINS, ENDS
    for piece in pieces:
        waiting += piece
        while (at := waiting.find(tag)) >= 0:
            yield visible(waiting[:at]) + (f"{DIM}{tag}" if tag == BEGINS else f"{tag}{PLAIN}")
            waiting, tag, other = waiting[at + len(tag) :], other, tag
        held = next((n for n in range(len(tag) - 1, 0, -1) if waiting.endswith(tag[:n])), 0)
        shown, waiting = waiting[: len(waiting) - held], waiting[len(waiting) - held :]
        if shown:
            yield visible(shown)
    if waiting:
        yield visible(waiting)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C for the duration of the block, in place of ending the command."""
    found: list[int] = []

    def note(number: int, _: Any) -> None:
        found.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(terminal: bool) -> Iterator[str]:
    """Yield what is typed, or the lines of standard input."""
    if not terminal:
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() a history and arrow keys)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
