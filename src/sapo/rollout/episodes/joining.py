"""Encode what an environment says between two turns: as plain text, or as the chat template has it."""

from __future__ import annotations

from typing import Any, Protocol

from sapo.data import Prompt
from sapo.environments import Messages, TokenEnvironment, is_environment
from sapo.environments.wrapping import Wrapped
from sapo.model.policy import Policy
from sapo.rollout.episodes.bridge import Bridge
from sapo.rollout.prompting import PromptFormat


class Joiner(Protocol):
    """Encodes what is said between two turns of a chat."""

    def between(self, messages: Messages, last: int | None) -> tuple[int, ...]:
        """Return the ids between an answer, whose last id is given, and the next one."""
        ...


class PlainJoiner:
    """Joins the contents of messages by line ends, for tools and environments of others in plain text.

    Args:
        policy: its tokenizer encodes them, with nothing special in it.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def between(self, messages: Messages, last: int | None) -> tuple[int, ...]:
        """Return the ids of what messages say.

        Raises:
            ValueError: one has no text, or the tokenizer cannot encode it.
        """
        contents = [message.get("content") for message in messages]
        if not all(isinstance(content, str) for content in contents):
            raise ValueError(f"a message must have a content of text; got {contents!r:.80}")
        return encode_observation(self._policy, "\n".join(map(str, contents)))


def joiners_for(policy: Policy, task: Any, form: PromptFormat, prompt: Prompt) -> dict[str, Joiner]:
    """Return, by its name, how what an environment says between turns is encoded; nothing where it says plain text.

    Args:
        prompt: any of its prompts.

    Raises:
        ModelError: the chat template has no way from one turn to the next that could be proven.
    """
    if not is_environment(task) or isinstance(task, TokenEnvironment):  # which encodes for itself
        return {}
    if not form.is_chat(policy, prompt):
        speaks = isinstance(task, Wrapped) or hasattr(task, "toolbox")  # in messages, whatever the prompts are
        return {task.name: PlainJoiner(policy)} if speaks else {}
    return {task.name: Bridge.prove(policy.tokenizer, form.tools(prompt), form.thinking)}


def encode_observation(policy: Policy, text: str) -> tuple[int, ...]:
    """Encode what an environment says as plain text: a special token that is spelled out in it stays text.

    Raises:
        ValueError: the tokenizer cannot encode it.
    """
    try:
        encoded = policy.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a character it does not know
        raise ValueError(f"the tokenizer cannot encode the observation {text[:80]!r}: {error}") from error
    return tuple(encoded["input_ids"])
