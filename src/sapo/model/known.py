"""Configs of models without their weights: of a local directory, or of a few published models by name.

What is here by name are the dimensions that a plan needs. They are those of the models' config.json on the Hugging Face
hub: https://huggingface.co/Qwen/Qwen3-4B, Qwen3-30B-A3B and Qwen3-235B-A22B, read in 2026-11 through the copies in
slime's scripts/models and MindSpeed-RL's configs/model. tests/model/test_known.py holds the parameter counts against
those of the model cards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from sapo.errors import ModelError
from sapo.utils.names import did_you_mean
from sapo.utils.text import first_line

_QWEN3: dict[str, Any] = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40_960,
    "attention_bias": False,
}
_MIXTURE: dict[str, Any] = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "model_type": "qwen3",
        **_QWEN3,
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 9728,
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        **_QWEN3,
        **_MIXTURE,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "tie_word_embeddings": False,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe",
        **_QWEN3,
        **_MIXTURE,
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "intermediate_size": 12_288,
        "moe_intermediate_size": 1536,
        "tie_word_embeddings": False,
    },
}
"""Name without owner and without the ending -Base, in lower case -> what its config.json says."""


def model_config(source: str) -> Any:
    """Return the transformers config of a model. Nothing is downloaded and no weights are read.

    Args:
        source: a local directory with a config.json, or the name of a model of `KNOWN_MODELS`, with or without its
            owner and the ending -Base.

    Raises:
        ModelError: neither of the two.
    """
    directory = Path(source)
    if (directory / "config.json").is_file():
        try:
            return AutoConfig.from_pretrained(directory, local_files_only=True)
        except (ValueError, OSError, KeyError) as error:
            raise ModelError(f"{directory / 'config.json'} cannot be read: {first_line(error)}") from error
    name = source.rpartition("/")[2].lower().removesuffix("-base")
    if name.endswith(".gguf"):
        raise ModelError(
            f"a model's dimensions are read from a directory with a config.json; got {source!r}, a file that is loaded "
            "for that; `sapo train RECIPE --dry-run` does so, and estimates its memory"
        )
    if directory.is_dir() or name not in KNOWN_MODELS:
        raise ModelError(
            "a model's dimensions are read from a local directory with a config.json, and those of "
            f"{', '.join(KNOWN_MODELS)} are known by name; got {source!r}, which is neither; save its config.json in a "
            f"directory and set model.path=DIRECTORY{did_you_mean(name, KNOWN_MODELS)}"
        )
    return AutoConfig.for_model(**KNOWN_MODELS[name])
