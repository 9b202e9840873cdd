"""A stand-in for the pool of renderers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class ElasticRendererPool:
    def __init__(self, tokenizer: str, renderer: Any, *, multiplex: int) -> None:
        self.tokenizer, self.renderer = tokenizer, renderer

    async def grow(self) -> Any:
        assert json.loads(Path(self.tokenizer, "tokenizer.json").read_text())["model"]["unk_token"] == "<pad>"
        stops = [5] if self.renderer == {"name": "of_another"} else []
        return SimpleNamespace(renderer=SimpleNamespace(get_stop_token_ids=lambda: stops))
