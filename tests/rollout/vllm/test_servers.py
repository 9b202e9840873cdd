"""vLLM's own server, started by a run and by hand: its log-probabilities follow the policy's weights.

Everything else about servers is shown on fake ones (tests/rollout/servers, tests/run/test_servers_killed.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

from sapo.config import RolloutConfig
from sapo.errors import ConfigError
from sapo.rollout.servers.client import Client
from sapo.rollout.servers.engine import ServerEngine
from sapo.rollout.servers.guard import TOKEN
from sapo.run.directory import RunDirectory
from support import processes
from support.engine_cases import flat, params, plain_logprobs, ragged_requests
from support.plain_models import plain_copy
from support.runs import metrics, write_model, write_recipe
from support.servers import SERVE, free_port, wait_for
from support.vllm_cases import SHAPE, disturb, needs_vllm, wide_policy

pytestmark = needs_vllm

TOLERANCE = 1e-4


def test_a_whole_run_on_a_server_of_its_own_samples_with_the_policys_weights(tmp_path: Path) -> None:
    """Tied head and experts: both kinds of layer whose packed copies a sync leaves behind on a CPU."""
    changes = {
        "rollout__engine": "vllm",
        "rollout__servers": 1,
        "rollout__vllm": {"kv_cache_gib": 0.25},
        "rollout__parity_every": 1,
        "prompt": {"stop": ["%"]},
        "train__steps": 4,
        "train__learning_rate": 1e-2,
        "train__warmup_steps": 0,
    }
    write_recipe(tmp_path, **changes)
    write_model(tmp_path / "model", "qwen3_moe", **SHAPE, intermediate_size=64, tie_embeddings=True)
    process = processes.start("train", "recipe.yaml", cwd=tmp_path)
    output, _ = process.communicate(timeout=900)  # vLLM alone takes a minute to start where others work
    assert process.returncode == 0, output
    assert "is lost" not in output
    run = tmp_path / "run"
    parity = [m for m in metrics(run) if m["kind"] == "parity"]
    assert len(parity) == 4
    assert max(m["log_ratio/max_abs"] for m in parity) < TOLERANCE
    [check] = [m for m in metrics(run) if m["kind"] == "self_check"]
    assert (check["old_logprobs"], check["equal"]) == ("engine", True)
    assert "Application startup complete" in (run / "engines" / "00.log").read_text()
    assert RunDirectory.read_config(run).rollout.servers == 1


def test_a_server_at_a_given_address_takes_changed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = wide_policy("qwen3", tie_embeddings=True)
    policy.save(tmp_path)
    monkeypatch.setenv(TOKEN, "of this test")
    address = f"http://127.0.0.1:{free_port()}"
    options = [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--no-enable-chunked-prefill",
        "--max-num-batched-tokens",
        "4096",
    ]
    command = [sys.executable, "-m", SERVE, str(tmp_path), "--port", address.rpartition(":")[2], *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(command, env=environment, stderr=log, stdout=log, start_new_session=True)
    try:
        wait_for(address, process)
        assert Client(address).guarded()
        settings = RolloutConfig(engine="vllm", servers=[address], max_new_tokens=16)
        with pytest.raises(ConfigError, match=f"got layers 2 at {address} and 3 here"):
            ServerEngine(wide_policy("qwen3", layers=3), settings)
        with closing(ServerEngine(policy, settings)) as engine:
            for update in range(3):
                engine.set_weights(policy.weights(), update)
                requests = ragged_requests()
                drawn = engine.generate(requests, params())
                assert largest_gap(policy, requests, drawn) < TOLERANCE
                disturb(policy, seed=update)
            Client(address).start_update(60)  # by a run that was killed then
            engine.set_weights(policy.weights(), 3)
            assert largest_gap(policy, requests, engine.generate(requests, params())) < TOLERANCE
            again = engine.generate(requests, params())
            assert {tuple(c.token_ids) for c in flat(again)} == {
                tuple(c.token_ids) for c in flat(engine.generate(requests, params()))
            }
        with closing(ServerEngine(policy, settings)) as engine:  # the next run
            engine.set_weights(policy.weights(), 0)
            assert largest_gap(policy, requests, engine.generate(requests, params())) < TOLERANCE
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


@torch.no_grad()
def largest_gap(policy, requests, drawn) -> float:
    plain = plain_copy(policy.model)
    return max(
        float((torch.tensor(c.logprobs) - plain_logprobs(plain, asked.prompt.token_ids, c, 1.0)).abs().max())
        for asked, group in zip(requests, drawn, strict=True)
        for c in group
    )
