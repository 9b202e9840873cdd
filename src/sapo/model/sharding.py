"""A policy whose weights are sharded over the ranks of a training group by PyTorch's FSDP2.

Every rank keeps a slice of each parameter, along its first dimension. The whole is gathered for a forward or backward
pass only: block by block, and embedding, final norm, head and vision tower together. So a pass over text and one over
pictures are the same collectives, and no rank waits for a picture that another has. Gradients are summed over ranks and
never averaged, since the weights of a packed batch have the normalizer of the whole mini-batch in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sapo.model.policy import Policy


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Shard the weights of a policy in place; every rank has the same ones, or all have none (model/skeleton.py).

    Weights of 16 bits become slices in float32, which are the master weights of the optimizer, and are rounded to 16
    bits as they are gathered: a pass computes what the unsharded policy of that precision computes. Gradients are
    summed in float32.

    Args:
        mesh: one dimension to shard over; with two, weights are replicated over the first and sharded over the second
            (HSDP).
    """
    model, dtype = policy.model, policy.dtype
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    precision = MixedPrecisionPolicy()
    if dtype in (torch.bfloat16, torch.float16):
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        model.float()
    # FSDP gathers what belongs to the root within the root's own forward, and nowhere else.
    model.forward = MethodType(_work_or(type(model).forward), model)
    for block in blocks(policy):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
    policy.sharded = before
    if policy.vision is not None:
        policy.vision.sharded = True


def receive_weights(
    policy: Policy, group: dist.ProcessGroup | None, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Put the whole weights of rank 0 in place of the sharded ones, one parameter at a time. A collective.

    Args:
        group: of CPU tensors; None for the default one.
        weights: on rank 0, by name; None on the other ranks.
    """
    assert policy.sharded is not None
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            dtype = policy.sharded[name]
            if weights is None:
                full = torch.empty(parameter.shape, dtype=dtype)
            else:
                full = weights[name].detach().to("cpu", dtype).contiguous()
            dist.broadcast(full, 0, group=group)
            parameter.copy_(shard_like(parameter, full.to(parameter.device, parameter.dtype)))
    if policy.vision is not None:
        policy.vision.forget()


def allocate(policy: Policy, device: str) -> None:
    """Give a sharded policy on the meta device memory for this rank's slices; the values come later."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in policy.model.modules():
        for name, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, name))
    policy.model.to_empty(device=device)
    for (first, its_name), *others in places.values():  # to_empty gives each place of a tied weight one of its own
        for module, name in others:
            module._parameters[name] = first._parameters[its_name]


def blocks(policy: Policy) -> list[nn.Module]:
    """Return the blocks of the decoder: each is gathered by itself."""
    names = set(policy.model._no_split_modules or ())
    found = [module for module in policy.decoder.modules() if type(module).__name__ in names]
    return found or list(policy.decoder.layers)  # type: ignore[arg-type]


def full_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter whole, by its name in the model, in the precision it had unsharded; tied ones once.

    A collective: every rank runs through all of them. One parameter at a time is whole.
    """
    assert policy.sharded is not None
    policy.model.reshard()
    for name, parameter in policy.model.named_parameters():
        yield name, whole(parameter.detach().to(policy.sharded[name]))


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every rank; any other is returned as it is. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return the slice of a sharded tensor that this rank keeps; any other is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: DTensor) -> tuple[int, int]:
    """Return the first of the rows that this rank keeps of a sharded tensor, and one past the last."""
    mesh, dimension = tensor.device_mesh, tensor.placements.index(Shard(0))
    most = -(-tensor.shape[0] // mesh.size(dimension))  # as torch.chunk cuts
    start = min(mesh.get_local_rank(dimension) * most, tensor.shape[0])
    stop = min(start + most, tensor.shape[0])
    assert stop - start == tensor.to_local().shape[0], "a rank keeps the rows that torch.chunk gives it"
    return start, stop


def is_first_replica(tensor: DTensor) -> bool:
    """Return whether this rank is in the first of the groups that hold all rows each (HSDP)."""
    mesh, dimension = tensor.device_mesh, tensor.placements.index(Shard(0))
    return not any(mesh.get_local_rank(other) for other in range(mesh.ndim) if other != dimension)


def shard_from_rows(parameter: DTensor, rows: Tensor) -> DTensor:
    """Make a tensor sharded as a parameter is, of the rows that this rank keeps."""
    return DTensor.from_local(
        rows.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def shard_like(parameter: Tensor, full: Tensor) -> Tensor:
    """Shard a tensor of a parameter's shape as the parameter is; each rank has the whole and keeps its slice.

    What is sharded already, or of another shape, is returned as it is.
    """
    if not isinstance(parameter, DTensor) or isinstance(full, DTensor) or full.shape != parameter.shape:
        return full
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _work_or(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that runs the work it is given (`Policy.run`); called otherwise, it is the model's own."""

    def forward(self: nn.Module, *args: Any, **options: Any) -> Any:
        if len(args) == 1 and not options and not isinstance(args[0], Tensor) and callable(args[0]):
            return args[0]()
        return own(self, *args, **options)

    return forward
