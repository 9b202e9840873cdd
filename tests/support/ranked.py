"""Cases that are trained by a group of ranks and by one process, and the process that is one of those ranks.

Run as `python -m support.ranked RANK SIZE PORT FILE CASE...`: many cases in one launch, since each process pays for the
imports of torch and transformers.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sapo.data import Group
from sapo.errors import Interrupted, NonFiniteError
from sapo.model.adapters import add_adapter
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.routing import Routers
from sapo.model.sharding import allocate, receive_weights, shard
from sapo.model.skeleton import buffers, build, describe, set_buffers
from sapo.model.tiny import character_tokenizer, tiny_model
from sapo.objectives import TIS, KLPenalty, make_objective
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.run.trainers import context_group
from sapo.training.collective import Collective
from sapo.training.logprobs import GroupLogprobs
from sapo.training.optimizer import PolicyOptimizer
from sapo.training.optimizer_files import OptimizerFiles
from sapo.training.packer import Packer
from sapo.training.ranked import RankedTrainers, serve
from sapo.training.ranks import Trainers
from sapo.training.settings import TrainerSettings
from sapo.training.trainer import Trainer
from sapo.training.wire import Wire
from support.trainer_cases import ALPHABET, MAX_NEW_TOKENS, make_groups
from support.vision_cases import SMALL, SQUARE, WIDE, make_vision_model, shown


@dataclass(frozen=True)
class Case:
    """One thing that has to come out alike on any number of ranks."""

    architecture: str = "qwen3"
    objective: str = "sapo"
    tied: bool = False
    dtype: torch.dtype = torch.float64
    lora: bool = False
    replay: bool = False
    groups: int = 7
    replicas: int = 1
    context: int = 1
    heads: tuple[int, int] = (2, 1)
    vision: str | None = None
    """What is trained of the vision part; None for a model of text."""
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "dense": Case(),
    "tied": Case(tied=True),
    "moe": Case("qwen3_moe"),
    "moe with replay": Case("qwen3_moe", replay=True),
    "moe with replay, activation checkpointing": Case(
        "qwen3_moe", replay=True, settings={"activation_checkpointing": True}
    ),
    "gspo": Case(objective="gspo"),
    "gspo with tis": Case(objective="gspo", settings={"tis": TIS()}),
    "tis": Case(settings={"tis": TIS()}),
    "kl": Case(settings={"kl": KLPenalty(coefficient=0.1)}),
    "lora": Case(lora=True),
    "lora moe": Case("qwen3_moe", lora=True),
    "lora with kl to itself": Case(lora=True, settings={"kl": KLPenalty(coefficient=0.1)}),
    "activation checkpointing": Case(settings={"activation_checkpointing": True}),
    "temperature": Case(settings={"temperature": 0.7}),
    "one group": Case(groups=1),
    "one group, gspo, kl, tis": Case(
        objective="gspo", groups=1, settings={"kl": KLPenalty(coefficient=0.1), "tis": TIS()}
    ),
    "one group, replay": Case("qwen3_moe", replay=True, groups=1),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16 moe tied": Case("qwen3_moe", tied=True, dtype=torch.bfloat16),
    "replicas": Case(replicas=2),
    "replicas, moe, lora, kl": Case("qwen3_moe", lora=True, replicas=2, settings={"kl": KLPenalty(coefficient=0.1)}),
    "context": Case(context=2),
    "context, grouped heads": Case(context=2, heads=(4, 2)),
    "context, moe, gspo, tis": Case("qwen3_moe", objective="gspo", context=2, settings={"tis": TIS()}),
    "context, tis by sequence, kl": Case(
        context=2, settings={"tis": TIS(mode="sequence"), "kl": KLPenalty(coefficient=0.1)}
    ),
    "context, lora, activation checkpointing, temperature": Case(
        lora=True, context=2, settings={"activation_checkpointing": True, "temperature": 0.7}
    ),
    "context, one group": Case(context=2, groups=1),
    "context of two among four": Case(context=2, heads=(4, 1)),
    "context of four, fewer heads of keys": Case(context=4, heads=(4, 2)),
    "context of two, replicas": Case(objective="gspo", context=2, replicas=2),
    "pictures": Case("qwen3_vl", vision="tower"),
    "pictures, merger, activation checkpointing, kl": Case(
        "qwen3_vl", vision="merger", settings={"activation_checkpointing": True, "kl": KLPenalty(coefficient=0.1)}
    ),
    "pictures, frozen tower, gspo": Case("qwen3_vl", vision="none", objective="gspo"),
    "pictures, moe with replay": Case("qwen3_vl_moe", vision="tower", replay=True),
    "pictures, lora": Case("qwen3_vl", vision="none", lora=True),
    "pictures, layers of the tower that are not used": Case("llava", vision="tower"),
    "pictures, one group": Case("qwen3_vl", vision="tower", groups=1),
    "pictures, context": Case("qwen3_vl", vision="tower", context=2),
    "pictures, replicas": Case("qwen3_vl_moe", vision="tower", replicas=2),
    "pictures, bfloat16": Case("qwen3_vl", vision="tower", dtype=torch.bfloat16),
    "float32": Case(dtype=torch.float32),
    "float32 moe tied": Case("qwen3_moe", tied=True, dtype=torch.float32),
}


def make_model(case: Case, seed: int = 1) -> Policy:
    policy = make_text_model(case, seed) if case.vision is None else make_pictured_model(case, seed)
    if case.lora:
        targets = ["q_proj", "v_proj"] + (["down_proj"] if case.architecture == "qwen3" else [])
        add_adapter(policy, rank=2, alpha=4, targets=targets, seed=3)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():  # B starts at 0, where A has no gradient
            for parameter in policy.parameters():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def make_pictured_model(case: Case, seed: int) -> Policy:
    model, family = make_vision_model(case.architecture, gain=1.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    policy = prepare_policy(model.to(case.dtype), family.tokenizer, family)
    assert policy.vision is not None
    policy.vision.train(case.vision)
    return policy


def make_text_model(case: Case, seed: int) -> Policy:
    tokenizer = character_tokenizer(ALPHABET)
    model = tiny_model(
        case.architecture,
        len(tokenizer),
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=32,
        layers=2,
        heads=case.heads[0],
        kv_heads=case.heads[1],
        intermediate_size=48,
        max_length=64,
        tie_embeddings=case.tied,
    )
    if case.architecture == "qwen3_moe":
        model.set_experts_implementation("eager")  # torch's grouped product rounds by the batch
    return prepare_policy(model.to(case.dtype), tokenizer)


def groups_of(case: Case, policy: Policy) -> list[Group]:
    """Groups of random completions; of a model that sees pictures, two prompts in three show one or two."""
    groups = make_groups(case.groups, 3, seed=4)
    if case.vision is None:
        return groups
    questions = [("1+<image>=<image>", WIDE, SQUARE), ("12+3",), ("7", SMALL)]
    asked = [shown(policy, *questions[i % 3], prompt_id=g.prompt.id) for i, g in enumerate(groups)]
    return [replace(group, prompt=prompt) for group, prompt in zip(groups, asked, strict=True)]


def make_reference(case: Case) -> Policy | None:
    if case.settings.get("kl") is None or case.lora:
        return None
    reference = make_model(case, seed=2)
    for parameter in reference.model.parameters():
        parameter.requires_grad_(False)
    return reference


def make_rank(case: Case, ranks: Collective, mesh: DeviceMesh | None) -> Trainer:
    policy, reference = make_model(case), make_reference(case)
    if mesh is not None:
        policy = sharded(policy, ranks, mesh)
        reference = None if reference is None else sharded(reference, ranks, mesh)
    optimizer = PolicyOptimizer(
        [(n, p) for n, p in policy.model.named_parameters() if p.requires_grad],
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.01,
        grad_clip=0.05,
        rounded=mesh is not None and case.dtype == torch.bfloat16,
    )
    settings = TrainerSettings(**{"objective": make_objective(case.objective), "temperature": 1.0, **case.settings})
    routers = Routers(policy) if case.replay else None
    context = None if mesh is None else context_group(ranks, case.context)
    return Trainer(policy, optimizer, settings, reference=reference, routers=routers, ranks=ranks, context=context)


def sharded(whole: Policy, ranks: Collective, mesh: DeviceMesh) -> Policy:
    """Build a policy as a rank does: from a description, without weights, which rank 0 then sends."""
    policy = build(json.loads(json.dumps(describe(whole))))
    shard(policy, mesh)
    allocate(policy, "cpu")
    set_buffers(policy, buffers(whole))
    assert ranks.group is not None
    receive_weights(policy, ranks.group, dict(whole.weights()) if ranks.rank == 0 else None)
    return policy


def packer_of(case: Case, size: int) -> Packer:
    kl = case.settings.get("kl") is not None
    return Packer("sequence_mean", 40, MAX_NEW_TOKENS, include_flat=kl, ranks=max(1, size // case.context))


def drive(case: Case, trainers: Trainers, policy: Policy, size: int) -> dict[str, Any]:
    """Play the driver: three updates on the same groups, then completions with the weights they end at."""
    packer = packer_of(case, size)
    of_groups = GroupLogprobs(trainers, packer, "adapter_off" if case.lora else "reference")
    groups = groups_of(case, policy)
    if case.replay or case.settings.get("tis") is not None:
        groups = of_groups.attach_old(groups, None, record=case.replay)
    if case.settings.get("kl") is not None:
        groups = of_groups.attach_reference(groups)
    found: dict[str, Any] = {"experts": [g.prompt_experts for g in groups]}
    compared = {"grpo": make_objective("grpo"), "gspo": make_objective("gspo")}
    found["cosines"] = trainers.gradients(packer.pack(groups), compared)
    updates = [trainers.update(packer.pack(groups), 1e-2)]
    trainers.send_weights(policy)
    first = {name: p.detach().clone() for name, p in policy.weights()}
    directory = Path(tempfile.mkdtemp())
    trainers.save_optimizer(directory)
    updates += [trainers.update(packer.pack(groups), 1e-2) for _ in range(2)]
    found["loss"] = [u.loss for u in updates]
    found["norm"] = [u.grad_norm for u in updates]
    found["changed"] = [(u.num_changed, u.num_choices) for u in updates]
    found["tokens"] = [by_sequence(u) for u in updates]
    trainers.send_weights(policy)
    found["weights"] = {name: p.detach().clone() for name, p in policy.weights()}
    (directory / "last").mkdir()
    trainers.save_optimizer(directory / "last")
    found["optimizer"] = OptimizerFiles(directory / "last").read({})  # whole, though each rank wrote its rows
    found["files"] = sorted(file.name for file in (directory / "last").iterdir())
    found["logprobs"] = of_groups.compute(groups, include_all=not case.replay)  # the flat group has no record
    found["completions"] = complete(policy, groups)
    with torch.no_grad():  # what a rollback does: back to the first update, and the second once more
        for name, parameter in policy.model.named_parameters():
            parameter.copy_(first[name])
    trainers.take_weights(policy)
    trainers.restore_optimizer(directory)
    again = trainers.update(packer.pack(groups), 1e-2)
    found["again"] = (again.loss, again.grad_norm)
    return found


def by_sequence(update: Any) -> dict[int, dict[str, torch.Tensor]]:
    """What an update measured of each sequence, whichever rank trained on it."""
    names = (
        "log_ratio_M",
        "weight_M",
        "slope_M",
        "advantage_M",
        "entropy_M",
        "kl_M",
        "log_mismatch_M",
        "loss_weight_M",
    )
    return {
        sequence: {n: t[update.sequence_M == place] for n in names if (t := getattr(update, n)) is not None}
        for place, sequence in enumerate(update.sequence_ids)
    }


def complete(policy: Policy, groups: list[Group]) -> list[Any]:
    engine = LocalEngine(policy)
    engine.set_weights(policy.weights(), 0)
    params = SamplingParams(max_new_tokens=10, seed=11, stop_token_ids=policy.stop_token_ids)
    drawn = engine.generate([Request(g.prompt, 4) for g in groups], params)
    return [(c.token_ids.tolist(), c.logprobs.tolist()) for completions in drawn for c in completions]


def one_process(case: Case) -> dict[str, Any]:
    """The same by one process."""
    trainer = make_rank(case, Collective(), None)
    return drive(case, trainer, trainer.policy, 1)


@contextmanager
def training_group(case: Case, ranks: Collective, wire: Wire) -> Iterator[tuple[RankedTrainers, Policy] | None]:
    """On rank 0, the driver's side of a group; elsewhere None, once the driver has ended."""
    shape = (case.replicas, ranks.size // case.replicas) if case.replicas > 1 else (ranks.size,)
    names = ("replicate", "shard") if case.replicas > 1 else ("shard",)
    own = make_rank(case, ranks, init_device_mesh("cpu", shape, mesh_dim_names=names))
    if ranks.rank:
        compared = {"grpo": make_objective("grpo"), "gspo": make_objective("gspo")}
        serve(own, wire, compared)
        yield None
        return
    policy = make_model(case)
    trainers = RankedTrainers(own, wire, policy)
    yield trainers, policy
    trainers.close()


def with_nan(groups: list[Group], place: int) -> list[Group]:
    """Put an advantage that is not a number into one group."""
    broken = replace(groups[place], advantages=(float("nan"),) * len(groups[place].advantages))
    return [*groups[:place], broken, *groups[place + 1 :]]


def failures(ranks: Collective, wire: Wire) -> dict[str, Any] | None:
    """What ends an update, on whichever rank it is found: the errors, and whether the group goes on afterwards."""
    case, found = CASES["dense"], {}
    with training_group(case, ranks, wire) as group:
        if group is None:
            return None
        trainers, _ = group
        packer, groups = packer_of(case, ranks.size), make_groups(7, 3, seed=4)
        for place in (0, 2, 3, 4, 5, 6):
            found[f"nan in group {place}"] = _error(
                lambda p=place: trainers.update(packer.pack(with_nan(groups, p)), 1e-2)
            )
        asked: list[int] = []

        def stop_at_second() -> bool:
            asked.append(1)
            return len(asked) == 2

        found["stop"] = _error(lambda: trainers.update(packer.pack(groups), 1e-2, stop_at_second))
        found["flat"] = trainers.update(packer.pack([groups[1]]), 1e-2).skipped
        found["updates"] = trainers.updates
        found["loss"] = trainers.update(packer.pack(groups), 1e-2).loss
    return found


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except (NonFiniteError, Interrupted) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    """Be one rank."""
    rank, size, port, file = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    names = sys.argv[5:]
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    ranks, wire = Collective(rank, size, dist.group.WORLD), Wire(dist.group.WORLD)
    found: dict[str, Any] = {}
    for name in names:
        if name == "failures":
            found[name] = failures(ranks, wire)
            continue
        with training_group(CASES[name], ranks, wire) as group:
            if group is not None:
                found[name] = drive(CASES[name], *group, size)
    if rank == 0:
        torch.save(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
