"""Limits worked out by hand, marks at goals, and a document whose hand-written parts stay."""

from __future__ import annotations

import pytest
from bench.limits import Rates, Shape, decode_seconds, train_seconds
from bench.scaling import slope
from bench.sides.clock import describe_gemms, parse_gemms

from bench import report

# No attention to speak of: one head of dimension 0.
SHAPE = Shape(layers=2, block=10, block_read=30, head=7, heads=1, kv_heads=1, head_dim=0)
FAST_MEMORY = Rates(flops=1.0, read=1e9)


def test_a_decoding_step_costs_its_products_where_memory_is_fast():
    # Prompt of 3 tokens: 3 * 2 * 20. First tokens of both rows: 2 rows * 2 * 7. Then one row has two tokens more:
    # 2 * 2 * (20 + 7).
    expected = 3 * 40 + 2 * 14 + 2 * 54
    assert decode_seconds(SHAPE, [3], [[1, 3]], FAST_MEMORY, 4) == pytest.approx(expected)


def test_a_decoding_step_costs_its_reading_where_memory_is_slow():
    slow = Rates(flops=1e9, read=1.0)
    # Three steps, each of which reads 2 * 30 + 7 weights of 4 bytes; with experts all are read.
    assert decode_seconds(SHAPE, [3], [[1, 3]], slow, 4) == pytest.approx(3 * 67 * 4)


def test_an_update_costs_six_operations_per_weight_and_token():
    # Prompt once: 3 tokens; responses of 1 and 3 tokens have 0 and 2 inputs. Head on all 4 response tokens.
    expected = 6 * 20 * (3 + 2) + 6 * 7 * 4
    assert train_seconds(SHAPE, [3], [[1, 3]], FAST_MEMORY, 1) == pytest.approx(expected, rel=1e-5)


def test_experts_are_counted_by_those_a_token_goes_through():
    config = {
        "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3,
        "vocab_size": 11, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 5,
    }  # fmt: skip
    shape = Shape.of(config)
    attention, expert, router = 2 * 4 * 2 * 3, 3 * 4 * 5, 4 * 8
    assert shape.block == attention + 2 * expert + router
    assert shape.block_read == attention + 8 * expert + router
    assert shape.head == 44


def result(ours: list[float], peer: list[float]) -> dict:
    def side(seconds: list[float]) -> dict:
        return {"seconds": seconds, "work": 100, "peak": 2**30, "facts": [], "backends": "MKL SGEMM 100%"}

    facts = {"float32": 2e11, "bfloat16": 4e11, "read": 2e10, "float32_by": "oneDNN linear"}
    return {
        "name": "rollout-tiny",
        "title": "rollout, tiny",
        "unit": "tokens",
        "limit": None,
        "settings": {},
        "machine": [facts],
        "about": {"date": "2026-01-01", "cpu": "a CPU", "device": "cpu", "threads": 1, "torch": "2"},
        "sides": {
            "sapo float32": side(ours),
            "generate float32": side(peer),
            "vLLM float32": {"seconds": [], "facts": [], "error": "no such file"},
        },
    }


def test_a_goal_is_judged_by_the_median_of_the_ratios():
    (met, gone) = report.lines_of(result([1.0, 1.0, 2.0], [5.0, 5.1, 2.0]))
    assert (met.goal, met.mark) == (5.0, "met")
    assert met.cells()[3:] == ("5.00 x", "1.00 x .. 5.10 x", "5 x", "met")
    assert gone.cells()[3:5] == ("could not run", "no such file")
    (missed, _) = report.lines_of(result([1.0, 1.0, 1.0], [4.9, 4.8, 9.0]))
    assert missed.mark == "missed"


def test_the_document_keeps_what_is_written_around_the_marks(tmp_path, monkeypatch):
    document = tmp_path / "benchmarks.md"
    document.write_text(f"by hand, above\n{report.BEGIN}\nold\n{report.END}\nby hand, below\n")
    quick = result([1.0], [9.0])
    quick["about"]["quick"] = True
    monkeypatch.setattr(report, "load_results", lambda _: [quick, result([1.0], [4.0])])
    report.write_document(tmp_path, document)
    text = document.read_text()
    assert text.startswith("by hand, above\n")
    assert text.endswith("\nby hand, below\n")
    assert "old" not in text
    assert "Goals: 0 of 1 met" in text
    assert "Not measured: rollout-135m, sapo float32 against generate float32; " in text
    assert "rollout-tiny, sapo float32 against" not in text
    assert "| rollout, tiny | sapo float32 | generate float32 | 4.00 x | one round | 5 x | **missed** |" in text
    assert "200 GFLOP/s in float32 (fastest by oneDNN linear) and 400 in bfloat16, and read 20.0 GB/s" in text
    monkeypatch.setattr(report, "load_results", lambda _: [quick])
    report.write_document(tmp_path, document)
    assert "Goals: 0 of 0 met" in document.read_text()
    document.write_text("no marks")
    with pytest.raises(ValueError, match="must hold the lines"):
        report.write_document(tmp_path, document)


def test_a_peak_that_was_not_seen_gives_no_ratio():
    memory = result([1.0], [1.0]) | {"name": "head-49k-memory"}
    memory["sides"] = {"sapo float32": {"beyond": 0}, "TRL float32": {"beyond": 2**30}}
    [line] = report.lines_of(memory)
    assert (line.ratios, line.goal, line.mark) == ([], 10.0, "")


def test_gemms_are_told_apart_by_the_time_they_took():
    heard = (
        "MKL_VERBOSE oneMKL 2024\n"
        "MKL_VERBOSE SGEMM(T,N,8,8,8,0x7f,0x7f) 300.00us CNR:OFF Dyn:1 FastMM:1 TID:0  NThr:1\n"
        "onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core_bf16,undef,src:bf16,attr,,64x64,0.1\n"
        "onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:f32,attr,,64x64,9.0\n"
    )
    seconds = parse_gemms(heard)
    assert seconds == pytest.approx({"MKL SGEMM": 3e-4, "oneDNN brg_matmul:avx512_core_bf16": 1e-4})
    assert describe_gemms(seconds) == "MKL SGEMM 75%, oneDNN brg_matmul:avx512_core_bf16 25%"


def test_the_slope_of_a_power_is_its_exponent():
    sizes = [2.0**k for k in range(8)]
    assert slope(sizes, [3 * s**0.5 for s in sizes]) == pytest.approx(0.5)
    assert slope([1.0, 4.0], [1.0, 2.0]) == pytest.approx(0.5)  # as few sizes as a quick run has


def test_the_meter_leaves_the_loop_as_it_was():
    from bench.overhead import Meter

    import sapo.run.journal

    before, meter = sapo.run.journal.rollout_metrics, Meter()
    meter.around(sapo.run.journal, "rollout_metrics")
    assert sapo.run.journal.rollout_metrics is not before
    meter.remove()
    assert sapo.run.journal.rollout_metrics is before
