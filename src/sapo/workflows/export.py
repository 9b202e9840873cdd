"""Export of a run's model: a clean Hugging Face directory with a model card, without anything of the trainer.

One checkpoint is exported. The card has the evaluations in that checkpoint's own state, not later ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from sapo.config import RunConfig
from sapo.config.recipes import parse_recipe
from sapo.diagnostics.titles import metric_title
from sapo.errors import CheckpointError, ConfigError, ModelError, UserError
from sapo.model.adapters import merged
from sapo.model.loading import load_policy
from sapo.model.policy import DTYPES, Policy, no_progress_bars
from sapo.model.streaming import DEFAULT_SHARD_SIZE, Copied, copy_model, parse_size
from sapo.model.vision import PROCESSOR_FILES
from sapo.run.state import RunState
from sapo.training.checkpoint import Checkpoint, list_checkpoints, newest_whole
from sapo.utils.files import new_directory, storage_failure
from sapo.utils.reading import read_json, read_yaml
from sapo.utils.text import first_line

CARD = "README.md"

LIMITS = """\
- It was trained by reinforcement learning on the tasks above and measured on their held-out problems. How it does on
  anything else was not measured; abilities that the tasks did not ask for may have been lost.
- The reward says only what the verifier checks. Text that pleases the verifier need not be right in any other way.
- The intervals cover which problems were drawn, not the spread over training runs of other seeds.
- No safety evaluation was made, and no data was filtered for one. What limits the model this one began as had, this one
  has too."""


@dataclass(frozen=True)
class ExportSource:
    """A checkpoint and the run it belongs to.

    >>> run = Path("runs/quickstart")
    >>> ExportSource(run, Checkpoint(run / "checkpoints" / "step-000250", 250, 0)).checkpoint.label
    'step 250'
    """

    run: Path
    checkpoint: Checkpoint

    @classmethod
    def of(cls, path: Path) -> ExportSource:
        """Find the newest whole checkpoint of a run directory, or take the checkpoint itself.

        Raises:
            ConfigError: neither a run nor one of its checkpoints, or not whole.
        """
        if (path / "config.yaml").is_file():
            newest = newest_whole(path / "checkpoints", on_broken=lambda _: None, check=_state_of)
            if newest is None:
                raise ConfigError(f"the run {path} has no whole checkpoint to export")
            return cls(path, newest)
        run = path.absolute().parent.parent
        found = [c for c in list_checkpoints(path.absolute().parent) if c.path == path.absolute()]
        if not found or not (run / "config.yaml").is_file():
            rule = "must be a run directory or one of its checkpoints (RUN/checkpoints/step-...)"
            raise ConfigError(f"what is exported {rule}, whose recipe the model card quotes; got {path}")
        try:
            found[0].verify()
            _state_of(found[0])
        except CheckpointError as error:
            raise ConfigError(f"the checkpoint is not whole: {error}; export another one") from error
        return cls(run, found[0])

    def config(self) -> RunConfig:
        """Read the recipe the run was made by."""
        return parse_recipe(read_yaml(self.run / "config.yaml"), recorded=True)


def export_model(
    path: str | Path, directory: str | Path, dtype: str | None = None, max_shard_size: str = DEFAULT_SHARD_SIZE
) -> ExportSource:
    """Write a run's model as an ordinary Hugging Face directory: weights, config, tokenizer, generation config, card.

    The weights are copied one tensor at a time, with an adapter folded into each layer, so that a model larger than
    memory can be exported. The exception is an adapter of experts, whose model is loaded whole.

    Args:
        path: a run directory (its newest whole checkpoint is taken) or a checkpoint.
        directory: where to; must not exist, or be empty.
        dtype: float32 or bfloat16; that of the run when None.
        max_shard_size: of a file of weights, as 5GB or 500MB; larger models are written as several with an index.

    Raises:
        ConfigError: nothing to export, the directory is taken, or a size that is none.
        ModelError: the checkpoint's model cannot be loaded.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already and is not empty; name another directory")
    if dtype is not None and dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype must be float32 or bfloat16; got {dtype!r}")
    size = parse_size(max_shard_size)
    source = ExportSource.of(Path(path))
    config = source.config()
    precision = dtype or config.model.dtype
    with new_directory(target) as aside, _readable(source.checkpoint):
        copied = copy_model(
            source.checkpoint.path,
            aside,
            dtype=DTYPES[precision],
            trained_dtype=DTYPES[config.model.dtype],
            max_shard_size=size,
            trust_remote_code=config.model.trust_remote_code,
        )
        if copied is None:
            copied = _save_whole(source, config, aside, precision, size)
        _copy_tokenizer(source.checkpoint.path, aside, config)
        if copied.pictures:
            _copy_image_processor(source.checkpoint.path, aside)
        card = model_card(target.name, source, config, copied, precision)
        (aside / CARD).write_text(card, encoding="utf-8")
    return source


@contextmanager
def _readable(checkpoint: Checkpoint) -> Iterator[None]:
    """Say in a line what a library cannot read of a checkpoint's model or tokenizer.

    Raises:
        ModelError: it cannot read it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises no other class
        if storage_failure(error) is not None:
            raise
        raise ModelError(f"the model in {checkpoint.path} cannot be read: {first_line(error)}") from error


def _state_of(checkpoint: Checkpoint) -> RunState:
    """Read a checkpoint's state, which the model card quotes."""
    return RunState.deserialise(checkpoint.state(), checkpoint.batches())


def _save_whole(source: ExportSource, config: RunConfig, directory: Path, precision: str, max_bytes: int) -> Copied:
    """Load the model of a checkpoint, merge its adapter and save it: for what cannot be copied tensor by tensor."""
    trusted = config.model.trust_remote_code
    text_only = not config.model.vision.load
    policy = load_policy(
        source.checkpoint.path, config.model.dtype, "cpu", trust_remote_code=trusted, text_only=text_only
    )
    shows = policy.vision is not None
    if policy.adapter is not None:
        policy = Policy(merged(policy), policy.tokenizer, policy.source)
    policy.model.to(DTYPES[precision])
    with no_progress_bars():
        policy.model.save_pretrained(directory, max_shard_size=max_bytes)
    return Copied(type(policy.model).__name__, policy.num_parameters, shows)


def _copy_tokenizer(checkpoint: Path, directory: Path, config: RunConfig) -> None:
    """Save the tokenizer that the checkpoint holds, with its chat template."""
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=config.model.trust_remote_code)
    tokenizer.save_pretrained(directory)
    _end_as_in_training(directory / "generation_config.json", tokenizer, config)


def _end_as_in_training(file: Path, tokenizer: Any, config: RunConfig) -> None:
    """Have the exported model end where completions ended in training: at every end token, the recipe's own too."""
    settings = read_json(file, "a generation config") if file.is_file() else {}
    added = {str(token.content): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    prompts = [config.prompt, *(t.prompt for t in config.tasks if t.prompt is not None)]
    named = {added[string] for prompt in prompts for string in prompt.stop if string in added}
    before = settings.get("eos_token_id")
    own = [] if before is None else before if isinstance(before, list) else [before]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = sorted({*own, *eos, *config.rollout.stop_token_ids, *named})
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_image_processor(checkpoint: Path, directory: Path) -> None:
    """Copy the image processor that the checkpoint holds, as it was limited in training."""
    for name in PROCESSOR_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, directory / name)


def model_card(name: str, source: ExportSource, config: RunConfig, copied: Copied, dtype: str) -> str:
    """Write README.md of an exported model, in the form of the hub's model cards."""
    state = source.checkpoint.state()
    tags = list(dict.fromkeys(["sapo", "reinforcement-learning", config.objective_name]))
    kind = "image-text-to-text" if copied.pictures else "text-generation"
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": kind, "tags": tags}
    base = _base_model(config)
    if _is_hub_id(config.model.path):
        front["base_model"] = config.model.path
    recipe = config.model_dump(mode="json", exclude={"provenance"})
    training = _training(source, config, state)
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"{copied.architecture}, {copied.num_parameters:,} parameters, {dtype}. It began as {base} and was "
        f"trained by reinforcement learning with the objective `{config.objective_name}` for {training}.",
        "## Evaluation\n\n" + _evaluation(config, state, source.checkpoint),
        "## Training tasks\n\n" + _tasks(config),
        "## Use\n\n" + _usage(name, config, copied.pictures),
        "## Limits\n\n" + LIMITS,
        "## Recipe\n\n" + _fenced("yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)),
        "## Versions\n\n" + _versions(config),
    ]
    return "\n\n".join(sections) + "\n"


def _base_model(config: RunConfig) -> str:
    if config.model.coldstart is not None:
        cold = config.model.coldstart
        return (
            f"a cold start: a {cold.architecture} made from scratch on {cold.examples:,} worked examples of its first "
            f"task, to a pass@1 of {cold.target}"
        )
    return f"`{config.model.path}`"


def _is_hub_id(path: str | None) -> bool:
    """Tell whether a path is owner/name and no directory of this machine."""
    if path is None or path.count("/") != 1 or path.startswith((".", "/", "~")):
        return False
    return not Path(path).exists()


def _training(source: ExportSource, config: RunConfig, state: dict[str, Any]) -> str:
    done = source.checkpoint
    of = "" if done.step == config.train.steps and not done.update else f" of {config.train.steps}"
    steps = f"{done.step}{of} step{'s' * (done.step != 1 or bool(of))}"
    if done.update:  # within a step
        steps += f" and {done.update} update{'s' * (done.update != 1)} of the next"
    rollout = config.rollout
    return (
        f"{steps} (seed {config.seed}, {rollout.prompts_per_step} prompts x "
        f"{rollout.samples_per_prompt} completions a step, {state['tokens']['generated']:,} tokens drawn)"
    )


def _evaluation(config: RunConfig, state: dict[str, Any], checkpoint: Checkpoint) -> str:
    start, last = state["start_evaluation"], state["last_evaluation"]
    if not start or not last:
        return "None was made before this checkpoint."
    rows = [
        "| task | figure | before training | this model | held-out problems x completions |",
        "|---|---|---|---|---|",
    ]
    by_task_before = start.get("tasks") or {start["task"]: start}
    by_task_after = last.get("tasks") or {last["task"]: last}
    for task, after in by_task_after.items():
        shares = [f for f in after if f.startswith("pass@") and "/" not in f] or [f"mean@{after['samples']}"]
        for figure in [*shares, "reward/mean"]:
            values = [_with_interval(figures, figure) for figures in (by_task_before[task], after)]
            name = metric_title("eval", figure).title if figure == "reward/mean" else figure
            rows.append(f"| {task} | {name} | {values[0]} | {values[1]} | {after['problems']} x {after['samples']} |")
    temperature = config.rollout.temperature if config.eval.temperature is None else config.eval.temperature
    text = "\n".join(rows)
    text += f"\n\nIntervals are 95%, bootstrapped over problems. Sampled at temperature {temperature}, at most "
    text += f"{config.rollout.max_new_tokens} tokens."
    if state["evaluated_at"] != checkpoint.step or checkpoint.update:
        text += (
            f" The last evaluation was made at step {state['evaluated_at']}; this checkpoint is of {checkpoint.label}."
        )
    return text


def _with_interval(figures: dict[str, Any], name: str) -> str:
    if name not in figures:
        return "not measured"
    low, high = figures.get(f"{name}/low"), figures.get(f"{name}/high")
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return f"{figures[name]:.3f}{interval}"


def _tasks(config: RunConfig) -> str:
    total = sum(t.weight for t in config.tasks)
    lines = []
    for task in config.tasks:
        options = ", ".join(f"{k}: {v}" for k, v in task.options.items()) or "no options"
        lines.append(f"- `{task.name}` ({options}), {task.weight / total:.0%} of the prompts")
    return "\n".join(lines)


def _usage(name: str, config: RunConfig, pictures: bool) -> str:
    kind = "AutoModelForImageTextToText" if pictures else "AutoModelForCausalLM"
    parts = {"model": kind, "tokenizer": "AutoTokenizer"}
    parts |= {"image_processor": "AutoImageProcessor"} if pictures else {}
    code = f"from transformers import {', '.join(sorted(parts.values()))}\n\n"
    code += "".join(f'{part} = {loader}.from_pretrained("{name}")\n' for part, loader in parts.items())
    prompts = [config.prompt, *(t.prompt for t in config.tasks if t.prompt is not None)]
    form = yaml.safe_dump(prompts[0].model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    text = _fenced("python", code) + "\n\nIn training its questions were put like this"
    return (
        text
        + (" (tasks with a form of their own: see the recipe)" * (len(prompts) > 1))
        + ":\n\n"
        + _fenced("yaml", form)
    )


def _versions(config: RunConfig) -> str:
    provenance = config.provenance or {}
    lines = [f"- {package} {version}" for package, version in (provenance.get("versions") or {}).items()]
    facts = [(key, provenance.get(key)) for key in ("python", "platform", "git_commit")]
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in facts if value]
    return "\n".join(lines) or "Not recorded."


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
