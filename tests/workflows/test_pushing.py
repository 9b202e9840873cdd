"""`sapo export --push`: what is uploaded, and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from sapo.errors import ConfigError, StorageError
from sapo.workflows.pushing import check_push, push


class Hub:
    """A hub that keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.error: Exception | None = None

    def create_repo(self, repository: str, **options) -> str:
        self.calls.append(("create", repository, options))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, **options) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return made


def test_a_directory_is_uploaded_to_a_repository_that_is_made_private(hub: Hub, tmp_path: Path) -> None:
    assert push(tmp_path, "me/mine", private=True, message="step 4") == "https://huggingface.co/me/mine"
    assert hub.calls == [
        ("create", "me/mine", {"private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/mine", "folder_path": tmp_path, "commit_message": "step 4"}),
    ]


def test_what_the_hub_refuses_is_one_line_with_the_way_to_try_again(hub: Hub, tmp_path: Path) -> None:
    hub.error = OSError("403 Forbidden\nmore")
    with pytest.raises(StorageError, match=r"written and not pushed: 403 Forbidden; .* hf upload me/mine") as refused:
        push(tmp_path, "me/mine", private=True, message="")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/..", "me/mi ne", ""])
def test_a_name_that_cannot_be_is_refused(hub: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    with pytest.raises(ConfigError, match="--push must be OWNER/NAME"):
        check_push(name)


def test_without_a_token_or_a_hub_it_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"needs a token that may write.*hf auth login"):
        check_push("me/mine")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    check_push("me/mine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        check_push("me/mine")
