"""Write docs/models.md from the records of the last survey of decoder families: `python -m scripts.models`.

The records, docs/models.json, are made by `python -m trials.models --out docs/models.json` (tests/trials/models.py),
which `make trials` runs. tests/docs/test_made_pages.py holds the page current.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parents[1] / "docs" / "models.json"
PAGE = RECORDS.with_suffix(".md")

HEAD = """# Models

<!-- Made from docs/models.json by `python -m scripts.models`; do not edit. -->

Every decoder family of transformers {transformers} that can be built tiny, with random weights, was run beyond its
windows: two prompts behind a shared beginning, responses of 30, 25 and 1 tokens, at 41 to 73 tokens a sequence.
Log-probabilities of trainer and engine are held against the model's own forward (allowed: 1e-4 nats in float32), and
the gradient of all parameters against its gradient (allowed: 1e-3 of its norm). No checkpoint of these families was
trained for this table. `make trials` makes it anew.

<!-- skip: a list to choose from; tests/docs/test_pages.py holds its options and keys against the commands -->

    sapo doctor --model DIRECTORY          # how a model of your own is trained and decoded, and why

{counts}

- **packed**: all sequences of a micro-batch stand in one row without padding, and a prompt is computed once for all
  its responses.
- **states**: packed too; convolutions and recurrent states start each response where its prompt ended.
- **rows**: one padded row for each sequence, each with its prompt, by transformers' own code. Slower, and exact.
  Without pictures, routing replay, context parallelism and CUDA graphs.
- engine: *packed* is the local engine as docs/engines.md describes it; *rows* decodes with transformers' own cache;
  *whole rows* computes each sequence anew for every token, where that cache is not exact. vLLM: the class is in the
  registry of vLLM 0.32.0; which of them were tried with it is said in docs/engines.md.
- replay: `model.routing_replay` knows its router. pictures: the models around this decoder whose pictures are trained
  on (docs/vision.md).
- LoRA targets: the linear layers of the decoder by the last part of their names, for `model.lora.targets`.

What decides is not this table but a proof that every load makes: a prompt and two responses through the model one by
one and through the policy together, beyond the windows that its config names. One response is exchanged, and the rest
has to stay the same; the log-probabilities have to be the model's. The engine then draws a few tokens, which have to
have the log-probabilities of the trainer. A model that fails runs in rows, or is refused with the reason.

Sequences end where a rotary embedding would change for all their tokens (longrope:
`original_max_position_embeddings`; dynamic NTK: `max_position_embeddings`): beyond it one long row would change the
others of its micro-batch.

| family | path | engine | replay | vLLM | pictures | LoRA targets |
|---|---|---|---|---|---|---|
"""

VLLM = """
AXK1 Afmoe Apertus Bloom Cohere Cohere2 Cohere2Moe Dbrx DeepseekV2 DeepseekV3 DeepseekV32 DeepseekV4 Ernie4_5
Ernie4_5_Moe Exaone4 ExaoneMoe Falcon FalconH1 FalconMamba GPTJ Gemma Gemma2 Gemma3 Gemma3n Gemma4 Glm4 Glm4Moe
Glm4MoeLite GlmMoeDsa GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeSWA GraniteMoeShared GraniteSWA HYV3 HYV4
HrmText HyperCLOVAX Inkling Jamba KimiLinear Laguna Lfm2 Lfm2Moe Llama Llama4 LongcatFlash Mamba Mamba2 MiMoV2Flash
MiniCPM3 MiniMaxM2 Ministral3 Mistral Mixtral Nemotron NemotronH OPT OlmoHybrid Olmoe Phi3 Qwen2 Qwen2Moe Qwen3
Qwen3Moe Qwen3Next Qwen3_5 Qwen3_5Moe Qwen4Exp StableLm Zamba2
"""
"""Classes `...ForCausalLM` that vLLM 0.32.0 registers (vllm/model_executor/models/registry.py of that release, read in
2026-11), of those that transformers has."""

IN_VLLM = frozenset(f"{name}ForCausalLM" for name in VLLM.split()) | {"GPT2LMHeadModel"}

PICTURES = {
    "gemma3_text": "gemma3",
    "llama": "idefics3, smolvlm, llava",
    "qwen2": "qwen2_vl, qwen2_5_vl, internvl, llava",
    "qwen3": "qwen3_vl",
    "qwen3_moe": "qwen3_vl_moe",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
}
"""Decoder -> `model_type` of the vision-language models around it; those of sapo.model.vision_families.FAMILIES."""

ORDER = ("packed", "states", "rows", "refused", "wrong", "not built")


def verdict(record: dict[str, Any]) -> str:
    """Return what came of a family: one of ORDER."""
    if record["not_built"]:
        return "not built"
    if not record["path"]:
        return "refused"
    if record["path"] == "packed":
        return "states" if record["states"] else "packed"
    return str(record["path"])


def page(content: dict[str, Any]) -> str:
    """Return the page of a survey.

    Args:
        content: of docs/models.json.
    """
    records = sorted(content["families"], key=lambda r: (ORDER.index(verdict(r)), r["family"]))
    counts = Counter(verdict(r) for r in records)
    said = ", ".join(f"{counts[v]} {v}" for v in ORDER if counts[v])
    right = [r for r in records if r["path"]]
    table = [_row(r) for r in right]
    largest = [max(r[key] for r in right) for key in ("trainer_gap", "engine_gap", "gradient_gap")]
    text = HEAD.format(
        transformers=content["transformers"],
        counts=f"{len(records)} families: {said}. The largest differences among those that run: {largest[0]:.1e} nats "
        f"in the trainer, {largest[1]:.1e} in the engine, {largest[2]:.1e} of the gradient.",
    )
    text += "\n".join(table) + "\n\n## Why not packed\n\n| family | reason |\n|---|---|\n"
    text += "\n".join(f"| {r['family']} | {_escaped(r['reason'])} |" for r in right if r["reason"]) + "\n"
    refused = [r for r in records if verdict(r) == "refused"]
    text += "\n## Refused\n\n| family | reason |\n|---|---|\n"
    text += "\n".join(f"| {r['family']} | {_escaped(r['reason'])} |" for r in refused) + "\n"
    missing = [r for r in records if r["not_built"]]
    text += "\n## Not built\n\nTransformers made no tiny model of these from their config alone, or it gave no answer "
    text += "in time. This table knows nothing of them.\n\n"
    return text + "\n".join(f"- {r['family']}: {_escaped(r['not_built'])}" for r in missing) + "\n"


def _row(record: dict[str, Any]) -> str:
    cells = (
        record["family"],
        verdict(record),
        record["engine"],
        "yes" if record["replay"] else "",
        "yes" if record["model"] in IN_VLLM else "",
        PICTURES.get(record["family"], ""),
        " ".join(record["targets"]),
    )
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(json.loads(RECORDS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
