"""LoRA through peft: small trained matrices beside frozen weights (https://arxiv.org/abs/2106.09685).

The adapter lives inside the policy's own modules, so the trainer differentiates through it without a copy. In float32
the engine samples with its product folded into a copy of the weights (`folds`, `folded_weight`), made anew for each
batch: the same function, summed in another order; otherwise with the adapter as it is. A checkpoint holds the adapter
alone, in peft's layout, and names the model it belongs to; `merged` folds it into the weights for export.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sapo.errors import ModelError
from sapo.utils.text import first_line

ADAPTER_FILE = "adapter_config.json"


def add_adapter(policy: Any, *, rank: int, alpha: float, targets: str | Sequence[str], seed: int) -> None:
    """Give a policy a new adapter, the identity at first, and freeze everything else.

    Args:
        policy: a Policy without adapter; changed in place.
        rank, alpha: the update is alpha / rank x B A with A of `rank` rows.
        targets: "all-linear" (every linear layer but the output embedding) or names of modules.
        seed: of A; B starts at 0.

    Raises:
        ModelError: peft is missing, a name matches nothing, or the output embedding is among the targets.
    """
    peft = _peft()
    chosen = targets if isinstance(targets, str) else list(targets)
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=chosen, task_type="CAUSAL_LM", bias="none"
    )
    policy.model.name_or_path = policy.source
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapter = _quietly(lambda: peft.get_peft_model(policy.model, settings))
        except ValueError as error:
            raise ModelError(f"model.lora.targets {chosen!r} fit no layer: {first_line(error)}") from error
    adapter.peft_config["default"].revision = policy.revision
    _install(policy, adapter)


def install_adapter(policy: Any, settings: dict[str, Any]) -> None:
    """Give a policy without weights an adapter by peft's own description of it (`PeftConfig.to_dict`)."""
    peft = _peft()
    known = {k: v for k, v in settings.items() if k != "peft_version"}
    _install(policy, _quietly(lambda: peft.get_peft_model(policy.model, peft.LoraConfig(**known))))


def load_adapter(policy: Any, directory: Path) -> None:
    """Give a policy the adapter saved in a directory, ready to be trained further.

    Raises:
        ModelError: peft is missing, or the adapter does not fit the model.
    """
    peft = _peft()
    try:
        adapter = _quietly(lambda: peft.PeftModel.from_pretrained(policy.model, str(directory), is_trainable=True))
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"the adapter in {directory} does not fit its model: {first_line(error)}") from error
    _install(policy, adapter)


def adapter_base(directory: Path) -> tuple[str, str | None]:
    """Return the path or hub id of the model an adapter belongs to, and its revision.

    Raises:
        ModelError: the adapter does not say.
    """
    settings = _peft().PeftConfig.from_pretrained(str(directory))
    if not settings.base_model_name_or_path:
        raise ModelError(f"{directory / ADAPTER_FILE} does not name its model: set base_model_name_or_path")
    return str(settings.base_model_name_or_path), settings.revision


@contextmanager
def adapter_off(policy: Any) -> Iterator[None]:
    """Switch the adapter off for as long as the block lasts."""
    with policy.adapter.disable_adapter():
        yield


def merged(policy: Any) -> Any:
    """Return the policy's transformers model with the adapter folded into its weights; the policy is used up.

    Merged products round differently from unmerged ones, by about the precision of the weights.
    """
    return policy.adapter.merge_and_unload()


def is_adapted(module: Any) -> bool:
    """Return whether a module is one of peft's around a linear layer."""
    return type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear"


def folds(module: Any) -> bool:
    """Return whether an adapted linear layer is W + s B A and nothing else, so that `folded_weight` holds."""
    names = module.active_adapters
    return (
        not module.merged
        and len(names) == 1
        and names[0] in module.lora_A
        and type(module.get_base_layer()) is torch.nn.Linear
        and not module.lora_variant
        and not any(module.lora_bias.values())
        and isinstance(module.lora_dropout[names[0]], torch.nn.Identity)
    )


def unfoldable(policy: Any) -> str | None:
    """Return the name of a module whose adapter does not fold into the weight of a linear layer; None without one.

    Adapters of experts and routers are such: peft wraps their parameters, and not a layer.
    """
    for name, module in policy.model.named_modules():
        adapts = type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer")
        if adapts and not (is_adapted(module) and folds(module)):
            return str(name)
    return None


def folded_weight(module: Any) -> torch.Tensor:
    """Return the (out, in) weight of a linear layer, with the product of a foldable adapter added in a copy."""
    if not is_adapted(module):
        return module.weight.detach()
    weight: torch.Tensor = module.get_base_layer().weight.detach()
    if module.disable_adapters:
        return weight
    return weight + module.get_delta_weight(module.active_adapters[0]).detach()


def folded_weights(policy: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights by the names they have without an adapter, its product added in a copy, one layer at a time.

    Args:
        policy: its adapter is one that folds, or it has none.
        weights: every parameter by the policy's own name, as `Policy.weights` yields them.
    """
    adapted = {name: module for name, module in policy.model.named_modules() if is_adapted(module)}
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        layer, part = _adapted_part(name)
        if layer not in adapted:
            yield name, tensor
        elif part == "bias":
            yield f"{layer}.bias", tensor
        else:
            parts = waiting.setdefault(layer, {})
            parts[part] = tensor
            if len(parts) == 3:
                yield f"{layer}.weight", _folded(adapted[layer], **waiting.pop(layer))
    assert not waiting, f"weights of an adapted layer are missing: {sorted(waiting)[0]}"


def _adapted_part(name: str) -> tuple[str, str]:
    """Split the name of a parameter of an adapted layer: the layer, and base, a, b or bias; others give nothing."""
    infixes = {".base_layer.weight": "base", ".base_layer.bias": "bias", ".lora_A.": "a", ".lora_B.": "b"}
    for infix, part in infixes.items():
        layer, found, _ = name.partition(infix)
        if found:
            return layer, part
    return "", ""


def _folded(module: Any, base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if module.disable_adapters:
        return base
    product = (b.float() @ a.float()) * module.scaling[module.active_adapters[0]]
    return (base.float() + product).to(base.dtype)


def _install(policy: Any, adapter: Any) -> None:
    head = policy.model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or type(head) is not torch.nn.Linear:
        raise ModelError(
            "model.lora.targets must leave the output embedding out: the policy head multiplies it itself; "
            "use all-linear or name attention and MLP layers"
        )
    policy.adapter = adapter
    policy.make_deterministic()


def _peft() -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ModelError("LoRA needs the extra lora; pip install 'sapo-rl[lora]'")
    import peft

    return peft


def _quietly(make: Any) -> Any:
    """Silence peft's warnings about patterns that it adds itself for mixtures of experts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return make()
