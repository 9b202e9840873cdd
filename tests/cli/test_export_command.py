"""An export that cannot be pushed."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.commands import call


def test_a_push_without_a_token_is_refused_before_the_run_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert call("export", str(tmp_path / "none"), str(tmp_path / "out"), "--push", "me/mine") == 2
    err = capsys.readouterr().err
    assert "needs a token" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
