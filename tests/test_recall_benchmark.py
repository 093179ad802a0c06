"""The benchmark of recall from scratch, on a toy."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import recall


def test_quick_run_writes_what_it_measured(tmp_path):
    result = recall.main(["--quick", "--only", "delta", recall.SOFTMAX, "--out", str(tmp_path)])
    assert {row["mixer"] for row in result["rows"]} == {"delta", recall.SOFTMAX}
    for row in result["rows"]:
        assert list(row["accuracy"]) == ["2", "4"] and all(0 <= share <= 1 for share in row["accuracy"].values())
        assert row["seconds"] > 0 and row["training_loss"] == pytest.approx(row["losses"][0], abs=1e-4)
    assert json.loads((tmp_path / "recall.json").read_text())["rows"] == result["rows"]
    text = (tmp_path / "recall.md").read_text()
    assert "| delta | 128 |" in text and "| softmax | all keys |" in text and "was not checked" in text
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_states_are_of_one_size_and_everything_learns():
    setup = recall.Setup(hidden=32, words=16)
    for name in recall.MIXERS:
        model = recall.build(name, setup)
        size, spare = recall.state_numbers(model), 32 if name == "linear" else 0  # its normaliser
        assert size == 2 * 16 * 16 + spare, name
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert recall.state_numbers(recall.build(recall.SOFTMAX, setup)) is None


def test_what_is_learned_is_the_value_said_before():
    setup = recall.Setup(words=16, counts=(3, 4), rows=5, steps=2)
    for (ids, labels), count in zip(recall.batches(setup, "cpu"), (3, 4), strict=True):
        assert ids.shape == (5, 4 * count) and (ids[:, 1::2] >= 16).all() and (ids[:, ::2] < 16).all()
        assert (labels != -100).sum(1).tolist() == [count] * 5
        for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
            value = dict(zip(row[: 2 * count : 2], row[1 : 2 * count : 2], strict=True))
            asked = [at for at, label in enumerate(wanted) if label != -100]
            assert [wanted[at] for at in asked] == [value[row[at]] for at in asked]


def row(mixer: str, rate: float, loss: float, right: float) -> recall.Row:
    return {"mixer": mixer, "rate": rate, "training_loss": loss, "accuracy": {"64": right}}


def test_the_rate_of_the_lowest_training_loss_counts():
    rows = [row("delta", 1, float("nan"), 1.0), row("delta", 2, 0.5, 0.9), row("delta", 3, 0.6, 0.95)]
    rows += [row("gla", 1, 0.7, 0.8), {"mixer": "gla", "rate": 2, "failed": "why"}]
    found = recall.best(rows)
    assert {name: kept["rate"] for name, kept in found.items()} == {"gla": 1, "delta": 2}
    assert "was not checked" in recall.claim(found, "64")
    assert recall.claim(found | {"linear": row("linear", 1, 1.0, 0.1)}, "64").endswith("holds.")
    assert recall.claim(found | {"linear": row("linear", 1, 1.0, 0.85)}, "64").endswith("does not hold.")


def test_every_mixer_gets_a_gradient_from_the_task():
    setup = recall.Setup(hidden=32, words=16, counts=(4,), rows=2, steps=1)
    ids, labels = next(recall.batches(setup, "cpu"))
    for name in (*recall.MIXERS, recall.SOFTMAX):
        torch.manual_seed(0)
        model = recall.build(name, setup)
        logits = model(ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        queries = model.model.layers[1].self_attn.q_proj.weight.grad
        assert queries is not None and queries.isfinite().all() and queries.abs().max() > 0, name
