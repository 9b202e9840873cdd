"""That a first look at a GPU gets through all its parts, on a CPU in small."""

import json

from bench.gpu import PARTS, main


def test_every_part_runs_and_is_written_down(tmp_path, capsys):
    main(["all", "--device", "cpu", "--quick", "--results", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == list(PARTS)
    assert all(line["seconds"] > 0 and line["about"]["torch"] for line in lines)
    assert len(capsys.readouterr().out.splitlines()) == len(PARTS)
