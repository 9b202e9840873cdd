"""Pictures of a run in its directory, in the token view and on the page of an evaluation."""

from __future__ import annotations

import base64
import gzip
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from sapo.config.recipes import load_recipe
from sapo.data.thumbnails import Thumbnails, thumbnail
from sapo.report import make_report, write_page
from sapo.report.pictures import kept_picture
from sapo.utils.hashing import content_hash
from sapo.workflows.evaluate import EvaluatedModel
from sapo.workflows.evaluation_plan import plan_evaluations
from sapo.workflows.train import train
from support.browser import CHROMIUM, MISSING
from support.pictures import picture
from support.report_page import Visit
from support.vision_recipes import write_vision_recipe

in_browser = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on pictures and text."""
    directory = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        recipe = write_vision_recipe(directory, train__steps=2, log__rollouts_every=1)
        return train(load_recipe(recipe)).directory


def rows_of(run: Path) -> list[dict]:
    files = sorted((run / "rollouts").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_each_picture_is_kept_once_by_its_hash(run: Path) -> None:
    shown = {h for row in rows_of(run) for h in row.get("pictures", ())}
    kept = list((run / "pictures").iterdir())
    assert {file.stem for file in kept} == shown
    assert len(shown) == 8  # four a step, of two steps
    assert all(file.suffix == ".png" and content_hash(file.read_bytes()) == file.stem for file in kept)
    pictured = [row for row in rows_of(run) if row.get("pictures")]
    # 48 x 16 pixels in cells of 16: three tokens in one row.
    figures = {(*r["picture_sizes"][0], *r["picture_tokens"], *r["picture_grids"][0]) for r in pictured}
    assert figures == {(48, 16, 3, 1, 3)}
    assert kept_picture(run, "../config") is None


def test_a_run_that_keeps_none_has_their_hashes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"train__steps": 1, "log__rollouts_every": 1, "log__keep_pictures": False}
    made = train(load_recipe(write_vision_recipe(tmp_path, **options))).directory
    assert not (made / "pictures").exists()
    assert any(row.get("pictures") for row in rows_of(made))
    assert make_report([made]).tokens.thumbnails == {}


def test_the_token_view_has_each_picture_of_its_prompts(run: Path) -> None:
    view = make_report([run]).tokens
    prompts = [
        p
        for c in view.chunks
        for p in json.loads(gzip.decompress(base64.b64decode(c.data)))["prompts"]
        if "pictures" in p
    ]
    assert {p["pictures"][0]["hash"] for p in prompts} == set(view.thumbnails)
    assert all(
        p["pictures"][0] | {"hash": ""} == {"hash": "", "size": [48, 16], "token": 3, "grid": [1, 3]} for p in prompts
    )


def test_a_thumbnail_is_small_and_a_small_picture_is_itself() -> None:
    large, small = picture(0, 640, 320), picture(1, 24, 16)
    for shown, size in ((large, (64, 32)), (small, (24, 16))):
        head, _, body = thumbnail(shown).partition(",")
        assert head in ("data:image/png;base64", "data:image/jpeg;base64")
        assert Image.open(io.BytesIO(base64.b64decode(body))).size == size


def test_thumbnails_stay_within_their_budget_and_what_is_gone_is_left_out() -> None:
    pictures = [picture(i, 64, 64) for i in range(20)]
    each = len(thumbnail(pictures[0]))
    thumbnails = Thumbnails(budget=5 * each)
    for shown in [*pictures, *pictures]:
        thumbnails.add(shown.sha256, lambda shown=shown: shown)
    assert 0 < len(thumbnails.uris) < 20
    assert sum(map(len, thumbnails.uris.values())) <= 5 * each
    thumbnails = Thumbnails()
    thumbnails.add("gone", lambda: None)
    assert thumbnails.uris == {}


@in_browser
def test_the_report_shows_a_picture_as_one_cell_without_a_request(visit: Visit, run: Path, tmp_path: Path) -> None:
    page = visit.open(write_page(make_report([run]), tmp_path / "report.html"))
    name = page.evaluate(
        "(() => { const s = document.querySelector('#token-prompt'); "
        "const o = [...s.options].find((o) => / =/.test(o.text)); "
        "s.value = o.value; s.dispatchEvent(new Event('change')); return o.value; })()"
    )
    assert name is not None
    (cell,) = page.query_selector_all(".question .picture")
    assert cell.inner_text().split() == ["3", "tokens,", "1×3"]
    assert "48 × 16 pixels" in cell.get_attribute("title")
    page.wait_for_timeout(200)
    image = cell.query_selector("img")
    assert page.evaluate("(i) => [i.naturalWidth, i.naturalHeight]", image) == [48, 16]
    assert visit.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in visit.requests)


@in_browser
def test_the_page_of_an_evaluation_shows_them_too(visit: Visit, run: Path, tmp_path: Path) -> None:
    (planned,) = plan_evaluations(run, ["picture_sums"], [], problems=8, samples=2, max_new_tokens=4)
    planned.run(EvaluatedModel.load(run), out=tmp_path / "eval")
    visit.page.goto((tmp_path / "eval" / "index.html").as_uri())
    visit.page.wait_for_timeout(200)
    (image,) = visit.page.query_selector_all(".pictures img")
    assert visit.page.evaluate("(i) => i.naturalWidth", image) == 48
    assert visit.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in visit.requests)
