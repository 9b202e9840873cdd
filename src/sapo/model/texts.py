"""The text side of a policy: prompts to token ids, and token ids to what a person or a verifier reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sapo.data import Prompt
from sapo.errors import ModelError
from sapo.utils.text import first_line

# The steps of a tokenizer's normalizer, as the library writes them down, and those of SentencePiece's kind.
_STEP = re.compile(r"\b([A-Z]\w+)\(")
_MARKS_BLANKS = {"Sequence", "Prepend", "Replace", "String"}


class TextSide:
    """What a policy does with its tokenizer.

    Args:
        model: a transformers decoder, whose embeddings have a row for each token.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._token_texts: list[str] | None = None

    @property
    def head_weight(self) -> Tensor:
        """Return the (V, H) output embedding."""
        return self.model.get_output_embeddings().weight

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode a prompt in plain text to token ids.

        Raises:
            ModelError: when the tokenizer has no token for a part of it.
        """
        try:
            opened = bool(self.tokenizer.bos_token) and text.startswith(str(self.tokenizer.bos_token))
            ids = self.tokenizer(text, add_special_tokens=not opened)["input_ids"]
        except Exception as error:  # the tokenizers library raises bare Exception for a character it does not know
            raise ModelError(f"the tokenizer cannot encode the prompt {text!r}: {error}") from error
        eos = self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] == eos and not text.endswith(str(self.tokenizer.eos_token)):
            ids = ids[:-1]  # what a tokenizer appends would end the prompt before its completion
        if not ids:
            raise ModelError(f"a prompt must have at least one token; got none from {text!r}")
        return self._within_embedding(ids)

    def _within_embedding(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Refuse a token that the embedding has no row for."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        if (largest := max(ids)) >= rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ModelError(
                f"the tokenizer must have no more tokens than the embedding has rows; got token {largest} ({token!r}) "
                f"with {rows} rows; resize the embedding (resize_token_embeddings), or use the model's own tokenizer"
            )
        return tuple(ids)

    @property
    def has_chat_template(self) -> bool:
        """Return whether the tokenizer brings a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def tokens_per_byte(self) -> int | None:
        """Return how many tokens a byte of text becomes at most, None where the tokenizer promises nothing.

        BPE that begins with a symbol for every byte, or falls back to bytes, refuses no text, and merges only shorten
        it.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or type(backend.model).__name__ != "BPE":
            return None
        if len(self.tokenizer) > self.model.get_input_embeddings().weight.shape[0]:
            return None
        steps = repr(backend.normalizer)
        if backend.model.byte_fallback and "\u2581" in steps and set(_STEP.findall(steps)) <= _MARKS_BLANKS:
            return 1  # a mark in place of each blank, and one before the text
        if "ByteLevel(" not in repr(backend.pre_tokenizer):
            return None
        if backend.normalizer is None:
            return 1
        # NFC makes at most three times as many bytes, of musical symbols (Unicode Standard Annex 15).
        return 3 if type(backend.normalizer).__name__ == "NFC" else None

    def encode_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[int, ...]:
        """Encode a chat to token ids by the tokenizer's chat template, ready for the assistant's turn.

        Args:
            messages: each with a role and a content.
            thinking: the template's switch; None leaves it alone.
            tools: functions that the template offers to the model.

        Raises:
            ModelError: no chat template, one without that switch or without a place for tools, or one that refuses the
                messages.
        """
        return self._within_embedding(
            self._through_template(messages, thinking, tools, tokenize=True, return_dict=False)
        )

    def render_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the text that `encode_messages` encodes.

        Raises:
            ModelError: as from `encode_messages`.
        """
        return str(self._through_template(messages, thinking, tools, tokenize=False))

    def _through_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool | None,
        tools: Sequence[Mapping[str, Any]] | None,
        **output: bool,
    ) -> Any:
        if not self.has_chat_template:
            raise ModelError(
                "the prompt is a list of chat messages but the tokenizer has no chat template; "
                "give prompts as plain text (prompt.style=plain) or a model with a template"
            )
        switch: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        if switch and "enable_thinking" not in str(self.tokenizer.chat_template):
            raise ModelError(
                f"prompt.thinking={str(thinking).lower()} needs a chat template with a switch (enable_thinking); "
                "this tokenizer's has none; leave prompt.thinking out"
            )
        if tools:
            if "tools" not in str(self.tokenizer.chat_template):
                raise ModelError(
                    "the row brings tools and the tokenizer's chat template has no place for them; give a model with "
                    "such a template, or drop the column tools (drop_fields)"
                )
            switch["tools"] = list(tools)
        try:
            answered = bool(messages) and messages[-1].get("role") == "assistant"  # continued, and not answered again
            return self.tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=not answered,
                continue_final_message=answered,
                **output,
                **switch,
            )
        except Exception as error:  # templates raise exceptions of their own for roles they do not know
            raise ModelError(f"the chat template refuses the messages: {first_line(error)}") from error

    def token_texts(self) -> list[str]:
        """Return the text each token of the vocabulary adds to a completion, special tokens as nothing.

        Read behind another token, since decoders drop the blank that a text begins with.
        """
        if self._token_texts is None:
            vocabulary = range(self.head_weight.shape[0])
            # A decoder that puts blanks between words has no token that doubles: any plain one is a frame there.
            plain = [i for i in vocabulary if _is_plain(self.decode([i]))]
            doubling = (i for i in plain if self.decode([i, i]) == 2 * self.decode([i]))
            frame = next(doubling, plain[0] if plain else None)
            ids = [[i] if frame is None else [frame, i] for i in vocabulary]
            before = 0 if frame is None else len(self.decode([frame]))
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            self._token_texts = [text[before:] for text in texts]
        return self._token_texts

    def special_texts(self) -> dict[int, str]:
        """Return the special tokens that the model can draw, by id, as they are spelled."""
        size = self.head_weight.shape[0]
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        found = {i: str(token.content) for i, token in added.items() if token.special}
        found |= dict(zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True))
        return {i: text for i, text in found.items() if i < size and text}

    def end_of_turn(self) -> tuple[int, str] | None:
        """Return the special token that the chat template puts behind an assistant's turn; None where it puts none."""
        if not self.has_chat_template:
            return None
        answer = "forty-two"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        try:
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # a template that refuses such a chat says so where one is encoded
            return None
        behind = text.rpartition(answer)[2].lstrip()
        ends = [(i, special) for i, special in self.special_texts().items() if behind.startswith(special)]
        return max(ends, key=lambda found: len(found[1])) if ends else None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode a completion without its special tokens: for verifiers and logs only."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def show(self, token_ids: Sequence[int]) -> str:
        """Decode tokens with the special ones spelled out: what the model saw, for a person to read."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def show_prompt(self, prompt: Prompt) -> str:
        """Decode a prompt as `show` does, the tokens of each picture as one mark with its size in pixels."""
        if prompt.picture_tokens is None:
            return self.show(prompt.token_ids)
        text, start = "", 0
        for picture, places in zip(prompt.pictures, prompt.picture_tokens.places, strict=True):
            width, height = picture.size
            text += f"{self.show(prompt.token_ids[start : places[0]])}<picture {width}x{height}, {len(places)} tokens>"
            start = places[-1] + 1
        return text + self.show(prompt.token_ids[start:])


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and text != "" and " " not in text
