"""The recipes for vision-language models: of the paper's size with a stand-in, and of the size of a laptop."""

from __future__ import annotations

import json
from pathlib import Path

from sapo.config.recipes import load_recipe
from sapo.model.tiny_vision import picture_tokenizer, tiny_vision_model
from sapo.workflows.comparing.config import load_comparison
from sapo.workflows.train import dry_run
from support.pictures import encoded, noise

CHAT = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}="
)


def stand_in(directory: Path) -> Path:
    """Save a tiny model of the architecture of Qwen3-VL-30B-A3B, with a chat template that takes parts."""
    tokenizer = picture_tokenizer("".join(map(chr, range(32, 127))) + "\n")
    tokenizer.chat_template = CHAT
    shape = {"hidden_size": 32, "heads": 2, "kv_heads": 1, "intermediate_size": 16, "max_length": 20_000}
    model, family = tiny_vision_model("qwen3_vl_moe", tokenizer, seed=0, **shape)
    for part in (model.bfloat16(), family.processor, tokenizer):
        part.save_pretrained(directory)
    return directory


def test_a_stand_in_of_the_architecture_passes_the_dry_run_of_the_papers_recipe(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(20):
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded(noise(i, 48, 32)))
    rows = [{"prompt": f"<image>{i} or {i}?", "answer": str(i), "images": [f"images/{i % 20}.png"]} for i in range(300)]
    (tmp_path / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"{i}+{i}?", "answer": str(2 * i)} for i in range(300)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [
        f"model.path={stand_in(tmp_path / 'model')}",
        f"tasks.0.path={tmp_path / 'pictures.jsonl'}",
        f"tasks.1.path={tmp_path / 'text.jsonl'}",
        f"run_dir={tmp_path / 'run'}",
        "threads=1",
        "device=cpu",
    ]
    seen = dry_run(load_recipe("qwen3_vl_30b_a3b_sapo", changes))
    assert seen.model.startswith("Qwen3VLMoeForConditionalGeneration")
    shown = {p.task: p.text for p in seen.prompts}
    assert shown["pictures"].startswith("<|vision_start|><picture 48x32, 6 tokens><|vision_end|>")
    assert shown["text"].endswith("\\boxed{}.=")
    assert "pixels of pictures" in str(seen.memory.phases)
    assert not (tmp_path / "run").exists()


def test_the_settings_are_the_papers() -> None:
    config = load_recipe("qwen3_vl_30b_a3b_sapo")
    # arXiv 2511.20347: temperatures, two mini-batches, no KL penalty; SAPO needs no routing replay.
    assert config.objective.hyperparameters == {"tau_pos": 1.0, "tau_neg": 1.05}
    assert config.train.minibatches == 2
    assert config.objective.kl is None
    assert config.model.routing_replay is False


def test_the_comparison_of_fig_6_has_the_papers_arms_and_two_minibatches() -> None:
    comparison = load_comparison("paper_fig6")
    assert list(comparison.arms) == ["sapo", "gspo", "grpo_r2"]
    assert comparison.arms["grpo_r2"]["model.routing_replay"] == "R2"
    assert load_recipe("vision_quickstart").train.minibatches == 2
