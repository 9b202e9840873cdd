"""Which device and precision a run gets, with GPUs that are only pretended, and what it records of them."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from sapo import load_recipe
from sapo.config import RunConfig
from sapo.config.recipes import parse_recipe
from sapo.errors import ConfigError
from sapo.front.train import make_config
from sapo.run import machine
from sapo.run.directory import RunDirectory
from sapo.run.inputs import absolute_paths
from sapo.run.machine import DECIDING_BITS, provenance, resolve_device, resolve_machine
from sapo.workflows.comparing.directory import ComparisonDirectory, check_directory
from sapo.workflows.comparing.plan import ComparisonPlan
from sapo.workflows.comparing.worker import check_same_run


@pytest.fixture
def two_gpus(monkeypatch):
    pretend_gpus(monkeypatch)


def pretend_gpus(monkeypatch):
    """Pretend that torch finds two GPUs with bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = SimpleNamespace(name="A card", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "mps:0"])
def test_devices_that_training_cannot_use_are_refused_in_one_line(device):
    with pytest.raises(ConfigError, match=rf"device must be auto, cpu, cuda or cuda:N; got '{device}'") as caught:
        resolve_device(device)
    assert "\n" not in str(caught.value)


def test_a_gpu_beyond_the_last_is_refused(two_gpus):
    assert resolve_device("cuda:1") == "cuda:1"
    assert resolve_device("auto") == "cuda"
    with pytest.raises(ConfigError, match="'cuda:7' was asked for but this machine has 2 CUDA devices"):
        resolve_device("cuda:7")


def recipe(tmp_path, *lines):
    """A recipe of a pretrained model, read from a file as a run reads it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "\n".join(
            [
                "tasks: [{name: sums}]",
                "train: {steps: 1, learning_rate: 1.0e-4}",
                "model:",
                "  path: some/model",
                *lines,
            ]
        )
        + "\n"
    )
    return load_recipe(str(path))


@pytest.mark.parametrize(
    ("lines", "device", "dtype"),
    [
        ([], "cuda", "bfloat16"),
        ([], "auto", "bfloat16"),
        ([], "cpu", "float32"),
        (["  dtype: float32"], "cuda", "float32"),
        (["  dtype: bfloat16"], "cpu", "bfloat16"),
        (["  lora: {rank: 4}"], "cuda", "float32"),
    ],
)
def test_a_gpu_computes_in_bfloat16_unless_the_recipe_names_a_precision(tmp_path, two_gpus, lines, device, dtype):
    config = resolve_machine(recipe(tmp_path, *lines, f"device: {device}", "threads: 1"))
    assert config.model.dtype == dtype
    # As it is written, so that a run resumed elsewhere computes in the same.
    again = RunConfig.model_validate(config.model_dump(mode="json"))
    assert resolve_machine(again.model_copy(update={"device": "cpu"})).model.dtype == dtype


def test_a_precision_that_nobody_named_stays_open_however_a_recipe_is_passed_on(tmp_path, two_gpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    config = recipe(tmp_path, "device: cuda", "threads: 1").model_copy(update={"run_dir": str(tmp_path / "run")})
    local = config.model_copy(update={"model": config.model.model_copy(update={"path": "here"})})
    assert absolute_paths(local).model.path == str(tmp_path / "here")
    plan = ComparisonPlan.of("c", config, {"a": {}, "b": {"model.lora": {"rank": 4}}}, learning_rates=[1e-4], seeds=[0])
    sent, adapter = (
        parse_recipe(json.loads(json.dumps(r.config.model_dump(mode="json")))) for r in plan.runs(tmp_path)
    )
    for passed in (absolute_paths(local), make_config(config, overrides={}), sent, RunConfig(**config.model_dump())):
        assert resolve_machine(passed).model.dtype == "bfloat16"
    assert resolve_machine(adapter).model.dtype == "float32"

    # A name stays a name, and what is written down is what the run computes in.
    named = recipe(tmp_path, "  dtype: float32", "device: cuda", "threads: 1")
    assert resolve_machine(make_config(named, overrides={})).model.dtype == "float32"
    RunDirectory.create(resolve_machine(config)).close()
    assert RunDirectory.read_config(tmp_path / "run").model.dtype == "bfloat16"
    check_same_run(tmp_path / "run", config)
    with pytest.raises(ConfigError, match=r'model.dtype="?bfloat16"? where the comparison has "?float32'):
        check_same_run(tmp_path / "run", named)


def test_a_comparison_whose_precision_an_earlier_version_wrote_down_goes_on(tmp_path, monkeypatch):
    config = recipe(tmp_path, "device: auto", "threads: 1")
    plan = ComparisonPlan.of("c", config, {"a": {}}, learning_rates=[1e-4], seeds=[0])
    earlier = plan.to_json()
    assert "dtype" not in earlier["recipe"]["model"]
    earlier["recipe"]["model"]["dtype"] = "float32"
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(earlier))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ComparisonDirectory.open(tmp_path, plan).close()
    assert yaml.safe_load((tmp_path / "comparison.yaml").read_text()) == earlier, "nothing has changed on a CPU"
    pretend_gpus(monkeypatch)
    with pytest.raises(ConfigError, match=r'recipe.model.dtype="?float32"? where this one has "?bfloat16'):
        check_directory(tmp_path, plan)


@pytest.mark.parametrize(("major", "dtype"), [(7, "float32"), (8, "bfloat16")])
def test_a_card_that_only_emulates_bfloat16_computes_in_float32(tmp_path, two_gpus, monkeypatch, major, dtype):
    # A T4 is 7.5 and a V100 7.0, where torch.cuda.is_bf16_supported() says True. The card that is asked is the run's.
    cards = {"cuda:1": SimpleNamespace(major=major), "cuda:0": SimpleNamespace(major=15 - major)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.get)
    assert resolve_machine(recipe(tmp_path, "device: cuda:1", "threads: 1")).model.dtype == dtype


def test_the_gpu_is_part_of_what_decides_the_bits(two_gpus):
    assert "gpu" not in provenance("cpu")
    gpu = provenance("cuda:1")["gpu"]
    assert (gpu["name"], gpu["architecture"], gpu["cuda"]) == ("A card", "9.0", torch.version.cuda)
    assert "gpu" in DECIDING_BITS
    assert machine.gpu_identity(torch.device("cuda", 0)) == gpu
