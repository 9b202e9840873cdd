"""A mixture of experts is known by its config, also where it sees pictures; the configs are those that models save."""

from __future__ import annotations

import pytest

from sapo.model.mixtures import num_experts
from sapo.model.tiny import ARCHITECTURES, character_tokenizer, tiny_model
from sapo.model.tiny_vision import VISION_ARCHITECTURES, picture_tokenizer, tiny_vision_model

SHAPE = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "experts": 6}


@pytest.mark.parametrize("architecture", ARCHITECTURES + VISION_ARCHITECTURES)
def test_the_experts_of_every_architecture_are_read_from_its_saved_config(architecture: str) -> None:
    if architecture in VISION_ARCHITECTURES:
        model, _ = tiny_vision_model(architecture, picture_tokenizer("01"), seed=0, max_length=64, **SHAPE)
    else:
        ids = {"eos_token_id": 0, "pad_token_id": 1}
        model = tiny_model(architecture, len(character_tokenizer("01")), seed=0, max_length=64, **ids, **SHAPE)
    assert num_experts(model.config.to_dict()) == (6 if architecture.endswith(("_moe", "gpt_oss")) else 0)
