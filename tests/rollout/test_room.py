"""Rows that a pretended free memory has room for."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config

from sapo.rollout.local import engine as local
from sapo.rollout.local import room
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.local.room import rows_with_room, token_bytes
from support.engine_cases import assert_same, flat, params, ragged_requests

GIB = 2**30
# Qwen3-0.6B in bfloat16: 2 x 28 layers x 8 heads x 128 x 2 bytes = 114,688 a token, by hand.
CONFIG = Qwen3Config(
    num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, hidden_size=1024
)
POLICY = SimpleNamespace(
    model=SimpleNamespace(config=CONFIG), dtype=torch.bfloat16, device=torch.device("cuda"), decoder=None
)


@pytest.fixture
def card(monkeypatch):
    """card(gib): a GPU with so much free memory."""

    def pretend(gib):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (int(gib * GIB), int(gib * GIB)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 0)

    return pretend


def test_a_token_of_qwen3_takes_what_its_heads_take():
    assert token_bytes(POLICY) == 114_688


@pytest.mark.parametrize(
    ("gib", "new_tokens", "rows"),
    # 24 GiB: 0.8 of it over 114,688 (1024 + 2 x 300 / 8) + 20 x 1024 bytes is 163 rows, so 128; of 4096 tokens 43: 32.
    [(24, 1024, 128), (24, 4096, 32), (80, 1024, 256), (80, 4096, 128), (1, 4096, 8)],
)
def test_rows_fit_a_card(card, gib, new_tokens, rows):
    card(gib)
    found = rows_with_room(POLICY, 256, new_tokens, prompt_tokens=300, samples=8)
    assert found == rows
    taken = found * (114_688 * (new_tokens + 2 * 300 / 8) + 20 * new_tokens)
    assert taken <= 0.8 * gib * GIB or found == 8


def test_a_cpu_decodes_as_many_rows_as_it_is_told(policies):
    assert rows_with_room(policies("qwen3"), 10**6, 10**6, 10**6, 1) == 10**6


def test_rows_are_counted_when_the_joined_weights_have_their_room(policies, monkeypatch):
    order, make = [], local.decoder_of
    monkeypatch.setattr(local, "decoder_of", lambda *a: (order.append("weights"), make(*a))[1])
    monkeypatch.setattr(local, "rows_with_room", lambda _policy, rows, *_: (order.append("rows"), rows)[1])
    engine = LocalEngine(policies("qwen3"), 256)
    order.clear()
    engine.generate(ragged_requests()[:1], params(max_new_tokens=2))
    assert order == ["weights", "rows"]


def test_fewer_rows_draw_the_same(policies, monkeypatch):
    policy, settings = policies("qwen3"), params(max_new_tokens=8)
    expected = LocalEngine(policy, 256).generate(ragged_requests(), settings)
    monkeypatch.setattr(local, "rows_with_room", lambda _policy, rows, *_: min(rows, 6))
    for mine, other in zip(
        flat(LocalEngine(policy, 256).generate(ragged_requests(), settings)), flat(expected), strict=True
    ):
        assert_same(mine, other)
    assert room.free_bytes(policy.device) is None
