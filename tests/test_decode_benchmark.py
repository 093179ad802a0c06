"""The benchmark of decoding, on a toy."""

from __future__ import annotations

import json

import pytest

from benchmarks import decode


def test_quick_run_writes_what_it_measured(tmp_path, capsys):
    result = decode.main(["--quick", "--out", str(tmp_path), "--device", "cpu", "--recipes", "llama/logmass"])
    rows = result["rows"]
    assert [(r["model"], r["batch"], r["context"]) for r in rows] == [
        ("softmax", 1, 64), ("softmax", 1, 128), ("softmax", 2, 64), ("softmax", 2, 128),
        ("llama/logmass", 1, 128), ("llama/logmass", 2, 128),
    ]  # fmt: skip
    assert all(r["tokens_per_second"] == pytest.approx(r["batch"] / r["ms"] * 1e3) for r in rows)
    # keys and values of one layer in fp32
    assert rows[1]["cache_mib"] * decode.MIB == 2 * 128 * 2 * 8 * 4
    assert json.loads((tmp_path / "decode.json").read_text())["rows"] == rows
    written = (tmp_path / "decode.md").read_text()
    assert all(decode.line(row) in written for row in rows) and result["source"] in written
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_crossover():
    rows = [{"model": "softmax", "batch": 1, "mode": "graph", "context": c, "ms": c / 1000} for c in (1000, 3000)]
    ours = {"model": "x", "batch": 1, "mode": "graph", "context": 3000}
    found = [decode.crossover([*rows, ours | {"ms": ms}], "x", 1, "graph") for ms in (0.5, 2.0, 9.0)]
    assert found == ["below 1000", "2000", "above 3000"]
    assert decode.crossover([*rows, ours | {"skipped": "does not fit"}], "x", 1, "graph") == "not measured"
