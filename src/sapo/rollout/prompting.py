"""Format a task's question for the model: chat template or plain text, few-shot examples, stop strings.

A task knows only text and a policy only token ids. This file turns the one into the other, for rollout, evaluation and
the cold start alike. What the model emits is never encoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from sapo.config import PromptConfig, RunConfig
from sapo.data import Prompt
from sapo.environments import is_environment
from sapo.environments.wrapping import source_of
from sapo.errors import ConfigError
from sapo.model.pictured_prompts import Encoded, encode_chat, encode_plain, marked, marked_messages
from sapo.model.policy import Policy
from sapo.rollout.encoded import EncodedPrompts, tools_of
from sapo.tasks import Task
from sapo.tasks.rows.task import RowTask


@dataclass(frozen=True)
class PromptFormat:
    """The format of the prompts of one task.

    >>> form = PromptFormat(template="Q: {prompt}\\nA:", shots=(("1 + 1 =", "2"),), stop=("\\n",))
    >>> print(form.text(Prompt(id=0, task="sums", text="3 + 4 =")))
    Q: 1 + 1 =
    A: 2
    Q: 3 + 4 =
    A:
    """

    style: Literal["auto", "plain", "chat"] = "auto"
    system: str | None = None
    thinking: bool | None = None
    template: str = "{prompt}"
    answer_template: str = " {answer}\n"
    shots: tuple[tuple[str, str], ...] = ()
    stop: tuple[str, ...] = ()
    special_tokens: bool = False
    _toolbox_of: ClassVar[Any] = None  # prompt -> tools that it offers, of a task that has some
    prefers_chat: bool = False
    """Whether `auto` takes the tokenizer's chat template for a question in plain text."""

    @classmethod
    def of(cls, config: PromptConfig, task: Task) -> PromptFormat:
        """Make the format that a recipe gives to a task, with examples of the task where it asks for them.

        Raises:
            ConfigError: the recipe asks for examples and the task has none.
        """
        if isinstance(config.shots, list):
            shots = tuple((s.prompt, s.answer) for s in config.shots)
        elif config.shots and not hasattr(task, "shots"):
            raise ConfigError(
                f"prompt.shots={config.shots} asks task {task.name!r} for examples and it has none; "
                "write them in the recipe: shots: [{prompt: ..., answer: ...}]"
            )
        else:
            shots = tuple(task.shots(config.shots)) if config.shots else ()  # type: ignore[attr-defined]
        made = cls(
            style=config.style,
            system=config.system,
            thinking=config.thinking,
            template=config.template,
            answer_template=config.answer_template,
            shots=shots,
            stop=(*config.stop, *(getattr(task, "stop", ()) if is_environment(task) else ())),
            special_tokens=config.special_tokens,
            prefers_chat=getattr(task, "prefers_chat", False),
        )
        object.__setattr__(made, "_toolbox_of", getattr(task, "toolbox_of", None))  # no field: it is not a setting
        return made

    def tools(self, prompt: Prompt) -> list[Any] | None:
        """Return the schemas of the tools that a prompt offers to the model: the task's own, or those of the row.

        Raises:
            TaskError: the row names a tool that the task has not.
        """
        return tools_of(prompt) if self._toolbox_of is None else self._toolbox_of(prompt).schemas

    def encode(self, policy: Policy, prompts: Sequence[Prompt], *, keep: bool = True) -> list[Prompt]:
        """Return the prompts with their token ids and stop strings.

        Args:
            keep: keep the token ids, so that a prompt that comes again is not encoded again.

        Raises:
            ModelError: the tokenizer has no chat template, or no token for a part of the text, or the model takes no
                pictures.
            TaskError: a question has another number of markers than pictures.
            ConfigError: the rows are chat messages and the recipe asks for plain text.
        """
        self._encoded.reset_for(policy.tokenizer)
        return [self._encode(policy, p, keep) for p in prompts]

    def text(self, prompt: Prompt) -> str:
        """Return a plain prompt in full: system text, examples and question."""
        opening = f"{self.system}\n\n" if self.system else ""
        shots = [self._question(q) + self.answer_template.replace("{answer}", a) for q, a in self._shots_for(prompt)]
        return opening + "".join(shots) + self._question(marked(prompt.text, prompt.pictures))

    def messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """Return the messages of a chat prompt. A row's own system message takes precedence, and `template` words the
        last of its user's messages.

        Raises:
            ConfigError: there is a template and no such message.
        """
        own = [dict(m) for m in prompt.metadata.get("messages", ())]
        if own and self.template != "{prompt}":
            last = next((m for m in reversed(own) if m["role"] == "user"), None)
            if last is None:
                raise ConfigError(
                    f"prompt.template words the user's message, and a chat of task {prompt.task!r} has none: "
                    f"{prompt.text[:40]!r}; leave it out, or fix the row"
                )
            last["content"] = self._question(last["content"])
        turns = marked_messages(own or [{"role": "user", "content": self._question(prompt.text)}], prompt.pictures)
        system = [turns.pop(0)] if turns[0]["role"] == "system" else []
        if not system and self.system:
            system = [{"role": "system", "content": self.system}]
        shots = [
            {"role": role, "content": content}
            for question, answer in self._shots_for(prompt)
            for role, content in (("user", self._question(question)), ("assistant", answer))
        ]
        return [*system, *shots, *turns]

    def _shots_for(self, prompt: Prompt) -> list[tuple[str, str]]:
        """Return the examples without the question itself, whose answer would be given away."""
        return [(question, answer) for question, answer in self.shots if question != prompt.text]

    def _question(self, text: str) -> str:
        return self.template.replace("{prompt}", text)  # not format(): questions hold braces of their own

    @cached_property  # not a field, so that equality, hashing and asdict() leave it out
    def _encoded(self) -> EncodedPrompts:
        return EncodedPrompts()

    def _encode(self, policy: Policy, prompt: Prompt, keep: bool) -> Prompt:
        """Return a prompt with its token ids: those kept from before, or new ones."""
        keep = keep and self._toolbox_of is None  # whose tools are not in what ids are kept by
        found = self._encoded.find(prompt) if keep else None
        if found is None:
            found = self._new_tokens(policy, prompt)
            if keep:
                self._encoded.add(prompt, *found)
        token_ids, picture_tokens = found
        return replace(
            prompt,
            token_ids=token_ids,
            picture_tokens=picture_tokens,
            stop=self.stop,
            special_tokens=self.special_tokens,
        )

    def _new_tokens(self, policy: Policy, prompt: Prompt) -> Encoded:
        if self.is_chat(policy, prompt):
            messages = self.messages(prompt)
            return encode_chat(policy, messages, prompt.pictures, prompt.task, self.thinking, self.tools(prompt))
        return encode_plain(policy, self.text(prompt), prompt.pictures, prompt.task)

    def rendered(self, policy: Policy, prompt: Prompt) -> str:
        """Return the text of a prompt without pictures, as the tokenizer gets it.

        Raises:
            ModelError, ConfigError: as from `encode`.
        """
        if self.is_chat(policy, prompt):
            return policy.render_messages(self.messages(prompt), self.thinking, self.tools(prompt))
        return self.text(prompt)

    def is_chat(self, policy: Policy, prompt: Prompt) -> bool:
        """Return whether a prompt goes through the chat template.

        Raises:
            ConfigError: the recipe asks for what it cannot have.
        """
        is_chat = "messages" in prompt.metadata
        if is_chat and self.style == "plain":
            raise ConfigError(
                f"prompt.style=plain cannot format the chat messages of task {prompt.task!r}; use style auto or chat"
            )
        if is_chat or self.style == "chat" or (self.style == "auto" and self.prefers_chat and policy.has_chat_template):
            return True
        if self.thinking is not None:
            raise ConfigError(
                f"prompt.thinking is a switch of the chat template, and task {prompt.task!r} is in plain text; "
                "set prompt.style=chat or leave it out"
            )
        return False


SPECIAL_TOKENS = 8
"""Tokens that a tokenizer may put around a text: more than any does."""


class PromptLengths:
    """Counts the tokens of the prompts of a task.

    A prompt that is short enough by its bytes alone is not encoded: a byte-level tokenizer makes no more tokens.

    Args:
        policy: the model and its tokenizer, which must stay as they are meanwhile.
        form: format of the prompts.
    """

    def __init__(self, policy: Policy, form: PromptFormat) -> None:
        self.policy = policy
        self.form = form
        self._per_byte = policy.tokens_per_byte() if policy.vision is None else None

    def count(self, prompt: Prompt, within: int | None = None) -> int:
        """Return the tokens of a prompt, or an upper bound of them that is at most `within`; None: any bound will do.

        Raises:
            ModelError, TaskError, ConfigError: as from `PromptFormat.encode`.
        """
        if self._per_byte is not None and not prompt.pictures:
            text = self.form.rendered(self.policy, prompt)
            bound = len(text.encode("utf-8", "surrogatepass")) * self._per_byte + SPECIAL_TOKENS
            if text and (within is None or bound <= within):
                return bound
        return len(self.form.encode(self.policy, [prompt])[0].token_ids)


def apply_limit(policy: Policy, task: Task, form: PromptFormat) -> None:
    """Leave out the rows of a task whose prompts are longer than it allows, or refuse the first, as the task says.

    Raises:
        TaskError: a row is refused, or none are left.
    """
    task = source_of(task)
    if isinstance(task, RowTask) and task.limit is not None:
        lengths, within = PromptLengths(policy, form), task.limit.tokens
        task.apply_limit(lambda prompt: lengths.count(prompt, within))


def formats_of(config: RunConfig, tasks: Sequence[Task]) -> dict[str, PromptFormat]:
    """Return the prompt format of each task of a recipe, by its name."""
    return {
        task.name: PromptFormat.of(t.prompt or config.prompt, task) for t, task in zip(config.tasks, tasks, strict=True)
    }


def encode_by_task(
    policy: Policy, formats: Mapping[str, PromptFormat], tasks: Iterable[Task], prompts: Sequence[Prompt]
) -> list[Prompt]:
    """Return training prompts with their token ids, each in the format of its task.

    The token ids of a finite task's rows are kept for the next epoch. Prompts of an endless task do not come again.
    """
    finite = {task.name: hasattr(task, "num_train") for task in tasks}
    return [formats[p.task].encode(policy, [p], keep=finite[p.task])[0] for p in prompts]
