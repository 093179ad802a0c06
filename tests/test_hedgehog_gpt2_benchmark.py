"""The benchmark of Hedgehog on GPT-2, on a toy."""

from __future__ import annotations

import json
import math

import pytest
import torch
import zoo

from benchmarks import hedgehog_gpt2 as benchmark


def test_quick_run_measures_every_attention(tmp_path):
    alphabet = [*"abcdefghijklmnopqrstuvwxyz.,", "Ġ", "Ċ"]
    vocab = {token: index for index, token in enumerate([*alphabet, "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "text.txt").write_text("the cat sat on the mat, the dog did not.\n" * 20)
    (tmp_path / "held.txt").write_text("the dog sat on the cat.\n" * 8)
    paths = [str(tmp_path / name) for name in ("text.txt", "held.txt")]
    given = ["--quick", "--tokenizer", str(tmp_path), "--text", paths[0], "--held", paths[1], "--out", str(tmp_path)]
    found = benchmark.main(given)
    names = [f"{name}, {state}" for name in ("hedgehog", "elu+1") for state in ("untrained", "healed")]
    assert [row["name"] for row in found["rows"]] == ["softmax", "softmax, healed", *names]
    by_name = {row["name"]: row["perplexity"] for row in found["rows"]}
    assert all(1 < value < 1000 for value in by_name.values())
    for name in ("hedgehog", "elu+1"):
        assert by_name[f"{name}, healed"] != by_name[f"{name}, untrained"] != by_name["softmax"]
    assert json.loads((tmp_path / "hedgehog_gpt2.json").read_text()) == found
    assert len((tmp_path / "hedgehog_gpt2.md").read_text().splitlines()) == 2 + 6 + 3


def test_perplexity_is_that_of_all_windows():
    model, ids = zoo.build("gpt2", n_positions=16), zoo.tokens(1, 50)[0]
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in ids[:48].view(3, 16)]
    assert math.log(benchmark.perplexity(model, ids)) == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_gap_closed():
    values = {"softmax, healed": 2.0, "elu+1, healed": 6.0, "hedgehog, healed": 3.0}
    rows = [{"name": name, "perplexity": math.exp(value)} for name, value in values.items()]
    assert benchmark.closed(rows) == pytest.approx(0.75)
