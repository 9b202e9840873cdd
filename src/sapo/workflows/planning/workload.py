"""The tokens of a step, as they are dealt to ranks and cut into micro-batches, every completion at its full length."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sapo.config import RunConfig
from sapo.data import Prompt
from sapo.errors import ConfigError
from sapo.model.flex import padded_length
from sapo.rollout.local.cache import KVCache
from sapo.training.batch import cut_groups
from sapo.workflows.activations import Counts, full_length_group, pack_groups


@dataclass(frozen=True)
class Workload:
    """What a step draws and trains on.

    >>> Workload(1, 6, 4, 3, 4, 1, 1, Counts(14, 15, 21, 63, 63), 12, 20, 40, 30.0).sequences
    4
    """

    prompts: int
    prompt_tokens: int
    samples: int
    new_tokens: int
    rows: int
    """Sequences decoded together."""
    rank_groups: int
    """Groups of one update that the fullest rank is dealt, or the ranks that share its micro-batches."""
    microbatches: int
    """Micro-batches of one update on the rank that has the most."""
    largest: Counts
    """Size of the largest micro-batch."""
    targets: int
    """Response tokens of it."""
    padded_tokens: int
    """Its tokens as the attention of a GPU pads them."""
    cache_places: int
    """Tokens that the local engine's cache has room for, in each layer."""
    pairs: float
    """Queries and keys that attend to each other in a step, over all sequences."""

    @property
    def sequences(self) -> int:
        """Return the completions of a step."""
        return self.prompts * self.samples

    @property
    def response_tokens(self) -> int:
        """Return the drawn tokens of a step."""
        return self.sequences * self.new_tokens

    @property
    def packed_tokens(self) -> int:
        """Return the tokens of a step that go through the model, each prompt once."""
        return self.prompts * self.prompt_tokens + self.sequences * (self.new_tokens - 1)


def workload_of(config: RunConfig, prompt_tokens: int, path: str = "packed", chunk: int = 0) -> Workload:
    """Return the work of a recipe's step.

    Args:
        prompt_tokens: of each prompt; a plan has no tokenizer to count them with.
        path, chunk: `Policy.path` and `Policy.chunk_tokens` of the model.

    Raises:
        ConfigError: there is no such prompt.
    """
    if prompt_tokens < 1:
        raise ConfigError(f"--prompt-tokens must be 1 or more; got {prompt_tokens}; 512 is the default")
    rollout, train = config.rollout, config.train
    samples, length = rollout.samples_per_prompt, rollout.max_new_tokens
    sharing = train.ranks // train.context_parallel if train.ranks > 1 else 1
    groups = rollout.prompts_per_step // train.minibatches
    of_rank = -(-groups // sharing)
    prompt = Prompt(0, "plan", "", (0,) * prompt_tokens)
    one = full_length_group(prompt, samples, length)
    cut = cut_groups([replace(one) for _ in range(of_rank)], train.tokens_per_microbatch)
    largest = max(cut, key=lambda part: sum(prompt_tokens + len(g.completions) * (length - 1) for g in part))
    apart = [
        full_length_group(Prompt(i, "plan", "", (i, *(0,) * (prompt_tokens - 1))), len(g.completions), length)
        for i, g in enumerate(largest)
    ]
    batch = pack_groups(apart, 2**62, length).microbatches[0]
    rows = min(rollout.prompts_per_step * samples, max(rollout.max_rows, samples))
    cache = KVCache(rows, length, [prompt_tokens] * rollout.prompts_per_step, [samples] * rollout.prompts_per_step)
    pairs = rollout.prompts_per_step * (
        prompt_tokens * (prompt_tokens + 1) / 2 + samples * (length - 1) * (prompt_tokens + length / 2)
    )
    return Workload(
        prompts=rollout.prompts_per_step,
        prompt_tokens=prompt_tokens,
        samples=samples,
        new_tokens=length,
        rows=rows,
        rank_groups=of_rank,
        microbatches=len(cut),
        largest=Counts.of(batch, path, chunk),
        targets=batch.num_targets,
        padded_tokens=padded_length(batch.num_tokens),
        cache_places=cache.num_places,
        pairs=pairs,
    )
