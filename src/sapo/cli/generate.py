"""`sapo generate`: completions of a prompt, as text, with log-probabilities, or as JSON; episodes of an environment."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sapo.cli.completion import complete_model, complete_task
from sapo.utils.text import visible, visible_line

# For the annotations only: `--help` is to answer before a library is loaded.
if TYPE_CHECKING:
    from sapo.data import Picture
    from sapo.rollout.params import SamplingParams
    from sapo.workflows.generate import Generation

# Default of --max-new-tokens.
LONGEST = 256


def generate(
    model: Annotated[
        Path,
        typer.Argument(
            help="A run directory, a checkpoint, a model directory, a .gguf file or a hub id.",
            autocompletion=complete_model,
        ),
    ],
    prompt: Annotated[
        str | None, typer.Argument(help="The text to complete; - reads it from standard input. With --task none.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="With --task: its settings, those of its prompts (prompt.*) and of episodes (turns.*).",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Answer a held-out problem of this task, or of a .jsonl or .parquet file, and judge it; an "
            "environment is played, and its transcript printed.",
            autocompletion=complete_task,
        ),
    ] = None,
    problem: Annotated[
        int | None, typer.Option(min=0, max=10**6, help="With --task: which of its problems, from 0.", show_default="0")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A picture for a vision-language model, several by several --image; where the prompt has <image>, or "
            "before it.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=10**6, help="Completions to draw.")] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**7,
            help="Longest completion.",
            show_default="256, or what the model has room for; with --task 64, or the run's",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy.", show_default="1; with --task 1, or the run's")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling.", show_default="1; with --task 1, or the run's")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**63 - 1, help="Seed of the draws.", show_default="0; with --task that of sapo eval"),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template; default: where the tokenizer has one."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message of the chat, or first paragraph of a plain prompt.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help=r"A string that ends a completion; \n is a newline.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="The engine: local, or module:Class of your own.",
            show_default="local; with --task local, or the run's",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16.", show_default="float32, or the run's")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Print each token with its log-probability.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Complete a prompt with a model, or answer a problem of a task; a run's model uses the format of its first task
    unless an option says otherwise."""
    from sapo.errors import ConfigError
    from sapo.run.models import load_model
    from sapo.workflows.generate import format_of_run
    from sapo.workflows.generate import generate as draw

    if task is not None:
        _refuse_with_task(image=image, chat=chat, no_chat=chat is False, system=system, stop=stop, logprobs=logprobs)
        given: dict[str, Any] = {"samples": samples, "max_new_tokens": max_new_tokens, "temperature": temperature}
        given |= {"top_p": top_p, "engine": engine}
        settings = [*([] if prompt is None else [prompt]), *(overrides or [])]
        _answer(model, task, settings, problem or 0, seed, given, dtype=dtype, device=device, as_json=as_json)
        return
    given_text = _own_prompt(prompt, overrides or [], problem)
    if stop and "" in stop:
        raise ConfigError("--stop must not be empty; got ''")
    params = _sampling(max_new_tokens, temperature, top_p, seed)
    told = chat is not None or system is not None or bool(stop)
    text = sys.stdin.read() if given_text == "-" else given_text
    pictures = _opened(image or [])
    streams = sys.stdout.isatty() and samples == 1 and not (logprobs or as_json)
    result = draw(
        load_model(model, dtype, device)[0],
        text,
        params,
        samples=samples,
        style="auto" if chat is None else "chat" if chat else "plain",
        system=system,
        stop=tuple(s.replace("\\n", "\n").replace("\\t", "\t") for s in stop or ()),
        form=None if told else format_of_run(model),
        shorten=max_new_tokens is None,
        engine=engine or "local",
        pictures=pictures,
        on_text=_show_piece if streams else None,
    )
    if streams:
        print()
    elif as_json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        _show(result, logprobs)


def _own_prompt(prompt: str | None, others: Sequence[str], problem: int | None) -> str:
    """Return the prompt that is to be completed, as the call has it.

    Raises:
        ConfigError: there is none, or more than one, or a problem of a task that is not named.
    """
    from sapo.errors import ConfigError

    if problem is not None:
        raise ConfigError(
            f"--problem is of a task; got --problem {problem} without --task; name the task, or leave it out"
        )
    if prompt is None or others:
        got = f"{others[0]!r} behind the prompt" if prompt is not None and others else "neither"
        raise ConfigError(
            f"give a prompt to complete, or --task with its settings; got {got}; put a prompt of several words in "
            "quotes"
        )
    return prompt


def _sampling(
    max_new_tokens: int | None, temperature: float | None, top_p: float | None, seed: int | None
) -> SamplingParams:
    """Return how a prompt of one's own is completed, by the options that are given."""
    from sapo.errors import ConfigError
    from sapo.rollout.params import SamplingParams

    try:
        return SamplingParams(
            max_new_tokens=max_new_tokens or LONGEST,
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            seed=seed or 0,
        )
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('_', '-', 1)}") from error


def _refuse_with_task(**given: Any) -> None:
    """Refuse options of a prompt of one's own beside a task, whose prompts say them."""
    from sapo.errors import ConfigError

    if found := [name.replace("_", "-") for name, value in given.items() if value not in (None, False, [])]:
        raise ConfigError(
            f"--{found[0]} is for a prompt of your own; got it beside --task; leave it out, or write the settings of "
            "the task's prompts, as in prompt.style=chat"
        )


def _answer(
    model: Path,
    task: str,
    overrides: Sequence[str],
    problem: int,
    seed: int | None,
    given: Mapping[str, Any],
    *,
    dtype: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Answer a problem of a task and print what was said and how it was judged."""
    from sapo.cli.terminal import say
    from sapo.model.sources import check_source
    from sapo.workflows.evaluate import EvaluatedModel
    from sapo.workflows.generate import answer_problem, plan_problem, transcript_lines

    check_source(model)

    def report(text: str) -> None:
        say(f"note: {text}")

    planned = plan_problem(model, task, overrides, problem, seed, report, **given)
    subject = EvaluatedModel.load(model, dtype, device)
    answered = answer_problem(subject, planned, problem, report)
    if as_json:
        print(json.dumps(answered.to_json(), indent=1))
        return
    print(f"{visible_line(planned.task.name)}, problem {problem}")
    print("\n".join(f"  {line}" for line in visible(answered.seen).split("\n")))
    for number, sample in enumerate(answered.samples, 1):
        facts = [f"reward {sample.reward:g}", *([] if sample.status == "scored" else [sample.status.replace("_", " ")])]
        facts += [f"{name} {value:g}" for name, value in sample.figures.items()] + [f"{sample.tokens} tokens"]
        print(f"--- {number} of {len(answered.samples)}: {visible_line(', '.join(facts))}")
        said = sample.transcript or (("policy", sample.text),)
        print("\n".join(transcript_lines(said)))
        if sample.detail:
            print("\n".join(f"  ! {line}" for line in visible(sample.detail).split("\n")))
    if answered.answer is not None:
        first, *more = visible(answered.answer).split("\n")
        print("\n".join([f"--- reference answer: {first}", *(f"  {line}" for line in more)]))


def _opened(files: Sequence[str]) -> list[Picture]:
    """Open the pictures that the call names, wherever they lie."""
    from sapo.data.picture_files import PictureRules, open_picture

    rules = PictureRules(allow_paths=True, leave_out="leave --image out", take_frame="save one frame as a picture")
    return [open_picture(file, "--image", rules, lambda line: print(line, file=sys.stderr)) for file in files]


def _show_piece(text: str) -> None:
    sys.stdout.write(visible(text))
    sys.stdout.flush()


def _show(result: Generation, logprobs: bool) -> None:
    """Print the completions, or with `logprobs` a line for each token."""
    spelled, samples = shown_to(terminal=sys.stdout.isatty()), len(result.completions)
    for number, (completion, texts) in enumerate(zip(result.completions, result.token_texts, strict=True), 1):
        if samples > 1:
            print(f"--- {number} of {samples}, {len(completion)} tokens, {completion.finish_reason}")
        if not logprobs:
            print(spelled(completion.text))
            continue
        for token, shown, logprob in zip(completion.token_ids, texts, completion.logprobs, strict=True):
            print(f"{logprob:9.4f}  {token:7d}  {shown!r}")
        print(f"{sum(completion.logprobs.tolist()):9.4f}  of {len(completion)} tokens, {completion.finish_reason}")


def shown_to(*, terminal: bool) -> Callable[[str], str]:
    """Return how a completion is printed: escaped on a terminal, which would obey it, and as it is to a file."""
    return visible if terminal else str
