"""Shell completion as a shell asks for it: bash itself runs the script that `sapo --show-completion bash` prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sapo.cli.completion import (
    complete_comparison,
    complete_model,
    complete_objective,
    complete_recipe,
    complete_reported,
    complete_rounded,
    complete_run,
    complete_task,
)

# How bash cuts a line into words: at blanks, and at the characters of COMP_WORDBREAKS, each a word of its own.
SCRIPT = r"""
source <(sapo --show-completion bash)
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
COMP_LINE="${{COMP_WORDS[*]}}"
COMP_POINT=${{#COMP_LINE}}
_sapo_completion sapo
printf '%s\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `sapo` in it, of this Python and this source."""
    directory = tmp_path_factory.mktemp("bin")
    file = directory / "sapo"
    file.write_text(f"#!{sys.executable}\nimport sys\nfrom sapo.cli import main\nsys.argv[0] = 'sapo'\nmain()\n")
    file.chmod(0o755)
    return directory


def bash(program: Path, cwd: Path, *words: str) -> list[str]:
    """What bash would offer for the last word."""
    quoted = " ".join("'" + word + "'" for word in words)
    result = subprocess.run(
        ["bash", "--norc", "-c", SCRIPT.format(words=quoted)],
        cwd=cwd,
        env={**os.environ, "PATH": f"{program}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.split()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with two runs, a model and some files."""
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine.yaml").write_text("seed: 0\n")
    (tmp_path / "comparisons" / "mine").mkdir(parents=True)
    (tmp_path / "comparisons" / "mine" / "comparison.yaml").write_text("arms: {one: {}, other: {}}\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("")
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("sapo", "tr"), ["train"]),
        (("sapo", "train", "quick"), ["quickstart", "quickstart_vllm"]),
        (("sapo", "train", "vis"), ["vision_quickstart"]),
        (("sapo", "train", "vision_quickstart", "model.coldstart.tasks", "="), ["first", "all"]),
        (("sapo", "train", "min"), ["mine.yaml"]),
        (("sapo", "resume", "runs/s"), ["runs/second"]),
        (("sapo", "generate", "models/m"), ["models/mine"]),
        (("sapo", "train", "quickstart", "train.warm"), ["train.warmup_steps="]),
        (("sapo", "train", "quickstart", "objective.tau_p"), ["objective.tau_pos="]),
        # "objective.name=gsp" as bash cuts it, and with the cursor right behind the "="
        (("sapo", "train", "quickstart", "objective.name", "=", "gsp"), ["gspo", "gspo_token"]),
        (("sapo", "train", "quickstart", "train.schedule", "="), ["constant", "linear", "cosine"]),
        (("sapo", "train", "quickstart", "tasks.0.name", "=", "ar"), ["arithmetic"]),
        (("sapo", "train", "--dry"), ["--dry-run"]),
        (("sapo", "plan", "qwen3_3"), ["qwen3_30b_a3b_sapo"]),
        (("sapo", "plan", "qwen3_4b_sapo", "train.context"), ["train.context_parallel="]),
        (("sapo", "plan", "--gpu-"), ["--gpu-memory"]),
        (("sapo", "compare", "paper_fig4", "--arms", "gr"), ["grpo_r2", "grpo"]),
        (("sapo", "compare", "paper_fig6", "--arms", "gr"), ["grpo_r2"]),
        (("sapo", "compare", "paper_fig4", "--arms", "grpo,gr"), ["grpo,grpo_r2"]),
        (("sapo", "compare", "comparisons/mine", "--baseline", ""), ["one", "other"]),
        (("sapo", "compare", "comparisons/mine", "--arms", "other,one", "--baseline", "o"), ["other", "one"]),
        (("sapo", "compare", "quickstart", "--baseline", "g"), ["gspo", "grpo"]),
        (("sapo", "compare", "quickstart", "--objectives", "grpo,gmpo", "--baseline", "g"), ["grpo", "gmpo"]),
        (("sapo", "compare", "nothing", "--arms", ""), []),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else None,
)
def test_bash_offers(words: tuple[str, ...], offered: list[str], program: Path, place: Path) -> None:
    assert bash(program, place, *words) == offered


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_sections_and_settings_are_told_apart(program: Path, place: Path) -> None:
    offered = bash(program, place, "sapo", "train", "quickstart", "t")
    assert offered == ["threads=", "tasks.", "train."]


def test_zsh_and_fish_get_the_whole_word(program: Path, place: Path) -> None:
    # They do not cut at "=": the word replaced is the whole of it.
    environment = {**os.environ, "_SAPO_COMPLETE": "complete_zsh", "OMP_NUM_THREADS": "1"}
    environment["_TYPER_COMPLETE_ARGS"] = "sapo train quickstart objective.name=gsp"
    result = subprocess.run([program / "sapo"], cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert '"objective.name=gspo"' in result.stdout
    assert '"objective.name=gspo_token"' in result.stdout


def test_names_of_files_are_offered_with_the_directories_on_the_way(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert complete_run("") == ["runs/first", "runs/second", "comparisons/", "models/", "runs/"]
    assert complete_model("models/") == ["models/mine"]
    assert complete_task("row") == ["rows.jsonl"]
    assert complete_recipe("no") == []
    assert complete_comparison("comp") == ["comparisons/mine", "comparisons/"]
    assert complete_comparison("paper_fig5") == ["paper_fig5"]
    assert complete_reported("comp") == ["comparisons/mine", "comparisons/"]
    assert complete_reported("runs/s") == ["runs/second"]
    assert complete_rounded("float8_e4") == ["float8_e4m3fn"]
    assert complete_objective("sapo,gsp") == ["sapo,gspo", "sapo,gspo_token"]
    assert {"quickstart", "moe_quickstart", "mine.yaml"} <= set(complete_recipe(""))


def test_completing_files_does_not_load_the_library() -> None:
    code = "import sys, sapo.cli, sapo.cli.completion as c; c.complete_recipe(''); c.complete_run('')"
    code += "; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
