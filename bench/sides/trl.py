"""TRL's side: GRPOTrainer(loss_type="sapo") in its own `train()`, a step being one rollout and its mini-batches.

The clock runs from the callback before the first of a step's mini-batches to the callback after the last, so
generation, rewards, old log-probabilities, losses and the optimizer are in, data loading is not. Two things are forced,
both on the trainer's own methods: each completion's length (role step), or the completions themselves (role update),
which then cost nothing. In role update the batch is not shuffled, so that its mini-batches are ours and losses can be
compared.

With `ranks` in the settings, the step runs on so many processes under accelerate, which is asked for FSDP2. The first
starts the others and tells them what the parent asks for. Completions are given to each rank by its place in the batch.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from typing import Any

import psutil
import torch

from bench.rewards import of_place, of_text
from bench.sides.accelerated import join_ranks
from bench.sides.clock import Listening, Stopwatch, use_machine
from bench.sides.hf import DTYPES, AtLength
from bench.sides.serve import LEARNING_RATE, Commands, completions_of, limits_of

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def main(commands: Commands) -> None:
    """Serve rounds until the parent hangs up."""
    settings = commands.settings
    if settings.get("ranks", 1) > 1:
        commands = join_ranks(commands)
    device = use_machine(settings)
    logging.disable(logging.WARNING)
    from transformers import TrainerCallback
    from trl import GRPOTrainer
    from trl.trainer import grpo_trainer

    commands.imported()
    fixed = settings["role"] == "update"
    if fixed:
        grpo_trainer.shuffle_sequence_dict = lambda batch: batch
    model, criterion = _model(settings), AtLength(torch.zeros(1, dtype=torch.long), 0)
    trainer = _told(GRPOTrainer, settings, device, criterion)(
        model,
        functools.partial(_by_place, _rank()) if fixed else _by_text,
        args=_config(settings, device),
        train_dataset=_rows(settings),
        processing_class=_tokenizer(settings),
    )
    # No drawn token ends a row: it has its length.
    trainer.eos_token_ids = [-1]
    trainer.generation_kwargs["eos_token_id"] = trainer.generation_config.eos_token_id = None
    model.generation_config.eos_token_id = None
    model.generate = functools.partial(model.generate, stopping_criteria=[criterion])
    trainer.add_callback(_pacemaker(TrainerCallback, commands, trainer, settings, device))
    trainer.train()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _told(base: Any, settings: dict[str, Any], device: torch.device, criterion: AtLength) -> Any:
    """Return TRL's trainer with the lengths of its completions, or these themselves, as told."""
    fixed, size, rank = settings["role"] == "update", settings.get("ranks", 1), _rank()

    class Trainer(base):  # type: ignore[misc]
        """Lengths or completions as told; remembers the losses."""

        limits: list[list[int]] = limits_of(settings, "warm")
        losses: list[float] = []  # noqa: RUF012 of the step under way
        tokens = 0

        def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
            flat = [n for group in self.limits for n in group]
            if fixed:
                drawn, logprobs = [ids for group in completions_of(self.limits) for ids in group], None
                drawn = drawn[rank * len(drawn) // size : (rank + 1) * len(drawn) // size]
            else:
                criterion.last_R = torch.tensor(flat, device=device) + self._prompt_width(args[0])
                self.generation_config.max_new_tokens = max(flat)
                drawn, logprobs = super()._generate_single_turn(*args, **options)
                drawn = [ids[:n] for ids, n in zip(drawn, flat, strict=True)]
            type(self).tokens = sum(map(sum, self.limits)) if size > 1 else sum(map(len, drawn))
            return drawn, logprobs

        @staticmethod
        def _prompt_width(prompt_ids: list[list[int]]) -> int:
            return max(map(len, prompt_ids))

        def training_step(self, *args: Any, **options: Any) -> Any:
            loss = super().training_step(*args, **options)
            mean = loss.detach().clone()
            if size > 1:
                torch.distributed.all_reduce(mean)
            self.losses.append(mean.item() / size)
            return loss

    return Trainer


def _by_place(rank: int, completions: list[Any], **_: Any) -> list[float]:
    return [of_place(rank * len(completions) + i) for i in range(len(completions))]


def _by_text(completions: list[str], **_: Any) -> list[float]:
    return [of_text(text) for text in completions]


def _pacemaker(base: Any, commands: Commands, trainer: Any, settings: dict[str, Any], device: torch.device) -> Any:
    """A callback that waits for the parent before each step, times it and answers after it."""
    per_step = settings["minibatches"]

    class Pacemaker(base):  # type: ignore[misc]
        """Warm up, tell the libraries used, then serve."""

        do: str | None = None
        round = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Before the first mini-batch of a step: take the next command."""
            if state.global_step % per_step:
                return
            if self.round == 2:
                commands.ready(
                    backends=self.backends,
                    startup=time.time() - psutil.Process().create_time(),
                    sharded=all(hasattr(p, "full_tensor") for p in trainer.model_wrapped.parameters()),
                )
            self.do = "warm" if self.round < 2 else next(commands, None)
            if self.do is None:
                os._exit(0)  # the parent has hung up; there is nothing to save
            trainer.limits = limits_of(settings, self.do)
            trainer.losses.clear()
            self.listening = Listening(device) if self.round == 1 else None
            self.watch = Stopwatch(device)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """After the last: answer."""
            if state.global_step % per_step:
                return
            seconds = self.watch.stop()
            if self.listening is not None:
                self.backends = self.listening.stop()
            if self.round >= 2:
                commands.reply(seconds, trainer.tokens, tokens=trainer.tokens, losses=list(trainer.losses))
            self.round += 1

    return Pacemaker()


def _model(settings: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=DTYPES[settings["dtype"]], attn_implementation="sdpa"
    )


def _tokenizer(settings: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(settings["model"], padding_side="left")


def _rows(settings: dict[str, Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": text} for text in settings["texts"]] * 64)


def _config(settings: dict[str, Any], device: torch.device) -> Any:
    from trl import GRPOConfig

    sequences, minibatches = len(settings["texts"]) * settings["samples"], settings["minibatches"]
    assert sequences % minibatches == 0
    return GRPOConfig(
        output_dir=settings["scratch"] + "/trl",
        loss_type="sapo",
        beta=0.0,
        use_cpu=device.type == "cpu",
        # In bfloat16 the weights themselves are, without float32 masters: the fastest that TRL has.
        bf16=settings["dtype"] == "bfloat16",
        per_device_train_batch_size=sequences // minibatches // settings.get("ranks", 1),
        gradient_accumulation_steps=1,
        steps_per_generation=minibatches,
        num_iterations=1,
        num_generations=settings["samples"],
        max_completion_length=max(map(max, settings["limits"])),
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=100_000,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
