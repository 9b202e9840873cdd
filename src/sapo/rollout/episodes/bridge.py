"""Token ids between two turns of a chat: what the template puts behind one answer and before the next.

What the model has drawn is never encoded again (E1). A bridge is rendered alone: the template of a dummy conversation,
an assistant's turn and the new messages, cut behind the token that ends that turn (E3). All messages of one boundary go
through one rendering, since many templates join parallel tool results. What an environment says is encoded as plain
text, so that a tool that prints `<|im_end|>` ends no turn (E2).

`Bridge.prove` holds this against whole renderings when a model is loaded (E4). Some templates change what is past: they
drop thinking, or end the last turn with another token. There appending is exact for what the model saw, and differs
from what the template would show anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sapo.environments import Messages
from sapo.errors import ModelError
from sapo.rollout.episodes.layouts import (
    ANSWER,
    BODY,
    CALL_ID,
    FORMS,
    Form,
    Layout,
    common_length,
    cut_content,
    dummy_before,
    first_mark,
    split_at,
    with_contents,
)
from sapo.rollout.episodes.messages import check_messages, with_our_ids
from sapo.rollout.episodes.pieces import Piece, PieceEncoder
from sapo.utils.text import first_line

Finding = Literal["append", "keep", "refuse"]

_KEPT = 256
"""Most layouts that are kept."""


@dataclass(frozen=True)
class Case:
    """What the proof found for one kind of boundary.

    >>> Case("answer, user", "append").finding
    'append'
    """

    name: str
    """What comes before and after the boundary."""
    finding: Finding
    """append: the drawn ids and the bridge are the ids of the whole rendering. keep: the template would change what was
    drawn, and the bridge itself is as it writes it. refuse: there is no bridge."""
    detail: str = ""


class Bridge:
    """The ids between the turns of a chat, by one tokenizer's chat template.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        tools: schemas that the template shows.
        thinking: the template's switch; None leaves it alone.
    """

    def __init__(
        self, tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None = None, thinking: bool | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._encoder = PieceEncoder(tokenizer)
        self.tools = [dict(tool) for tool in tools or ()]
        self._switch: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        if self.tools:
            self._switch["tools"] = self.tools
        self._layouts: dict[Any, Layout | str] = {}
        """By the fields of messages, some of them written by the model; a text says why there is none."""
        self._form = Form()
        self.cases: tuple[Case, ...] = ()
        """What the proof found; empty before it."""

    @classmethod
    def prove(
        cls, tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None = None, thinking: bool | None = None
    ) -> Bridge:
        """Return a bridge after holding it against whole renderings of conversations.

        Args:
            tools: schemas that the template shows; with tools, their results must be bridged too.

        Raises:
            ModelError: there is no template, or a boundary that is needed has no bridge.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "turns of a chat need a chat template and the tokenizer has none; give a model with a template, or "
                "prompts in plain text (prompt.style=plain)"
            )
        bridge = cls(tokenizer, tools, thinking)
        bridge.cases = tuple(bridge._prove())
        needed = [case for case in bridge.cases if case.name in (_NEEDED_FOR_TOOLS if tools else _NEEDED)]
        for case in needed:
            if case.finding == "refuse":
                raise ModelError(
                    f"the chat template has no bridge between the turns {case.name!r}: {case.detail}; give a model "
                    "with another template, or prompts in plain text (prompt.style=plain)"
                )
        bridge._form = bridge._layout([_T if tools else _U]).form
        return bridge

    @property
    def notices(self) -> list[str]:
        """Return lines for the user about boundaries at which the template would change what is past."""
        changed = [case.name for case in self.cases if case.finding == "keep"]
        if not changed:
            return []
        return [
            f"the chat template would change earlier turns ({'; '.join(changed)}); they stay as they were drawn, and "
            "the model sees them so"
        ]

    def between(self, messages: Messages, last: int | None) -> tuple[int, ...]:
        """Return the ids between an answer and the next one.

        Ids of calls are the model's, which may have written none or one that its template refuses: some take nine
        letters and digits alone. There the results have ids of ours.

        Args:
            messages: all that is said at this boundary, at least one; contents are texts.
            last: the last id that the model drew. The token that ends a turn is added where it is another.

        Raises:
            ValueError: a message is malformed, or the template refuses the messages.
        """
        messages = check_messages(messages)
        try:
            return self._between(messages, last)
        except ValueError:
            renamed = with_our_ids(messages)
            if renamed == messages:
                raise
            return self._between(renamed, last)

    def _between(self, messages: list[dict[str, Any]], last: int | None) -> tuple[int, ...]:
        layout = self._layout(messages)
        ids = self._encoder.encode(self._written(layout, messages), strip=self._encoder.added[layout.end][2])
        return ids if last in layout.ends else (layout.end, *ids)

    def rewritten(self, before: Messages, messages: Messages, so_far: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return how much of a history the template keeps, and the ids that follow in place of the rest.

        The driver of episodes does not call this: it appends, also an opening. It is for drivers that rewrite.

        Args:
            before: the messages of the prompt and of all turns. Texts of assistants are encoded as plain text.
            messages: those that follow.
            so_far: ids of the prompt and of all that followed.

        Returns:
            Number of ids of `so_far` that stay, and the ids after them up to the assistant's next turn.

        Raises:
            ValueError: as from `between`.
        """
        messages = check_messages(messages)
        own = [i for i, m in enumerate(before) if m.get("role") == "assistant" and isinstance(m.get("content"), str)]
        chat = [dict(m) for m in before] + messages
        bodies = [*own, *range(len(before), len(chat))]
        ids = self._encoder.encode(self._pieces(chat, bodies))
        same = next(
            (i for i, (a, b) in enumerate(zip(so_far, ids, strict=False)) if a != b), min(len(so_far), len(ids))
        )
        return same, ids[same:]

    # ------------------------------------------------------------------------------------------------------ rendering

    def _render(self, messages: Sequence[Mapping[str, Any]], form: Form, generation: bool = True) -> str:
        """Return the text of a conversation.

        Raises:
            ValueError: the template refuses it.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    form.applied(messages), tokenize=False, add_generation_prompt=generation, **self._switch
                )
            )
        except Exception as error:  # templates raise exceptions of their own for roles they do not know
            raise ValueError(f"the chat template refuses the messages: {first_line(error)}") from error

    def _layout(self, messages: list[dict[str, Any]]) -> Layout:
        """Return what the template writes around the contents of messages of this form.

        Raises:
            ValueError: the template takes none of them.
        """
        key = tuple(tuple(sorted((k, v) for k, v in m.items() if k != "content")) for m in messages)
        found = self._layouts.pop(key, None)
        if found is None:
            try:
                found = self._new_layout(messages)
            except ValueError as error:
                found = str(error)
            if len(self._layouts) >= _KEPT:
                del self._layouts[next(iter(self._layouts))]
        self._layouts[key] = found  # as the last one used
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _new_layout(self, messages: list[dict[str, Any]]) -> Layout:
        """Return the layout of the first form of messages that the template takes.

        Raises:
            ValueError: it takes none; the reason is that of the first.
        """
        reason: ValueError | None = None
        for form in FORMS:
            try:
                return self._layout_in(form, messages)
            except ValueError as error:
                reason = reason or error
        assert reason is not None
        raise reason

    def _layout_in(self, form: Form, messages: list[dict[str, Any]]) -> Layout:
        head = dummy_before(messages)
        marks = [BODY.format(i) for i in range(len(messages))]
        whole = self._render([*head, *with_contents(messages, marks)], form)
        alone = self._render(head, form, generation=False)
        if ANSWER not in whole or ANSWER not in alone:
            what = "calls of tools" if "tool_calls" in head[-1] else "the assistant's turn"
            raise ValueError(f"the chat template does not show {what}")
        behind, closed = whole.rpartition(ANSWER)[2], alone.rpartition(ANSWER)[2]
        common = common_length(behind, closed)
        found = list(self._encoder.specials.finditer(behind))
        last = [m for m in found if m.end() <= common]
        # A template that ends the last turn with another token than earlier ones: what it writes for earlier ones.
        end = last[-1] if last else next(iter(found), None)
        if end is None or end.end() > first_mark(behind, marks):
            raise ValueError("the chat template puts no special token behind an assistant's turn")
        ends = {self._encoder.ids[end[0]]} | {
            self._encoder.ids[m[0]] for m in list(self._encoder.specials.finditer(closed))[-1:]
        }
        return Layout(
            form=form,
            head=tuple(head),
            pieces=split_at(behind[end.end() :], marks),
            before=whole[: len(whole) - len(behind) + end.end()],
            end=self._encoder.ids[end[0]],
            ends=frozenset(ends),
        )

    def _written(self, layout: Layout, messages: list[dict[str, Any]]) -> list[Piece]:
        """Return what the template writes behind the end of the turn, in pieces of its own and of the messages'."""
        marks = [BODY.format(i) for i in range(len(messages))]
        whole = layout.before + "".join(t + m for t, m in zip(layout.pieces, [*marks, ""], strict=True))
        pieces = [Piece(layout.pieces[0], ours=True)]
        for i, message in enumerate(messages):
            contents = [message["content"] if i == j else mark for j, mark in enumerate(marks)]
            said = self._render([*layout.head, *with_contents(messages, contents)], layout.form)
            pieces += [cut_content(said, whole, marks[i]), Piece(layout.pieces[i + 1], ours=True)]
        return pieces

    def _pieces(self, chat: list[dict[str, Any]], bodies: Sequence[int]) -> list[Piece]:
        """Return what the template writes for a whole conversation, the contents of `bodies` as pieces of their own."""
        marks = {index: BODY.format(n) for n, index in enumerate(bodies)}
        marked = [{**m, "content": marks[i]} if i in marks else m for i, m in enumerate(chat)]
        whole = self._render(marked, self._form)
        shown = [i for i in bodies if marks[i] in whole]  # a template may drop one
        texts = split_at(whole, [marks[i] for i in shown])
        pieces = [Piece(texts[0], ours=True)]
        for number, index in enumerate(shown):
            one = [dict(m) for m in marked]
            one[index]["content"] = chat[index]["content"]
            pieces += [
                cut_content(self._render(one, self._form), whole, marks[index]),
                Piece(texts[number + 1], ours=True),
            ]
        return pieces

    # ---------------------------------------------------------------------------------------------------------- proof

    def _prove(self) -> Iterable[Case]:
        for name, (turns, new) in _CASES.items():
            try:
                yield self._case(name, [dict(m) for m in turns], [dict(m) for m in new])
            except ValueError as error:
                yield Case(name, "refuse", str(error))

    def _case(self, name: str, turns: list[dict[str, Any]], new: list[dict[str, Any]]) -> Case:
        """Hold drawn ids and bridge against the ids of the whole conversation.

        Raises:
            ValueError: there is no bridge, or it is not what the template writes.
        """
        layout = self._layout(new)
        form, bridge = layout.form, self.between(new, layout.end)
        whole = self._render([*turns, *new], form)
        ids = self._encoder.encode_whole(whole)
        if ids[len(ids) - len(bridge) - 1 :] != (layout.end, *bridge):
            raise ValueError("the ids between two turns alone are others than in a whole rendering")
        # From here on by their texts: a tokenizer may join the last blank of a prompt with what the model draws.
        asked, answered = self._render(turns[:-1], form), self._render(turns, form, generation=False)
        if not answered.startswith(asked):
            return Case(name, "keep", "the template opens the assistant's turn otherwise once it is past")
        behind = "".join(piece.text for piece in self._written(layout, new))
        drawn = [
            answered[: found.end()]
            for found in self._encoder.specials.finditer(answered, len(asked))
            if self._encoder.ids[found[0]] in layout.ends
        ]
        # Where the template writes no end behind a last turn, the model still draws one.
        drawn = drawn or [answered + next(text for text, number in self._encoder.ids.items() if number == layout.end)]
        if whole not in [text + behind for text in drawn]:
            return Case(name, "keep", "the template writes an earlier turn otherwise than it was drawn")
        if form.calls != "all" and len(turns[-1].get("tool_calls", ())) > (form.calls == "one"):
            return Case(name, "keep", "the template does not show such calls; they stay as they were drawn")
        return Case(name, "append")


# Digits, which every tokenizer has.
_U: dict[str, Any] = {"role": "user", "content": "12"}
_A: dict[str, Any] = {"role": "assistant", "content": "34"}
_TA: dict[str, Any] = {**_A, "reasoning_content": "56"}
_CALLING = {"id": CALL_ID, "type": "function", "function": {"name": "tool", "arguments": {"x": "1"}}}
_C: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [_CALLING]}
_TC: dict[str, Any] = {**_C, "reasoning_content": "56"}
_CC: dict[str, Any] = {**_C, "tool_calls": [_CALLING, {**_CALLING, "id": "call00001"}]}
_T: dict[str, Any] = {"role": "tool", "name": "tool", "tool_call_id": CALL_ID, "content": "42"}

_CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "answer, user": ([_U, _A], [_U]),
    "two answers, user": ([_U, _A, _U, _A], [_U]),
    "thought and answer, user": ([_U, _TA], [_U]),
    "call, tool": ([_U, _C], [_T]),
    "two calls, two tools": ([_U, _CC], [_T, {**_T, "tool_call_id": "call00001", "content": "43"}]),
    "thought and call, tool": ([_U, _TC], [_T]),
    "calls one after the other, tool": ([_U, _C, _T, _C], [_T]),
}
_NEEDED = ("answer, user", "two answers, user")
_NEEDED_FOR_TOOLS = ("call, tool", "two calls, two tools", "calls one after the other, tool")
