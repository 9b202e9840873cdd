"""`sapo serve`: a model over HTTP, for OpenAI's clients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sapo.cli.completion import complete_model
from sapo.cli.terminal import say, stop_signals

Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.")]
Host = Annotated[
    str,
    typer.Option(
        help="Address. Beyond loopback a token is needed: SAPO_SERVER_TOKEN, or one that is made and printed."
    ),
]


def serve(
    model: Annotated[
        Path,
        typer.Argument(
            help="A run directory, a checkpoint, a model directory, a .gguf file or a hub id.",
            autocompletion=complete_model,
        ),
    ],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="the last part of MODEL")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=10**7, help="Longest completion of a chat that gives no max_tokens.")
    ] = 1024,
    at_once: Annotated[
        int,
        typer.Option(min=1, max=10**6, help="Requests that are drawn together; others wait. vLLM takes one at a time."),
    ] = 16,
    engine: Annotated[str, typer.Option(help="The engine: local, vllm, or module:Class of your own.")] = "local",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16.", show_default="float32, or the run's")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Serve a model by OpenAI's protocol: chats and completions, streamed, with log-probabilities."""
    from sapo.rollout.servers.guard import TOKEN
    from sapo.run.models import load_model
    from sapo.workflows.generate import format_of_run
    from sapo.workflows.serving.application import application, refusal
    from sapo.workflows.serving.served import ServedModel, serving_engine
    from sapo.workflows.serving.web import Guard, bound
    from sapo.workflows.serving.web import serve as serve_until
    from sapo.workflows.serving.worker import Worker

    with bound(host, port) as (taken, address), stop_signals() as stop:
        policy, _ = load_model(model, dtype, device)
        answered = 0

        def count() -> None:
            nonlocal answered
            answered += 1

        with serving_engine(policy, engine) as drawer:
            served = ServedModel(name or model.resolve().name, policy, drawer, format_of_run(model), max_new_tokens)
            worker = Worker(at_once if served.interleaves else 1)
            app = Guard(application(served, worker, count), address, refusal)

            def ready() -> None:
                say(f"serving {served.name} at {address.url}/v1 by the engine {engine}; Ctrl-C ends it")
                if address.token is not None:
                    say(f"token: {address.token if address.made else f'that of {TOKEN}'}")
                if not policy.has_chat_template:
                    say("it has no chat template: /v1/completions completes plain text, and chats are refused")

            try:
                serve_until(app, taken, should_stop=stop, on_ready=ready, on_stop=worker.close)
            finally:
                worker.close()
    say(f"stopped after {answered} request{'s' * (answered != 1)}")
