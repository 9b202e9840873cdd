"""States of the engine's rows: a prompt's go to all its samples, and rows that come and go take theirs along."""

from __future__ import annotations

import pytest
import torch

from sapo.model.state_tree import KeptStates
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.local.row_states import RowStates
from support.engine_cases import assert_same, flat, params, plain_logprobs, ragged_requests, random_ids, request
from support.recurrent_cases import FAMILIES, make_pair

# Three stop tokens end rows early; five rows hold the largest group and no second one.
MAX_ROWS = 5


@pytest.mark.parametrize(
    ("family", "behind"),
    [(f, "a preamble") for f in FAMILIES] + [(f, "nothing") for f in ("qwen3_5_text", "lfm2", "bamba", "jamba")],
)
def test_drawn_logprobs_are_those_of_the_models_own_forward(family: str, behind: str) -> None:
    policy, model = make_pair(family)
    asked = ragged_requests()
    if behind == "a preamble":
        shared = random_ids(20, seed=50)
        asked = [request((*shared, *r.prompt.token_ids), r.samples, r.prompt.id) for r in asked]
    drawn = LocalEngine(policy, MAX_ROWS).generate(asked, params(temperature=0.8))
    lengths = {len(c) for c in flat(drawn)}
    assert len(lengths) > 3, "rows end at many lengths"
    for one, completions in zip(asked, drawn, strict=True):
        for completion in completions:
            expected = plain_logprobs(model, one.prompt.token_ids, completion, 0.8)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text", "lfm2", "falcon_h1", "jamba"])
def test_rows_retired_and_admitted_draw_what_all_rows_at_once_draw(family: str) -> None:
    policy, _ = make_pair(family)
    asked = ragged_requests()
    together, in_turn = (flat(LocalEngine(policy, n).generate(asked, params())) for n in (64, MAX_ROWS))
    for a, b in zip(together, in_turn, strict=True):
        assert_same(a, b)


def test_rows_begin_with_the_states_of_their_prompts_and_take_them_along() -> None:
    place = (3, 0)
    prompts = KeptStates({place: torch.arange(6.0).view(2, 3, 1)}, {place: torch.tensor([[10.0], [20.0]])})
    rows = RowStates(4)
    rows.fill(torch.tensor([0, 1, 2]), prompts, torch.tensor([0, 0, 1]))
    # By hand: two samples of the first prompt, one of the second, and a row nobody has.
    assert rows.kept.states[place][:, 0].tolist() == [10.0, 10.0, 20.0, 0.0]
    rows.move(source=torch.tensor([2]), target=torch.tensor([0]))
    assert rows.kept.states[place][:, 0].tolist() == [20.0, 10.0, 20.0, 0.0]
    assert rows.kept.windows[place][0].tolist() == [[3.0], [4.0], [5.0]]
    # Windows of 4 rows, 3 tokens and 1 channel, and 4 states of one number, in float32.
    assert rows.kept.num_bytes == 4 * (4 * 3 + 4)
