"""The state of any torch optimizer as plain tensors by name, and back, bit for bit.

A checkpoint holds tensors and text and no pickle. A plain tensor under KEY of the state of parameter NAME is
`KEY/NAME`. Everything else that a state may hold is taken apart: a tensor subclass (quantised moments, say) into its
plain inner tensors, a list or a mapping into its elements. What is then left is JSON, in one more tensor of bytes,
`description`, which is there only if it says something.

Of sharded parameters the tensors are sharded too; training/optimizer_files.py writes the rows of each rank.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sapo.errors import CheckpointError, ConfigError
from sapo.model.sharding import shard_like

DESCRIPTION = "description"

LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""Keys whose plain tensors have the shape of their parameter, in torch's own optimizers."""

SET_BY_US = ("params", "lr")
"""Keys of a parameter group that are no state: who is trained, and the rate that each step is given."""


class OptimizerState:
    """Reads and writes the state of an optimizer.

    Args:
        optimizer: just made. What its parameter groups hold now is taken as its settings; what differs later is state.
        masters: the parameters it is over, by name.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Mapping[str, nn.Parameter]) -> None:
        self.optimizer = optimizer
        self.masters = masters
        self._settings = [_settings_of(group) for group in optimizer.param_groups]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the state, its tensors where they are.

        Raises:
            ConfigError: something that is neither tensor nor JSON.
        """
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state.get(master, {}).items():
                path = f"{key}/{name}"
                node = _take_apart(value, path, tensors, master.device)
                if node != {"tensor": path}:
                    state[path] = node
        groups = []
        for place, (group, settings) in enumerate(zip(self.optimizer.param_groups, self._settings, strict=True)):
            changed = {k: v for k, v in _settings_of(group).items() if _changed(v, settings.get(k))}
            groups.append(_take_apart(changed, f"group {place}", tensors, torch.device("cpu"))["mapping"])
        if state or any(groups):
            text = json.dumps({"state": state, "groups": groups}).encode()
            tensors[DESCRIPTION] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return tensors

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the state that `to_tensors` gave in place of the present one.

        Raises:
            CheckpointError: of another model or optimizer.
        """
        described: dict[str, Any] = {"state": {}, "groups": [{} for _ in self.optimizer.param_groups]}
        if DESCRIPTION in tensors:
            try:
                described = json.loads(bytes(tensors[DESCRIPTION].cpu().numpy()))
                dict(described["state"]), [dict(group) for group in described["groups"]]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    "the optimizer's state must say what it is made of; got a description that cannot be read; resume "
                    "from another checkpoint"
                ) from error
        nodes: dict[str, Any] = {
            path: {"tensor": path} for path in tensors if not _is_part(path) and path != DESCRIPTION
        }
        nodes |= described["state"]
        of_parameter = {path: path.partition("/")[2] for path in nodes}
        if unknown := sorted(path for path, name in of_parameter.items() if name not in self.masters):
            raise CheckpointError(
                f"the optimizer's state must be of the model that is trained; got {unknown[0]} and {len(unknown) - 1} "
                "more that it does not have; resume from a checkpoint of this run"
            )
        for path, node in nodes.items():
            key, _, name = path.partition("/")
            if key in LIKE_PARAMETERS and "tensor" in node and tensors[path].shape != self.masters[name].shape:
                raise CheckpointError(
                    f"the optimizer's state must be of the model that is trained; got {path} of shape "
                    f"{tuple(tensors[path].shape)} for a parameter of {tuple(self.masters[name].shape)}; resume from a "
                    "checkpoint of this run"
                )
        if len(described["groups"]) != len(self.optimizer.param_groups):
            raise CheckpointError(
                f"the optimizer's state must have {len(self.optimizer.param_groups)} groups of parameters; got "
                f"{len(described['groups'])}; resume from a checkpoint of this run"
            )
        packages = {c.__module__.partition(".")[0] for c in type(self.optimizer).__mro__}
        state: dict[str, dict[str, Any]] = {}
        for path, node in nodes.items():
            key, _, name = path.partition("/")
            master = self.masters[name]
            value = _put_together(node, tensors, master.device, packages)
            state.setdefault(name, {})[key] = shard_like(master, value) if isinstance(value, Tensor) else value
        self.optimizer.state.clear()  # a checkpoint of a run's start has nothing to overwrite the present state with
        for name, values in state.items():
            self.optimizer.state[self.masters[name]] = values
        groups = zip(self.optimizer.param_groups, self._settings, described["groups"], strict=True)
        for group, settings, changed in groups:
            group.update(copy.deepcopy(settings))
            group.update({k: _put_together(v, tensors, torch.device("cpu"), packages) for k, v in changed.items()})


def _settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of what a parameter group holds beside what is set by us."""
    return {k: copy.deepcopy(v) for k, v in group.items() if k not in SET_BY_US}


def _is_part(path: str) -> bool:
    """Tell whether a tensor is one part of a value, which the description puts together."""
    return "#" in path


def _changed(value: Any, setting: Any) -> bool:
    """Tell whether a value of a parameter group may be state: all that is not equal to what it was set to."""
    if isinstance(value, Tensor):
        return True  # it may have been changed in place
    return type(value) is not type(setting) or value != setting


def _take_apart(value: Any, path: str, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Add the plain tensors in a value to `tensors`; return the JSON that says how they make it up."""
    if type(value) in (Tensor, nn.Parameter, DTensor):
        tensors[path] = value.detach()
        return {"tensor": path, **({} if value.device == device else {"device": str(value.device)})}
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        inner, context = value.__tensor_flatten__()
        parts = {name: _take_apart(getattr(value, name), f"{name}#{path}", tensors, device) for name in inner}
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"class": kind, "inner": parts, "context": _take_apart(context, f"context#{path}", tensors, device)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    if type(value) in (list, tuple, torch.Size):
        elements = [_take_apart(v, f"{i}#{path}", tensors, device) for i, v in enumerate(value)]
        return {"list" if type(value) is list else "tuple": elements}
    if type(value) is dict and all(type(k) is str for k in value):
        return {"mapping": {k: _take_apart(v, f"{k}#{path}", tensors, device) for k, v in value.items()}}
    raise ConfigError(
        f"the state of an optimizer must be made of tensors, numbers, texts, lists and mappings, which a checkpoint "
        f"can hold; got {type(value).__module__}.{type(value).__qualname__} at {path}; use train.optimizer=adamw"
    )


def _put_together(node: dict[str, Any], tensors: Mapping[str, Tensor], device: torch.device, packages: set[str]) -> Any:
    """Make the value that `_take_apart` took apart.

    Args:
        packages: whose tensor classes it may be of; nothing is imported because a file names it.
    """
    if "tensor" in node:
        return tensors[node["tensor"]].to(node.get("device", device), copy=True)
    if "class" in node:
        inner = {name: _put_together(part, tensors, device, packages) for name, part in node["inner"].items()}
        context = _put_together(node["context"], tensors, device, packages)
        return _tensor_class(node["class"], packages).__tensor_unflatten__(inner, context, None, None)
    if "dtype" in node:
        dtype = getattr(torch, node["dtype"])
        assert isinstance(dtype, torch.dtype)
        return dtype
    if "mapping" in node:
        return {k: _put_together(v, tensors, device, packages) for k, v in node["mapping"].items()}
    for kind, make in (("list", list), ("tuple", tuple)):
        if kind in node:
            return make(_put_together(v, tensors, device, packages) for v in node[kind])
    return node["value"]


def _tensor_class(spec: str, packages: set[str]) -> Any:
    """Return a tensor class of one of the packages, which has been imported with the optimizer.

    Raises:
        CheckpointError: no such class there.
    """
    module, _, name = spec.partition(":")
    found = getattr(sys.modules.get(module), name, None) if module.partition(".")[0] in packages else None
    if not (isinstance(found, type) and issubclass(found, Tensor) and hasattr(found, "__tensor_unflatten__")):
        raise CheckpointError(
            f"the optimizer's state must be of the optimizer that trains; got tensors of {spec}; resume from a "
            "checkpoint of this run"
        )
    return found
