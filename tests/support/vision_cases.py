"""Tiny vision-language models of every family, with weights that tell a wrong position, place or picture at once."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3_5Config,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from sapo.data import Prompt
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer
from sapo.model.tiny_vision import picture_tokenizer, tiny_image_processor, tiny_vision_model
from sapo.model.vision_families import FAMILIES, Family
from sapo.rollout.prompting import PromptFormat
from support.pictures import picture
from support.plain_models import plain_copy

ALPHABET = "0123456789+-*=?abcdefgh \n"

FAMILY_NAMES = (
    *("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen2_5_vl", "qwen2_vl"),
    *("smolvlm", "idefics3", "internvl", "llava"),
)

MARKS = {
    "smolvlm": ("<image>", "<fake_token_around_image>", "<global-img>"),
    "internvl": ("<IMG_CONTEXT>", "<img>", "</img>"),
    "llava": ("<image>",),
    "gemma3": ("<image_soft_token>",),
}
MARKS["idefics3"] = MARKS["smolvlm"]


WIDE, SQUARE, SMALL = picture(1, 48, 32), picture(2, 32, 32), picture(3, 40, 24)


def make_vision_policy(name: str = "qwen3_vl", gain: float = 3.0, **options: Any) -> Policy:
    """A policy of a family whose answers depend on every token it may see, and on every pixel."""
    model, family = make_vision_model(name, gain, **options)
    return prepare_policy(model, family.tokenizer, family)


def make_vision_model(name: str, gain: float = 3.0, **options: Any) -> tuple[Any, Family]:
    if name in ("qwen3_vl", "qwen3_vl_moe"):
        tokenizer = picture_tokenizer(ALPHABET)
        model, family = tiny_vision_model(name, tokenizer, seed=0, **{"hidden_size": 48, **options})
    else:
        tokenizer = _tokenizer(name)
        config, processor = _MAKERS[name](tokenizer)
        if options.pop("one_head", False):
            _give_one_head(config.get_text_config())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        family = FAMILIES[name](model.config, processor, tokenizer)
    if name == "qwen3_vl_moe":
        model.set_experts_implementation("eager")  # torch's grouped product rounds by the batch
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in parameter_name:
                parameter.mul_(gain)
    return model, family


def save_vision_model(name: str, directory: Any) -> None:
    """An ordinary directory, as transformers would write it."""
    model, family = make_vision_model(name)
    model.save_pretrained(directory)
    family.processor.save_pretrained(directory)
    family.tokenizer.save_pretrained(directory)


def shown(policy: Policy, text: str, *pictures: Any, prompt_id: int = 0) -> Prompt:
    """An encoded prompt in plain text, its pictures at the markers or before it."""
    prompt = Prompt(prompt_id, "test", text, pictures=tuple(pictures))
    return PromptFormat(style="plain").encode(policy, [prompt])[0]


def mixed_prompts(policy: Policy) -> list[Prompt]:
    """Two pictures within text, text alone, and one picture before its text: what one packed row can hold."""
    return [
        shown(policy, "1+<image>=<image>?", WIDE, SQUARE, prompt_id=1),
        shown(policy, "12+3=", prompt_id=2),
        shown(policy, "ab", SMALL, prompt_id=3),
    ]


class OwnForward:
    """The policy's transformers model at its present weights, which sees one plain sequence at a time.

    transformers looks for pictures by token id, and fails where a response has an image token. So every token id of a
    response is written as that plus the vocabulary's size, with the same embedding: the model then computes the same of
    text, and an image token is no other token than any.
    """

    def __init__(self, policy: Policy) -> None:
        self.vision = policy.vision
        self.model = plain_copy(policy.model)
        embedding = self.model.get_input_embeddings()
        self.vocabulary = len(embedding.weight)
        embedding.weight = torch.nn.Parameter(torch.cat([embedding.weight.detach()] * 2))

    def logits(self, prompt: Prompt, completion_ids: Any) -> torch.Tensor:
        """(T, V) logits of a completion's tokens, tower included."""
        ids = torch.tensor([[*prompt.token_ids, *(i + self.vocabulary for i in completion_ids)]])
        inputs: dict[str, Any] = {}
        if prompt.pictures:
            each = [self.vision.pixels(p) for p in prompt.pictures]
            along = 1 if "pixel_attention_mask" in each[0] else 0
            inputs = {name: torch.cat([p[name] for p in each], dim=along) for name in each[0]}
            inputs |= self.vision.family.own_inputs(ids)
        first = len(prompt.token_ids) - 1
        return self.model(input_ids=ids, use_cache=False, **inputs).logits[0, first : first + len(completion_ids)]

    def logprobs(self, prompt: Prompt, completion_ids: Any) -> torch.Tensor:
        """(T,) log-probabilities of a completion's tokens at temperature 1."""
        logp_TV = torch.log_softmax(self.logits(prompt, completion_ids).float(), dim=-1)
        return logp_TV[range(len(completion_ids)), list(completion_ids)]

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients by the names of the policy's parameters."""
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.model.named_parameters()}
        (name,) = (n for n, p in self.model.named_parameters() if p is self.model.get_input_embeddings().weight)
        found[name] = found[name][: self.vocabulary] + found[name][self.vocabulary :]
        padding = self.model.get_input_embeddings().padding_idx
        if padding is not None:  # an embedding gives the padding token no gradient
            found[name][padding] = 0
        return found


def _tokenizer(name: str) -> Any:
    if name.startswith("qwen"):
        return picture_tokenizer(ALPHABET)
    tokenizer = character_tokenizer(ALPHABET)
    marks = [*MARKS[name]]
    if name in ("smolvlm", "idefics3"):
        marks += [f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)]
    tokenizer.add_tokens([AddedToken(m, special=True, normalized=False) for m in marks], special_tokens=True)
    return tokenizer


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        **more,
    }


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def _give_one_head(text: Any) -> None:
    """Twice as wide a head, 32 channels."""
    text.num_attention_heads, text.head_dim = 1, 32
    rope = text.rope_parameters
    if "mrope_section" in rope:
        rope["mrope_section"] = [2 * pairs for pairs in rope["mrope_section"]]


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image", "video", "vision_start", "vision_end")
    return {f"{k}_token_id": tokenizer.convert_tokens_to_ids(f"<|{n}|>") for k, n in zip(keys, names, strict=True)}


def _qwen3_5(tokenizer: Any) -> tuple[Any, Any]:
    # Half of each head turns, by three positions.
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    text = _text(
        tokenizer,
        rope_parameters=rope,
        layer_types=["linear_attention", "full_attention"],
        **{"linear_num_key_heads": 1, "linear_num_value_heads": 2},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    )
    tower = {
        **{"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48},
        **{"num_position_embeddings": 16, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 1},
    }
    config = Qwen3_5Config(text_config=text, vision_config=tower, **_qwen_ids(tokenizer))
    config.tie_word_embeddings = False
    return config, tiny_image_processor(8)


def _qwen2(tokenizer: Any, kind: Any) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    ids = _qwen_ids(tokenizer)
    if kind is Qwen2VLConfig:
        tower = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    else:
        tower = {
            **{"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48},
            **{"window_size": 32, "fullatt_block_indexes": [1]},
        }
    tower |= {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 1}
    config = kind(text_config=_text(tokenizer, rope_parameters=rope), vision_config=tower, **ids)
    config.tie_word_embeddings = False
    return config, tiny_image_processor(8)


def _idefics(tokenizer: Any, kind: Any, processor: Any) -> tuple[Any, Any]:
    config = kind(
        text_config=LlamaConfig(**_text(tokenizer)).to_dict(),
        vision_config={**TOWER, "image_size": 16, "patch_size": 4},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return config, processor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})


def _internvl(tokenizer: Any) -> tuple[Any, Any]:
    config = InternVLConfig(
        text_config=Qwen2Config(**_text(tokenizer)).to_dict(),
        vision_config={**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )
    return config, GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=4)


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    config = LlavaConfig(
        text_config=LlamaConfig(**_text(tokenizer)).to_dict(),
        vision_config=CLIPVisionConfig(**TOWER, image_size=16, patch_size=4, projection_dim=32).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    return config, LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    config = Gemma3Config(
        text_config=_text(tokenizer, query_pre_attn_scalar=16, sliding_window=64),
        vision_config=SiglipVisionConfig(**TOWER, image_size=16, patch_size=4, vision_use_head=False).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
    )
    return config, Gemma3ImageProcessorPil(size={"height": 16, "width": 16})


_MAKERS = {
    "qwen3_5": _qwen3_5,
    "qwen2_vl": lambda t: _qwen2(t, Qwen2VLConfig),
    "qwen2_5_vl": lambda t: _qwen2(t, Qwen2_5_VLConfig),
    "smolvlm": lambda t: _idefics(t, SmolVLMConfig, SmolVLMImageProcessorPil),
    "idefics3": lambda t: _idefics(t, Idefics3Config, Idefics3ImageProcessorPil),
    "internvl": _internvl,
    "llava": _llava,
    "gemma3": _gemma3,
}
