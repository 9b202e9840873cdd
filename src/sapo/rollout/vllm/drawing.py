"""One call of generate on vLLM: a request for each sample, stepped until every one has ended by our stop rules."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sapo.data import Completion
from sapo.data.rollouts import FinishReason
from sapo.model.policy import Policy
from sapo.rollout.engine import Drawn, Likeliest, Request
from sapo.rollout.params import SamplingParams
from sapo.rollout.stopping import StopRules
from sapo.rollout.vllm.core import VllmCore


def request_seed(seed: int, prompt_id: int, sample: int, drawn: int = 0) -> int:
    """Return 63 bits from (seed, prompt, sample): the only randomness of a completion.

    Args:
        drawn: tokens of the sample that were drawn in earlier turns.

    >>> request_seed(5, 7, 0) == request_seed(5, 7, 0) != request_seed(5, 7, 1)
    True
    """
    whole = 2**64 - 1
    packed = struct.pack("<QQQ", seed & whole, prompt_id & whole, sample)
    packed += struct.pack("<Q", drawn) if drawn else b""
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


@dataclass
class _Row:
    """A sample being drawn."""

    request: int
    sample: int
    stop_set: int
    watched: bool
    """It has stop strings, so that every token is looked at as it comes."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: int = 0
    """Likeliest tokens that are shown beside each drawn one."""
    likeliest: list[Likeliest] = field(default_factory=list)
    finish: FinishReason | None = None
    taken: int = 0
    """Tokens that a stream has given away."""
    told: bool = False
    """A stream has given the completion away."""


class Drawing:
    """One call of generate.

    Token ids end a sample within vLLM. Strings end it here, by the rules that the local engine has: vLLM is given no
    tokenizer, and its own rules read another text where a character is cut into several tokens.

    Args:
        core: with nothing in flight.
        streamed: tokens come as they are drawn.
    """

    def __init__(
        self,
        policy: Policy,
        core: VllmCore,
        requests: Sequence[Request],
        params: SamplingParams,
        streamed: bool = False,
    ) -> None:
        self._core = core
        self._requests = requests
        stop_sets = sorted({r.prompt.stop for r in requests})
        self._rules = StopRules(policy, stop_sets, params.stop_token_ids)
        self._rows: dict[str, _Row] = {}
        for i, request in enumerate(requests):
            stop_set, watched = stop_sets.index(request.prompt.stop), bool(request.prompt.stop)
            for sample in range(request.samples):
                self._rows[f"{i}/{sample}"] = _Row(i, sample, stop_set, watched, top=request.top_logprobs)
        self._unfinished = set(self._rows)
        prompts = [core.prompt(request.prompt) for request in requests]
        for name, row in self._rows.items():
            params_of_row = _vllm_params(requests[row.request], row, params, policy.unused_tokens, streamed)
            core.engine.add_request(name, dict(prompts[row.request]), params_of_row, lora_request=core.lora_request)

    @property
    def unfinished(self) -> bool:
        """Return whether a sample has not ended."""
        return bool(self._unfinished)

    def step(self) -> None:
        """Draw one more token of each sample in vLLM's batch."""
        ended = []
        for output in self._core.step():
            row, (part,) = self._rows[output.request_id], output.outputs
            if self._take(row, part.token_ids, part.logprobs):
                ended.append(output.request_id)
                row.finish = "stop"
            elif part.finish_reason is not None:
                row.finish = "stop" if part.finish_reason == "stop" else "length"
            if row.finish is not None:
                self._unfinished.discard(output.request_id)
        if ended:
            self._core.engine.abort_request(ended)

    def take_new(self) -> list[Drawn]:
        """Return what each sample has drawn since it was asked last."""
        new = []
        for row in self._rows.values():
            if row.told or (row.taken == len(row.token_ids) and row.finish is None):
                continue
            tokens, logprobs = row.token_ids[row.taken :], row.logprobs[row.taken :]
            whole = None if row.finish is None else self._completion(row)
            likeliest = tuple(row.likeliest[row.taken :])
            new.append(Drawn(row.request, row.sample, tuple(tokens), tuple(logprobs), whole, likeliest))
            row.taken, row.told = len(row.token_ids), whole is not None
        return new

    def abort(self) -> None:
        """End what has not ended, so that vLLM keeps nothing of this call."""
        if self._unfinished:
            self._core.engine.abort_request(sorted(self._unfinished))
            self._unfinished.clear()

    def completions(self) -> list[tuple[Completion, ...]]:
        """Return all results, in the order of the requests."""
        rows = iter(self._rows.values())
        return [tuple(self._completion(next(rows)) for _ in range(r.samples)) for r in self._requests]

    def _take(self, row: _Row, token_ids: Sequence[int], logprobs: Sequence[Any]) -> bool:
        """Append new tokens to a row; return whether one of them has completed a stop string."""
        for token, found in zip(token_ids, logprobs, strict=True):
            row.token_ids.append(token)
            row.logprobs.append(found[token].logprob)
            if row.top:
                row.likeliest.append(_likeliest(found, row.top))
            if row.watched and self._rules.ends(row.stop_set, row.token_ids):
                return True
        return False

    def _completion(self, row: _Row) -> Completion:
        assert row.finish is not None, "a sample was lost"
        return Completion(
            token_ids=np.array(row.token_ids, dtype=np.int64),
            logprobs=np.array(row.logprobs, dtype=np.float32),
            finish_reason=row.finish,
            text=self._rules.text(row.stop_set, row.token_ids, self._requests[row.request].prompt.special_tokens),
        )


def _likeliest(found: Mapping[int, Any], count: int) -> Likeliest:
    """Return the likeliest of the tokens that vLLM shows, which are those asked for and the drawn one.

    >>> from types import SimpleNamespace as Shown
    >>> cut = float("-inf")
    >>> _likeliest({7: Shown(logprob=-3.0), 2: Shown(logprob=-0.5), 4: Shown(logprob=-1.0), 9: Shown(logprob=cut)}, 2)
    ((2, -0.5), (4, -1.0))
    """
    shown = ((token, float(of.logprob)) for token, of in found.items() if of.logprob > float("-inf"))
    return tuple(sorted(shown, key=lambda pair: -pair[1])[:count])


def sampling_fields(
    request: Request, sample: int, params: SamplingParams, unused_tokens: Sequence[int] = ()
) -> dict[str, Any]:
    """Return vLLM's sampling parameters of one sample, as JSON has them."""
    never = {"logit_bias": dict.fromkeys(map(str, unused_tokens), -100.0)} if unused_tokens else {}  # its lowest
    return never | {
        "n": 1,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "min_p": params.min_p,
        "seed": request_seed(params.seed, request.prompt.id, request.first_sample + sample, request.drawn),
        "max_tokens": request.limits[sample] if request.limits else params.max_new_tokens,
        "stop_token_ids": sorted(params.stop_token_ids),
        "ignore_eos": True,  # ours are explicit
        "logprobs": request.top_logprobs,  # besides that of the sampled token
        "detokenize": False,
    }


def _vllm_params(
    request: Request, row: _Row, params: SamplingParams, unused_tokens: Sequence[int], streamed: bool
) -> Any:
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.DELTA if row.watched or streamed else RequestOutputKind.FINAL_ONLY
    fields = sampling_fields(request, row.sample, params)
    if unused_tokens:
        fields["logit_bias"] = dict.fromkeys(unused_tokens, -100.0)
    return VllmParams(**fields, output_kind=kind)
