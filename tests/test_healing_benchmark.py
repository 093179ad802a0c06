"""The benchmark of healing, on a toy; and its peer, which computes what we do."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from benchmarks import healing, quadratic


def test_quick_run_measures_every_way(tmp_path):
    rows = healing.main(["--quick", "--out", str(tmp_path)])
    ways = [healing.CHUNKED, healing.QUADRATIC]
    assert [(r["stage"], r["way"]) for r in rows] == [
        *(("attention_transfer", way) for way in ways),
        *(("lora", way) for way in [healing.RECOMPUTED, *ways, healing.SOFTMAX]),
    ]
    assert [r["way"] for r in rows if r.get("planned_gib", 0) > 0] == [healing.RECOMPUTED]
    assert all(r["tokens_per_second"] == pytest.approx(256 / r["seconds"]) for r in rows)
    assert json.loads((tmp_path / "healing.json").read_text())["rows"] == rows
    assert len((tmp_path / "healing.md").read_text().splitlines()) == 2 + len(rows)


def test_what_does_not_fit_is_a_row(tmp_path, monkeypatch):
    def full(way, *args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(healing, "measure", full)
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    rows = healing.main(["--quick", "--out", str(tmp_path), "--only", healing.QUADRATIC])
    assert [row["failed"] for row in rows] == ["does not fit in 80 GiB"] * 2
    assert (tmp_path / "healing.md").read_text().count("does not fit in 80 GiB") == 2


@torch.no_grad()
def test_the_peer_is_our_recipe():
    """Both with the parameters that LoLCATs begin with."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**healing.TOY, vocab_size=97, num_hidden_layers=2, initializer_range=0.3))
    ids = torch.randint(97, (2, 150))
    surgery.apply(model.eval(), "llama/lolcats")
    ours = model(ids).logits
    surgery.revert(model)
    quadratic.install(model, transfer=False)
    assert torch.allclose(model(ids).logits, ours, atol=1e-4)
