"""The benchmark of several devices, on a toy."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import scaling, scaling_process


def test_quick_run_writes_what_it_measured(tmp_path):
    result = scaling.main(["--quick", "--strategies", "fsdp", "--out", str(tmp_path)])
    rows = result["rows"]
    assert [tuple(row[key] for key in scaling.KEY) for row in rows] == [
        ("toy", "fsdp", 2, stage, length) for stage in (1, 2) for length in (80, 160)
    ]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(2 * 160 / row["seconds"])
        assert len(row["losses"]) == scaling_process.WARM_UP + 2 + 1
        assert 0 < row["communication"] < 1 and row["losses"][0] != row["losses"][-1]
    assert json.loads((tmp_path / "scaling.json").read_text())["rows"] == rows
    assert (tmp_path / "scaling.md").read_text().count("| toy | fsdp | 2 |") == 4
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_two_processes_have_the_losses_of_one(tmp_path):
    arguments = ["--quick", "--curves", "--strategies", "single", "ddp", "--out", str(tmp_path)]
    rows = scaling.main(arguments)["rows"]
    assert [(row["strategy"], row["stage"]) for row in rows] == [("single", 1), ("single", 2), ("ddp", 1), ("ddp", 2)]
    assert all(len(set(row["losses"])) == scaling_process.WARM_UP + 2 + 1 for row in rows)
    assert rows[2]["difference"] < 1e-2 and rows[3]["difference"] < 1e-2
    assert scaling.difference({"stage": 1, "losses": [2 * x for x in rows[0]["losses"]]}, rows) == pytest.approx(1)


def test_a_failure_is_noted_and_the_rest_runs(monkeypatch, capsys):
    codes = iter(["print('ValueError: too large'); exit(1)", "import time; time.sleep(60)"])

    def fake(command, world, folder):
        with (folder / "0.log").open("w") as log:
            return [subprocess.Popen([sys.executable, "-c", next(codes)], stdout=log)]

    monkeypatch.setattr(scaling, "launch", fake)
    cells = [dict.fromkeys(scaling.KEY, 1) | {"length": length} for length in (1, 2)]
    found: list[dict] = []
    scaling.run(cells, {}, 1, found.append)
    assert [(row["length"], row["failed"]) for row in found] == [
        (1, "process 0: ValueError: too large"), (2, "longer than 1 s"),
    ]  # fmt: skip


def test_efficiency():
    cell = {"shape": "1b", "stage": 1, "length": 8}
    rows = [
        cell | {"strategy": "single", "devices": 1, "tokens_per_second": 100},
        cell | {"strategy": "ddp", "devices": 2, "tokens_per_second": 150},
        cell | {"strategy": "ddp", "devices": 4, "failed": "out of memory"},
        cell | {"strategy": "ddp", "devices": 2, "tokens_per_second": 150, "length": 9},
    ]
    assert [scaling.efficiency(row, rows) for row in rows] == [1.0, 0.75, None, None]


def test_shares_of_overlapping_events():
    def event(name, start, end):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))

    events = [event("gemm", 0, 5), event("ncclDevKernel_AllReduce", 3, 8), event("ncclX", 7, 9), event("adam", 9, 10)]
    assert scaling_process.shares(events) == {"communication": 0.6, "exposed": 0.4}
