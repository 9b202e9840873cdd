"""Tokenizers with the chat templates of models: TRL's copies of these, over a small byte-level BPE."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_SPECIAL = re.compile(
    r"<[|｜][^\s'\"{}]*?>|<[^\s'\"{}]*?[|｜]>|<\w+_of_\w+>|<end_of_utterance>|\[/?[A-Z_]+\]|<bos>|<eos>|</?s>"
)
"""What the templates' special tokens look like."""

_CORPUS = (
    "the user asked a tool and the tool said 42\n\n  assistant user system tool\n",
    '{"name": "calculator", "arguments": {"expression": "37 * 52"}}\n</tool_call>\n<tool_response>\n',
    "<|im_end|>\n<|im_start|>system\nqzbody qzanswer qzquestion",
)


def trl_templates() -> dict[str, str]:
    """Return the chat templates in TRL's wheel by name; none where it is not installed."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return {}
    directory = Path(found.origin).parent / "chat_templates"
    return {path.stem: path.read_text() for path in sorted(directory.glob("*.jinja"))}


@cache
def _merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a BPE that joins blanks and letters, so that a wrong border shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def bpe_tokenizer(template: str, *specials: str | AddedToken) -> Any:
    """Make a byte-level BPE tokenizer with a chat template and the special tokens that it writes."""
    vocabulary, merges = _merges()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    named = {str(special) for special in specials}
    found = sorted(set(_SPECIAL.findall(template)) - named)
    made.add_special_tokens({"additional_special_tokens": [*found, *specials]})
    made.chat_template = template
    return made
