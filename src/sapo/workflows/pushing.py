"""Upload an exported model to the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from sapo.errors import ConfigError, StorageError
from sapo.utils.text import first_line


def check_push(repository: str) -> None:
    """Refuse an upload that cannot succeed, before anything is written.

    Args:
        repository: OWNER/NAME.

    Raises:
        ConfigError: no such name can be, the hub may not be asked here, or there is no token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push must be OWNER/NAME: {first_line(error)}") from error
    if repository.count("/") != 1:
        raise ConfigError(f"--push must be OWNER/NAME; got {repository!r}")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"--push {repository} needs the hub, and HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE')} forbids to ask "
            "it; unset that, or leave --push out"
        )
    if get_token() is None:
        raise ConfigError(
            f"--push {repository} needs a token that may write, and there is none; run `hf auth login`, or set HF_TOKEN"
        )


def push(directory: Path, repository: str, *, private: bool, message: str) -> str:
    """Upload a directory as a model, in one commit; the repository is made where there is none.

    Args:
        private: of a repository that is made; one that exists stays as it is.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        StorageError: the hub refused or could not be reached; the directory is whole, and can be pushed again.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        made = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=directory, commit_message=message)
    except (HTTPError, OSError, ValueError) as error:  # errors of the hub are of the one or the other
        raise StorageError(
            f"{directory} was written and not pushed: {first_line(error)}; to try again: hf upload {repository} "
            f"{directory}"
        ) from error
    return str(made)
