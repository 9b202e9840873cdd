"""What a Ray cluster cannot do for a run is one line, and leaves nothing; and the GPU that a driver is given."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import sapo
from sapo.config.recipes import load_recipe
from sapo.errors import ClusterError
from sapo.utils.ray_cluster import RayCluster
from support.processes import PATIENCE, start
from support.ray_cases import TwoNodes, needs_ray, two_nodes
from support.runs import write_recipe

pytestmark = [needs_ray, pytest.mark.scale]


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    """GPUs that are not there: Ray counts what it is told, and nothing here computes on one."""
    with two_nodes(num_gpus=2) as cluster:
        yield cluster


def test_a_command_that_asks_for_more_than_the_cluster_has_ends_in_one_line(nodes: TwoNodes, tmp_path: Path) -> None:
    settings = ["cluster.kind=ray", f"cluster.address={nodes.address}", "cluster.trainers=7", "cluster.wait_seconds=1"]
    process = start("train", str(write_recipe(tmp_path)), *settings, cwd=tmp_path)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, output
    assert output.count("\n") == 1, output
    assert "the run needs 0 GPUs and 6 CPUs for its processes; the Ray cluster at" in output
    assert "has 2 GPUs and 2 CPUs, of which 2 GPUs and 2 CPUs are free" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("failures", [2, 3])
def test_a_client_server_that_dies_at_its_start_is_asked_for_again(
    failures: int, nodes: TwoNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is what Ray 2.60 says where the fork of a client server has died."""
    ray = pytest.importorskip("ray")
    real, seen = ray.init, []

    def init(**settings: object) -> object:
        seen.append(settings)
        if len(seen) <= failures:
            raise ConnectionAbortedError(
                "Initialization failure from server:\nRuntimeError: Starting Ray client server failed. See the log."
            )
        return real(**settings)

    monkeypatch.setattr(ray, "init", init)
    if failures == 2:
        RayCluster(nodes.address, [{"CPU": 1}], wait_seconds=10).close()
    else:
        with pytest.raises(ClusterError, match=r"failed 3 times .* GRPC_ENABLE_FORK_SUPPORT=0 in the environment"):
            RayCluster(nodes.address, [{"CPU": 1}], wait_seconds=10)
    assert len(seen) == 3
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:{free}", r"cluster.address must be that of a Ray cluster; 127.0.0.1:\d+ does not answer"),
        ("ray://127.0.0.1:{free}", r"ray://127.0.0.1:\d+ does not answer"),
        ("ray://no-such-host.invalid:10001", r"ray://no-such-host.invalid:10001 does not answer"),
        ("auto", r"127.0.0.1:\d+ does not answer"),
    ],
)
def test_an_address_that_does_not_answer_is_refused(
    address: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        free = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free}")  # what auto comes to
    recipe = write_recipe(tmp_path, cluster__kind="ray", cluster__address=address.format(free=free))
    with pytest.raises(ClusterError, match=words):
        sapo.train(load_recipe(recipe))
    assert not (tmp_path / "run").exists()
    assert not pytest.importorskip("ray").is_initialized()


def test_a_driver_gets_a_gpu_of_its_own_node_that_no_rank_has(nodes: TwoNodes) -> None:
    room = [{"CPU": 1, "GPU": 1}]
    with closing(RayCluster(nodes.address, room, wait_seconds=30, own_gpu=True)) as cluster:
        rank = cluster.start(0, "rank 1")
        assert rank.wait_until_started() is None
        assert {cluster.own_device, f"cuda:{rank.gpus()}"} == {"cuda:0", "cuda:1"}
        with pytest.raises(ClusterError, match="and one GPU must be on the driver's own node"):
            RayCluster(nodes.address, room, wait_seconds=0.5, own_gpu=True)
