"""Rehearse a checkpoint before a run begins: what is saved must load again as what was trained."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sapo.errors import ModelError
from sapo.model.policy import Policy
from sapo.utils.files import storage_failure
from sapo.utils.text import first_line

LARGEST_REHEARSED = 2 * 2**30
"""Bytes of weights up to which they are written and read. Of larger models all else is saved, and not the weights: what
keeps these from being saved (conversions, quantisation) is refused when a model is loaded."""


def rehearse_saving(policy: Policy) -> None:
    """Save a policy to a temporary directory and hold what was written against it, bit for bit.

    Raises:
        ModelError: it cannot be saved, or other weights, or under other names, would be loaded.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="sapo-rehearsal-") as place:
            directory = Path(place)
            if sum(t.nbytes for _, t in policy.weights()) <= LARGEST_REHEARSED:
                policy.save(directory)
                _compare(policy, directory)
            else:
                policy.model.config.save_pretrained(directory)
                if policy.model.generation_config is not None:
                    policy.model.generation_config.save_pretrained(directory)
                policy.tokenizer.save_pretrained(directory)
    except ModelError:
        raise
    except Exception as error:  # transformers and tokenizers raise what they please
        if storage_failure(error) is not None:
            raise
        raise ModelError(
            f"the model of {policy.source} cannot be saved, so that its first checkpoint would fail: "
            f"{first_line(error)}; mend its generation_config.json, config.json or tokenizer files"
        ) from error


def _compare(policy: Policy, directory: Path) -> None:
    if policy.adapter is not None:
        from peft import get_peft_model_state_dict

        trained: Mapping[str, Tensor] = get_peft_model_state_dict(policy.adapter, save_embedding_layers=False)
        written: Mapping[str, Tensor] = load_file(directory / "adapter_model.safetensors")
    else:
        trained, written = dict(policy.weights()), _loaded(policy, directory)
    for name, tensor in trained.items():
        found = written.get(name)
        same = found is not None and found.dtype == tensor.dtype and found.shape == tensor.shape
        if found is None or not same or not torch.equal(_bits(found), _bits(tensor.detach().cpu())):
            got = "none" if found is None else f"{found.dtype} of {tuple(found.shape)}" if not same else "other values"
            raise ModelError(
                f"a checkpoint of {policy.source} must load as what was saved; got {got} for {name}; use a model whose "
                "weights transformers saves as they are"
            )


def _loaded(policy: Policy, directory: Path) -> Mapping[str, Tensor]:
    """Load the weights that were saved by the class that saved them."""
    attention = policy.own_attention  # gpt-oss has no fused one
    model = type(policy.model).from_pretrained(directory, dtype=policy.dtype, attn_implementation=attention)
    return dict(_named(model))


def _named(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor
