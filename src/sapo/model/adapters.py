"""LoRA through peft: small trained matrices beside frozen weights (https://arxiv.org/abs/2106.09685).

The adapter lives inside the policy's own modules, so the trainer differentiates through it without a copy. In float32
the engine samples with its product folded into a copy of the weights (`folds`, `folded_weight`), made anew for each
batch: the same function, summed in another order; otherwise with the adapter as it is. A checkpoint holds the adapter
alone, in peft's layout, and names the model it belongs to; `merged` folds it into the weights for export.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sapo.errors import ModelError
from sapo.utils.text import first_line

ADAPTER_FILE = "adapter_config.json"


def add_adapter(
    policy: Any,
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str],
    seed: int,
    mixture: str = "all",
    vision: str = "none",
) -> None:
    """Give a policy a new adapter, the identity at first, and freeze everything else.

    Args:
        policy: a Policy without adapter; changed in place.
        rank, alpha: the update is alpha / rank x B A with A of `rank` rows.
        targets: "all-linear" (every linear layer but the output embedding) or names of modules.
        mixture: what all-linear includes of a mixture of experts: all, experts, router or none.
        seed: of A; B starts at 0.
        vision: part of the vision tower that gets adapters as well: none, merger or tower.

    Raises:
        ModelError: peft is missing, a name matches nothing, or the output embedding is among the targets.
    """
    peft = _peft()
    chosen = targets if isinstance(targets, str) else list(targets)
    parts = mixture_parts(policy.model) if chosen == "all-linear" else None
    modules, parameters = (chosen, None) if parts is None else parts.chosen(mixture)
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
        bias="none",
    )
    settings.exclude_modules = _left_out(policy, vision)
    policy.model.name_or_path = policy.source
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapter = _quietly(lambda: peft.get_peft_model(policy.model, settings), spelled_out=parts is not None)
        except ValueError as error:
            raise ModelError(f"model.lora.targets {chosen!r} fit no layer: {first_line(error)}") from error
    adapter.peft_config["default"].revision = policy.revision
    _install(policy, adapter)


@dataclass(frozen=True)
class MixtureParts:
    """Name what can be adapted in a mixture of experts, by the names that are the same in all layers."""

    linear: tuple[str, ...]
    """Linear layers that every token goes through: attention, dense layers, shared experts."""
    experts: tuple[str, ...]
    """Parameters (experts, ., .) of all experts of a layer."""
    routers: tuple[str, ...]
    """Parameters (experts, hidden) of routers that are no linear layers."""
    linear_experts: tuple[str, ...] = ()
    """Linear layers of single experts."""
    linear_routers: tuple[str, ...] = ()
    """Routers that are linear layers."""

    def chosen(self, mixture: str) -> tuple[list[str], list[str]]:
        """Return peft's target modules and target parameters for one of all, experts, router and none."""
        experts, routers = mixture in ("all", "experts"), mixture in ("all", "router")
        modules = self.linear + self.linear_experts * experts + self.linear_routers * routers
        return list(modules), list(self.experts * experts + self.routers * routers)


def mixture_parts(model: Any) -> MixtureParts | None:
    """Return what can be adapted in a mixture of experts; None for a dense model.

    Experts are parameters of three dimensions, or a list of modules, with "expert" in their name or class; routers are
    what has an output for each expert under a name "router" or "gate". tests/model/test_mixture_adapters.py counts it
    in five families.
    """
    head = model.get_output_embeddings()
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    owned = [
        (f"{name}.{key}", type(module).__name__, parameter)
        for name, module in model.named_modules()
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding, *convolutions))
        for key, parameter in module.named_parameters(recurse=False)
    ]
    fused = {n: p for n, kind, p in owned if p.ndim == 3 and ("expert" in n or "Expert" in kind)}
    single = {n for n in linear if re.search(r"experts?\.\d+\.", n) and "shared" not in n}
    if not fused and not single:
        return None
    counts = {p.shape[0] for p in fused.values()} | {len({re.findall(r"experts?\.(\d+)\.", n)[0] for n in single})}
    routes = {n for n, m in linear.items() if _is_router(n) and m.out_features in counts}
    gates = {n for n, _, p in owned if p.ndim == 2 and _is_router(n) and p.shape[0] in counts}
    return MixtureParts(
        linear=_of_layers(linear.keys() - single - routes),
        experts=_of_layers(fused),
        routers=_of_layers(gates),
        linear_experts=_of_layers(single),
        linear_routers=_of_layers(routes),
    )


def _is_router(name: str) -> bool:
    return not {"router", "gate"}.isdisjoint(name.split("."))


def _of_layers(names: Iterable[str]) -> tuple[str, ...]:
    """Return names without what comes before the number of a layer, each once.

    >>> _of_layers(["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"])
    ('mlp.gate.weight',)
    """
    return tuple(sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in names}))


def _left_out(policy: Any, part: str) -> list[str] | None:
    """Return the linear layers of the vision part that get no adapter, None where all may have one."""
    if policy.vision is None or part == "tower":
        return None
    left_out = policy.vision.parameters("tower") + (policy.vision.parameters("merger") if part == "none" else [])
    return sorted({name.rpartition(".")[0] for name, _ in left_out})


def install_adapter(policy: Any, settings: dict[str, Any]) -> None:
    """Give a policy without weights an adapter by peft's own description of it (`PeftConfig.to_dict`)."""
    peft = _peft()
    known = {k: v for k, v in settings.items() if k != "peft_version"}
    spelled_out = _is_spelled_out(known["target_modules"])
    _install(policy, _quietly(lambda: peft.get_peft_model(policy.model, peft.LoraConfig(**known)), spelled_out))


def load_adapter(policy: Any, directory: Path) -> None:
    """Give a policy the adapter saved in a directory, ready to be trained further.

    Raises:
        ModelError: peft is missing, the adapter does not fit the model, or tensors of it are missing or left over.
    """
    peft = _peft()
    try:
        spelled_out = _is_spelled_out(adapter_description(directory)["target_modules"])
        adapter = _quietly(
            lambda: peft.PeftModel.from_pretrained(policy.model, str(directory), is_trainable=True), spelled_out
        )
        # Once more, since only this call gives what was missing or left over.
        loaded = _quietly(lambda: adapter.load_adapter(str(directory), "default", is_trainable=True), spelled_out)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"the adapter in {directory} does not fit its model: {first_line(error)}") from error
    _refuse_parts(directory, loaded.missing_keys, loaded.unexpected_keys)
    _install(policy, adapter, directory)


def _refuse_parts(directory: Path, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Refuse an adapter of which some tensors are missing or have no place in the model.

    Raises:
        ModelError: there are such; peft would leave the first ones as they are drawn, and drop the others.
    """
    for keys, what in (
        (missing, "{n} that its layers need are missing"),
        (unexpected, "{n} have no place in the model"),
    ):
        if keys:
            raise ModelError(
                f"the tensors of the adapter in {directory} must be those that its {ADAPTER_FILE} and its model ask "
                f"for; {what.format(n=len(keys))}, the first of them {min(keys)}; copy the whole directory again, or "
                "take the model that the adapter was trained with"
            )


def adapter_base(directory: Path) -> tuple[str, str | None]:
    """Return the path or hub id of the model an adapter belongs to, and its revision.

    Raises:
        ModelError: the adapter does not say.
    """
    settings = _peft().PeftConfig.from_pretrained(str(directory))
    if not settings.base_model_name_or_path:
        raise ModelError(f"{directory / ADAPTER_FILE} does not name its model: set base_model_name_or_path")
    return str(settings.base_model_name_or_path), settings.revision


def adapter_description(directory: Path) -> dict[str, Any]:
    """Return peft's own description of the adapter saved in a directory, for `install_adapter`."""
    description: dict[str, Any] = _peft().PeftConfig.from_pretrained(str(directory)).to_dict()
    return description


def foldable_layers(policy: Any) -> dict[str, Any] | None:
    """Return the layers that a policy's adapter is of, by name; None where one does not fold into a linear layer."""
    if unfoldable(policy) is not None:
        return None
    return {name: module for name, module in policy.model.named_modules() if is_adapted(module)}


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
                yield f"{layer}.weight", fold(adapted[layer], **waiting.pop(layer))
    assert not waiting, f"weights of an adapted layer are missing: {sorted(waiting)[0]}"


def _adapted_part(name: str) -> tuple[str, str]:
    """Split the name of a parameter of an adapted layer: the layer, and base, a, b or bias; others give nothing."""
    infixes = {".base_layer.weight": "base", ".base_layer.bias": "bias", ".lora_A.": "a", ".lora_B.": "b"}
    for infix, part in infixes.items():
        layer, found, _ = name.partition(infix)
        if found:
            return layer, part
    return "", ""


def fold(module: Any, base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the (out, in) weight of an adapted layer, W + s B A in float32 and rounded once, of tensors given.

    Args:
        module: peft's, for its scale alone; its own tensors may be without values.
        base, a, b: W (out, in), A (rank, in) and B (out, rank).
    """
    if module.disable_adapters:
        return base
    product = (b.float() @ a.float()) * module.scaling[module.active_adapters[0]]
    return (base.float() + product).to(base.dtype)


def _is_tied(model: Any) -> bool:
    """Tell whether input and output embedding are one."""
    settings = model.config.get_text_config()
    return bool(getattr(settings, "tie_word_embeddings", False) or getattr(model.config, "tie_word_embeddings", False))


def _install(policy: Any, adapter: Any, directory: Path | None = None) -> None:
    head = policy.model.get_output_embeddings()
    whose = "model.lora.targets" if directory is None else f"the adapter in {directory}"
    if not isinstance(head, torch.nn.Linear) or type(head) is not torch.nn.Linear:
        way_out = (
            "use all-linear or name attention and MLP layers"
            if directory is None
            else "train an adapter of attention and MLP layers"
        )
        raise ModelError(
            f"{whose} must leave the output embedding out: the policy head multiplies it itself; {way_out}"
        )
    if type(policy.model.get_input_embeddings()).__module__.startswith("peft.") and _is_tied(policy.model):
        raise ModelError(
            f"{whose} must leave the input embedding out where the model ties its head to it: a checkpoint would keep "
            "the adapter of one of the two; name attention and MLP layers"
        )
    policy.adapter = adapter
    policy.make_deterministic()


def _peft() -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ModelError("LoRA needs the extra lora; pip install 'sapo-rl[lora]'")
    import peft

    return peft


def _quietly(make: Any, spelled_out: bool = False) -> Any:
    """Silence peft's warnings about patterns that it adds itself for mixtures of experts.

    Args:
        spelled_out: the targets are those of `mixture_parts`, and are to be taken as they are. peft would take the
            names of projections for those of experts of transformers 4, shared experts' too, in some families.
    """
    with warnings.catch_warnings(), _as_written() if spelled_out else nullcontext():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys|Model has `tie_word_embeddings")
        return make()


@contextmanager
def _as_written() -> Iterator[None]:
    """Keep peft from translating the targets of an adapter."""
    from peft.utils import transformers_weight_conversion as conversion

    translate = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = translate


def _is_spelled_out(targets: str | Sequence[str]) -> bool:
    """Tell whether an adapter's targets are those of `mixture_parts`, which name a layer by more than its last name."""
    return not isinstance(targets, str) and any("." in target for target in targets)


def trained_sentence(policy: Any) -> str:
    """Say how many parameters an adapter trains, and of which modules."""
    layers: dict[str, int] = {}
    count = 0
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            count += parameter.numel()
            module = name.partition(".lora_")[0].removesuffix(".base_layer").rpartition(".")[2]
            layers[module] = layers.get(module, 0) + (".lora_B" in name)
    parts = ", ".join(f"{module} ({number})" for module, number in sorted(layers.items()))
    return f"the adapter trains {count:,} parameters, of {parts}"
