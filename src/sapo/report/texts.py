"""The text of each token of a completion, by the tokenizer that lies in the run's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sapo.report.runs import ReportedRun


class TokenTexts:
    """Maps token ids to texts that join to what the model wrote; special tokens appear by name.

    Args:
        run: its newest checkpoint, or its model directory, has a tokenizer.json.
        others: further runs. One of the same model and tasks stands in where this run has no checkpoint yet. Where none
            has a tokenizer, a token is shown by its number.
    """

    def __init__(self, run: ReportedRun, others: Sequence[ReportedRun] = ()) -> None:
        self._tokenizer: Any = None
        self.numbers_only = True
        alike = (other for other in others if _vocabulary(other) == _vocabulary(run))
        file = next((found for own in (run, *alike) if (found := tokenizer_file(own)) is not None), None)
        if file is not None:
            from tokenizers import Tokenizer

            try:
                self._tokenizer = Tokenizer.from_file(str(file))
            except Exception:  # the library raises no other class for a damaged file; tokens are shown by number then
                return
            self.numbers_only = False
            added = self._tokenizer.get_added_tokens_decoder()
            self._special = {i: t.content for i, t in added.items() if t.special}

    def of(self, token_ids: Sequence[int]) -> list[str]:
        """Return one text for each token. A token that ends within a character has an empty one; the next has the
        character."""
        if self._tokenizer is None:
            return [f"[{i}]" for i in token_ids]
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        texts = []
        for i in token_ids:
            if i in self._special:
                texts.append(self._special[i])
            else:
                texts.append(stream.step(self._tokenizer, i) or "")
        return texts


def _vocabulary(run: ReportedRun) -> tuple[Any, ...]:
    """Return what decides a run's tokenizer: its model, and the tasks whose characters a cold start's tokenizer has."""
    return tuple(run.setting(key) for key in ("model.path", "model.coldstart", "tasks"))


def tokenizer_file(run: ReportedRun) -> Path | None:
    """Find tokenizer.json of the newest checkpoint, or of the starting model where that is a directory."""
    directories = [*reversed(run.checkpoints)]
    if run.setting("model.path"):
        directories.append(Path(str(run.setting("model.path"))))
    return next((d / "tokenizer.json" for d in directories if (d / "tokenizer.json").is_file()), None)
