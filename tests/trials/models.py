"""Every decoder family that transformers can build tiny: right in trainer and engine, or refused with the reason.

Each is built with random weights, four layers where its config has layers, and run beyond its windows: two prompts
behind a shared beginning, with responses of 30, 25 and 1 tokens. Log-probabilities of trainer and engine and the
gradient of all parameters are held against the model's own forward, one sequence after the other.

    python -m trials.models --out docs/models.json [FAMILY ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from sapo.data import Prompt, Segment
from sapo.errors import ModelError
from sapo.model.attention import TreeLayout
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.router_families import ROUTERS
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from trials.families import CLASSES, TOKENIZER, build, families

PATIENCE = 240  # seconds for a family; a limit for one that hangs, not a measurement
TOLERANCE = 1e-4
"""Nats that trainer and engine may differ from the model's own forward, in float32."""
GRADIENT_TOLERANCE = 1e-3
"""Of the norm of all gradients, in float32."""

SHARED, PROMPTS, RESPONSES = 20, (20, 23), (30, 25, 1)


@dataclass(frozen=True)
class Record:
    """What came of a family.

    >>> Record("llama", "LlamaForCausalLM", path="packed", engine="packed", trainer_gap=9e-7, engine_gap=5e-7).verdict
    'packed'
    """

    family: str
    model: str
    path: str = ""
    """packed or rows; empty where it is refused."""
    engine: str = ""
    """The way it is decoded."""
    reason: str = ""
    """Why it does not run packed, is not decoded packed, or is refused."""
    trainer_gap: float | None = None
    """Largest difference of log-probabilities from the model's own forward, in nats."""
    engine_gap: float | None = None
    gradient_gap: float | None = None
    """Norm of the difference of all gradients by their norm."""
    replay: bool = False
    states: bool = False
    """It carries states from token to token, and they are shared along the tree."""
    targets: tuple[str, ...] = ()
    """Linear layers of the decoder, by the last part of their names: what an adapter can be put on."""
    not_built: str = ""
    """Why transformers did not build it tiny."""

    @property
    def wrong(self) -> bool:
        """Tell whether it was accepted and is not exact."""
        if not self.path:
            return False
        gaps = (self.trainer_gap, self.engine_gap)
        return (
            any(g is None or not g <= TOLERANCE for g in gaps) or not (self.gradient_gap or 0.0) <= GRADIENT_TOLERANCE
        )

    @property
    def verdict(self) -> str:
        """Return packed, states, rows, refused, wrong or not built."""
        if self.not_built:
            return "not built"
        if self.wrong:
            return "wrong"
        return "states" if self.path == "packed" and self.states else self.path or "refused"


def try_family(family: str) -> Record:
    """Try a family in this process."""
    name = CLASSES[family]
    try:
        model = build(family)
        with torch.no_grad():
            model(input_ids=torch.tensor([list(range(2, 30))]), use_cache=False)
    except Exception as error:
        return Record(family, name, not_built=_line(error))
    name = type(model).__name__
    plain = copy.deepcopy(model)
    try:
        policy = prepare_policy(model, TOKENIZER)
        engine = LocalEngine(policy)
    except ModelError as error:
        return Record(family, name, reason=_line(error))
    reasons = [policy.path_reason, *policy.engine_paths.values()]
    record = Record(
        family,
        name,
        path=policy.path,
        engine=engine.way,
        reason=next((r for r in reasons if r), ""),
        replay=policy.path == "packed" and any(type(m).__name__ in ROUTERS for m in policy.decoder.modules()),
        states=_carries_states(policy),
        targets=linear_layers(policy),
    )
    gap, gradient = trainer_gaps(plain, policy)
    return Record(**{
        **vars(record),
        "trainer_gap": gap,
        "engine_gap": engine_gap(plain, engine),
        "gradient_gap": gradient,
    })  # fmt: skip


def _carries_states(policy: Policy) -> bool:
    return policy.path == "packed" and any(isinstance(m, nn.Conv1d) for m in policy.decoder.modules())


def linear_layers(policy: Policy) -> tuple[str, ...]:
    """Return the names that adapters of a policy may be put on."""
    head = policy.model.get_output_embeddings()
    found = {
        n.rpartition(".")[2] for n, m in policy.model.named_modules() if isinstance(m, nn.Linear) and m is not head
    }
    return tuple(sorted(found))


def trainer_gaps(plain: Any, policy: Policy) -> tuple[float, float]:
    """Return how far log-probabilities and gradients of one packed tree are from those of sequence after sequence."""
    ids, positions, segments, sequences = _tree()
    hidden = policy.hidden(torch.tensor(ids), torch.tensor(positions), TreeLayout(segments))
    ours_NV = torch.log_softmax(_logits(policy, hidden), -1)
    gap, loss, own_loss = 0.0, ours_NV.new_zeros(()), ours_NV.new_zeros(())
    for sequence, index, start in sequences:
        logp_TV = torch.log_softmax(plain(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].float(), -1)
        gap = max(gap, (ours_NV[index] - logp_TV).abs().max().item())
        scored = torch.arange(start, len(sequence))
        targets = torch.tensor(sequence)[scored]
        weights = torch.linspace(-1.0, 1.0, len(scored)) + 0.3
        loss = loss + (ours_NV[torch.tensor(index)[scored - 1], targets] * weights).sum()
        own_loss = own_loss + (logp_TV[scored - 1, targets] * weights).sum()
    ours, own = _gradients(loss, policy.model), _gradients(own_loss, plain)
    apart = sum(((ours[n] - own[n]) ** 2).sum().item() for n in own)
    return gap, (apart / max(1e-30, sum((g**2).sum().item() for g in own.values()))) ** 0.5


def _logits(policy: Policy, hidden_NH: Tensor) -> Tensor:
    """Compute logits with a graph; those of a policy are computed in place."""
    logits_NV = torch.nn.functional.linear(hidden_NH, policy.head_weight, policy.head_bias).float()
    cap = policy.logit_softcap
    return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g.double() for (n, p), g in zip(named.items(), found, strict=True)}


def _tree() -> tuple[list[int], list[int], list[Segment], list[tuple[list[int], list[int], int]]]:
    """Return packed ids, positions and segments, and each sequence with its packed indices and its prompt's length."""
    generator = torch.Generator().manual_seed(3)
    before = _drawn(SHARED, generator)
    ids, positions, segments = list(before), list(range(SHARED)), [Segment(0, SHARED, -1)]
    sequences = []
    for length in PROMPTS:
        own, leaf, start = _drawn(length, generator), len(segments), len(ids)
        segments.append(Segment(start, length, 0))
        ids, positions = ids + own, [*positions, *range(SHARED, SHARED + length)]
        for size in RESPONSES:
            response, first = _drawn(size, generator), len(ids)
            segments.append(Segment(first, size, leaf))
            ids, positions = ids + response, [*positions, *range(SHARED + length, SHARED + length + size)]
            index = [*range(SHARED), *range(start, start + length), *range(first, first + size)]
            sequences.append((before + own + response, index, SHARED + length))
    return ids, positions, segments, sequences


def _drawn(count: int, generator: torch.Generator) -> list[int]:
    drawn: list[int] = torch.randint(2, len(TOKENIZER) - 2, (count,), generator=generator).tolist()
    return drawn


@torch.no_grad()
def engine_gap(plain: Any, engine: LocalEngine) -> float:
    """Return how far the log-probabilities of drawn tokens are from the model's own."""
    generator = torch.Generator().manual_seed(5)
    before = _drawn(SHARED, generator)
    prompts = [(*before, *_drawn(length, generator)) for length in PROMPTS]
    requests = [Request(Prompt(id=i, task="t", text="", token_ids=p), len(RESPONSES)) for i, p in enumerate(prompts)]
    drawn = engine.generate(requests, SamplingParams(max_new_tokens=max(RESPONSES), seed=1))
    gap = 0.0
    for request, completions in zip(requests, drawn, strict=True):
        for completion in completions:
            sequence = [*request.prompt.token_ids, *completion.token_ids.tolist()]
            logp_TV = torch.log_softmax(
                plain(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].float(), -1
            )
            first = len(request.prompt.token_ids) - 1
            own = logp_TV[range(first, len(sequence) - 1), completion.token_ids.tolist()]
            gap = max(gap, (own - torch.tensor(completion.logprobs)).abs().max().item())
    return gap


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:400] if isinstance(error, ModelError) else f"{type(error).__name__}: {text}"[:400]


def survey(names: Sequence[str]) -> Iterator[Record]:
    """Try families one after the other, each in a process of its own, since one of them may hang or take all memory."""
    context = multiprocessing.get_context("fork")
    for family in names:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(family, sender))
        process.start()
        sender.close()
        try:
            record = receiver.recv() if receiver.poll(PATIENCE) else None
        except EOFError:
            record = None
        process.kill()
        process.join()
        yield record or Record(
            family, CLASSES[family], not_built=f"no answer within {PATIENCE} s, or a process that died"
        )


def _send(family: str, sender: Any) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        record = try_family(family)
    except Exception as error:  # accepted, and then it fails: as wrong as it gets
        record = Record(family, CLASSES[family], path="?", reason=_line(error))
    sender.send(record)


def load(file: Path) -> dict[str, Record]:
    """Read the records of a survey."""
    if not file.is_file():
        return {}
    found = json.loads(file.read_text())["families"]
    return {r["family"]: Record(**{**r, "targets": tuple(r["targets"])}) for r in found}


def save(file: Path, records: dict[str, Record]) -> None:
    """Write the records of a survey, and what they were made with."""
    kept = [asdict(records[family]) for family in sorted(records)]
    content = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0], "families": kept}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Survey the families that were asked for; 1 where one is wrong."""
    parser = argparse.ArgumentParser(prog="trials.models")
    parser.add_argument("families", nargs="*")
    parser.add_argument("--out", type=Path, help="a file of records, to which these are added")
    asked = parser.parse_args()
    records = {} if asked.out is None else load(asked.out)
    for record in survey(asked.families or families()):
        records[record.family] = record
        gaps = " ".join(
            f"{g:.1e}" for g in (record.trainer_gap, record.engine_gap, record.gradient_gap) if g is not None
        )
        print(record.family, record.verdict, record.engine, gaps, record.reason or record.not_built, flush=True)
        if asked.out is not None:
            save(asked.out, records)
    return int(any(record.wrong for record in records.values()))


if __name__ == "__main__":
    sys.exit(main())
