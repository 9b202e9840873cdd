"""The section `cluster` of a recipe: what it says in other words, and what it refuses."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from sapo.config import ConfigError, RunConfig
from sapo.config.recipes import override_run, parse_recipe
from sapo.errors import ClusterError
from sapo.utils.ray_cluster import require_ray
from sapo.workflows.cluster import room


def recipe(**sections: Any) -> RunConfig:
    return parse_recipe({"model": {"path": "m"}, "tasks": [{"name": "arithmetic"}], "train": {"steps": 1}, **sections})


def test_trainers_are_ranks_and_engines_are_processes() -> None:
    config = recipe(cluster={"kind": "ray", "trainers": 3, "engines": 2})
    assert (config.train.ranks, config.cluster.trainers) == (3, None)
    assert config.rollout.run_in == "process"
    assert parse_recipe(config.model_dump(mode="json")) == config


def test_every_process_but_the_driver_has_room_and_a_gpu_where_the_run_has() -> None:
    config = recipe(cluster={"kind": "ray", "trainers": 3, "engines": 2}, device="cpu")
    assert room(config) == [{"CPU": 1}] * 4
    assert room(config.model_copy(update={"device": "cuda"})) == [{"CPU": 1, "GPU": 1}] * 4


def test_a_run_of_a_cluster_may_go_on_without_one() -> None:
    config = recipe(run_dir="runs/x", cluster={"kind": "ray", "trainers": 3, "engines": 2})
    resumed = override_run(config, ["cluster.kind=none", "cluster.engines=0"])
    assert (resumed.train.ranks, resumed.rollout.run_in) == (3, "process")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"cluster": {"trainers": 2}}, "trainers needs kind: ray; got trainers 2"),
        ({"cluster": {"engines": 2}}, "engines needs kind: ray; got engines 2"),
        ({"cluster": {"kind": "ray", "trainers": 0}}, "cluster.trainers: input should be greater than or equal to 1"),
        (
            {"cluster": {"kind": "ray", "address": "head"}},
            "must be auto, local, HOST:PORT or ray://HOST:PORT; got 'head'",
        ),
        (
            {"cluster": {"kind": "ray", "trainers": 2}, "train": {"steps": 1, "ranks": 3}},
            "cluster.trainers is another name of train.ranks; got 2 and 3",
        ),
        (
            {"cluster": {"kind": "ray", "trainers": 3}, "train": {"steps": 1, "replicas": 2}},
            "ranks must be a multiple of replicas; got 3 and 2",
        ),
        (
            {"cluster": {"kind": "ray", "engines": 2}, "rollout": {"run_in": "thread"}},
            "cluster.engines draw in processes of the cluster; got 2 with rollout.run_in=thread",
        ),
    ],
)
def test_what_contradicts_itself_is_one_line(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe(**sections)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("found", [None, ModuleSpec("ray", None)], ids=["nothing", "a directory called ray"])
def test_a_machine_without_ray_is_told_what_to_install(
    found: ModuleSpec | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)
    with pytest.raises(
        ClusterError, match=r"needs the package ray, which is not installed; pip install 'sapo-rl\[ray\]'"
    ):
        require_ray()
