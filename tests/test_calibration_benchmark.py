"""The benchmark of calibrated starts, on a toy."""

from __future__ import annotations

import json

import pytest

from benchmarks import calibration


def test_quick_run_writes_what_it_measured(tmp_path):
    names = ["norm", "gated_scalar, mamba2"]
    result = calibration.main(["--quick", "--only", *names, "--out", str(tmp_path)])
    assert [row["mixer"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
        assert row["error_after"] < row["error_before"]
    assert json.loads((tmp_path / "calibration.json").read_text())["rows"] == result["rows"]
    text = (tmp_path / "calibration.md").read_text()
    risen = [row["mixer"] for row in result["rows"] if row["difference"] > 0]
    assert ("raised no loss" in text) == (not risen) and all(f"| {name} | " in text for name in names)
    with pytest.raises(SystemExit):
        calibration.main([])
