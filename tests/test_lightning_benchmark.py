"""The benchmark of tokens a second by length, on a toy."""

from __future__ import annotations

import json

import pytest

from benchmarks import decode, lightning


def test_quick_run_writes_what_it_measured(tmp_path, capsys):
    result = lightning.main(["--quick", "--out", str(tmp_path), "--device", "cpu"])
    rows = result["rows"]
    assert [(r["length"], r["rows"], r["pass"], r["model"]) for r in rows] == [
        (length, 256 // length, which, model)
        for length in (64, 128, 256)
        for which in ("fwd", "fwd+bwd")
        for model in ("lightning", "SDPA flash")
    ]
    assert all(r["tokens_per_second"] == pytest.approx(256 / r["ms"] * 1e3) for r in rows)
    assert json.loads((tmp_path / "lightning.json").read_text())["rows"] == rows
    written = (tmp_path / "lightning.md").read_text()
    assert all(lightning.line(row) in written for row in rows)
    assert result["source"] in written and result["kernels"] in written
    assert (tmp_path / "lightning.png").read_bytes().startswith(b"\x89PNG")
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_constancy():
    rates = {("fwd", "lightning"): (2, 1, 3), ("fwd", "SDPA flash"): (5, 5), ("fwd+bwd", "lightning"): (4,)}
    rates["fwd+bwd", "SDPA flash"] = 7, 14
    rows = [{"pass": p, "model": m, "tokens_per_second": r} for (p, m), found in rates.items() for r in found]
    assert [x["max_over_min"] for x in lightning.constancy(rows)] == [3, 1, 1, 2]


def test_lengths_divide_the_tokens(capsys):
    with pytest.raises(SystemExit):
        lightning.main(["--tokens", "100", "--lengths", "50", "30"])
    assert "--lengths [30]" in capsys.readouterr().err


def test_both_sides_run_alike(monkeypatch):
    """As many tokens whatever the length, and no gradient of the fixed decays."""
    seen = []
    decayed = lightning.kernel_cases.decayed

    def spy(backend):
        def run(q, k, v, gate):
            seen.append((q.shape[0] * q.shape[1], gate.requires_grad, float(gate.max()) < 0))
            return decayed(backend)(q, k, v, gate)

        return run

    monkeypatch.setattr(lightning.kernel_cases, "decayed", spy)
    monkeypatch.setattr(decode, "seconds", lambda step, steps: (step(), 1.0)[1])
    chosen = lightning.arguments(["--quick", "--device", "cpu"])
    for length in chosen.lengths:
        lightning.measure(chosen, length)
    assert set(seen) == {(256, False, True)}
