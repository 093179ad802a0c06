"""The benchmark of near and far layers, on a toy."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import transnormer
from benchmarks.scratch import learn


def test_quick_run_writes_what_it_measured(tmp_path):
    result = transnormer.main(["--quick", "--out", str(tmp_path)])
    names = list(transnormer.orders(8))
    assert [row["order"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert row["nll"] == pytest.approx(sum(row["window_nll"]) / 2, abs=1e-4) and len(row["losses"]) == 1
    assert json.loads((tmp_path / "transnormer.json").read_text())["rows"] == result["rows"]
    text = (tmp_path / "transnormer.md").read_text()
    assert all(f"| {name} | " in text for name in names) and "`diag, then norm` beats `norm, then diag` by" in text
    assert (tmp_path / "transnormer.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="--data"):
        transnormer.main([])


def test_claims_are_those_of_the_numbers():
    def row(order: str, seed: int, nll: float) -> transnormer.Row:
        return {"order": order, "seed": seed, "nll": nll}

    rows = [row("diag, then norm", 0, 1.0), row("norm, then diag", 0, 1.5), row("norm", 0, 1.1)]
    assert transnormer.claim(rows).count(": holds") == 2
    rows += [row("diag, then norm", 1, 1.0), row("norm, then diag", 1, 0.9), row("norm", 1, 1.1)]
    said = transnormer.claim(rows)
    assert "by 0.2000 nats (2 seeds): does not hold" in said and "by 0.1000 nats (2 seeds): holds" in said
    assert transnormer.means(rows)["norm, then diag"][0] == pytest.approx(1.2)
    assert "not run" in transnormer.claim(rows[1:2])


def test_models_learn_what_follows():
    torch.manual_seed(0)
    chosen = transnormer.argparse.Namespace(hidden=16, layers=2, length=16, block=4)
    model = transnormer.build(transnormer.orders(4)["diag, then norm"], chosen, 8)
    assert [type(layer.self_attn.mixer).__name__ for layer in model.model.layers] == ["WindowMixer", "RecurrentMixer"]
    windows = (torch.arange(16) + torch.arange(12)[:, None]) % 8
    losses = learn(model, transnormer.batches(windows, 4, 0), 1e-2, 60)
    assert len(losses) == 60 and losses[-1] < 0.2 * losses[0] and not model.training
