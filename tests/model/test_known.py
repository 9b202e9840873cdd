"""Models known by name have the sizes that their cards state, and no others are guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sapo.errors import ModelError
from sapo.model.known import model_config
from support.runs import write_model


@pytest.mark.parametrize(
    ("name", "total", "without_embeddings"),
    # In billions, from the model cards of https://huggingface.co/Qwen; a tied embedding counts once.
    [("Qwen/Qwen3-4B", 4.0, 3.6), ("Qwen/Qwen3-30B-A3B-Base", 30.5, 29.9), ("Qwen3-235B-A22B", 235.0, 234.0)],
)
def test_a_model_known_by_name_has_the_parameters_of_its_card(
    name: str, total: float, without_embeddings: float
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(name))
    embeddings = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    counted = sum(p.numel() for p in model.parameters())
    rounding = 0.5 if total > 100 else 0.05
    assert counted / 1e9 == pytest.approx(total, abs=rounding)
    assert (counted - sum(embeddings.values())) / 1e9 == pytest.approx(without_embeddings, abs=rounding)


def test_a_directory_with_a_config_alone_is_enough(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", "qwen3_moe")
    for file in directory.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert model_config(str(directory)).model_type == "qwen3_moe"


@pytest.mark.parametrize("source", ["Qwen/Qwen3-5B", "somebody/unknown", "."])
def test_other_models_are_refused_in_one_line_and_not_downloaded(source: str) -> None:
    with pytest.raises(ModelError, match=r"local directory with a config\.json.*model\.path=DIRECTORY") as refused:
        model_config(source)
    assert "\n" not in str(refused.value)
    assert ("did you mean 'qwen3-4b'" in str(refused.value)) == (source == "Qwen/Qwen3-5B")


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        model_config(str(tmp_path))
