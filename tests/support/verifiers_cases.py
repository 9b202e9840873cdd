"""A model that tests of verifiers play with: characters, and a chat template without ornaments."""

from __future__ import annotations

from typing import Any

import torch

from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer, tiny_model
from support.trainer_cases import ALPHABET

TEMPLATE = "{% for m in messages %}{{ m.content or '' }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"


def chat_policy(seed: int = 0, hidden: int = 32, dtype: torch.dtype = torch.float32, **options: Any) -> Policy:
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.chat_template = TEMPLATE
    shape: dict[str, Any] = {"hidden_size": hidden, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 64}
    model = tiny_model(
        "qwen3",
        len(tokenizer),
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_length=128,
        **{**shape, **options},
    )
    return prepare_policy(model.to(dtype), tokenizer)
