"""The benchmark of mixtures of domains, on a toy."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import zoo
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import mixing, quality
from surgery.recipe import load_recipe


def test_rows_differ_in_the_second_mixture_alone():
    recipes = {row.name: load_recipe(row.recipe).override(row.settings(False)) for row in mixing.ROWS}
    assert len(recipes) == len(mixing.POLICIES) * len(mixing.SEEDS)
    assert {recipe.stages[0].mixing.tau for recipe in recipes.values()} == {1}
    assert [recipes[f"{name}-0"].stages[1].mixing.kind for name in ("tau-1", "tau-5", "cooldown", "bandit")] == [
        *["temperature"] * 3,
        "bandit",
    ]
    same = [recipe.override({"stages.1.mixing": None}) for recipe in recipes.values()]
    assert all(recipe == same[0] for recipe in same)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> tuple[Path, dict]:
    """Of the hardest row."""
    root = tmp_path_factory.mktemp("mixing")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=zoo.VOCAB, **sizes, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    (root / "tokens").mkdir()
    for seed, (name, length) in enumerate((("code", 200), ("books", 1400))):
        for part in ("train", "val"):
            np.save(root / "tokens" / f"{name}.{part}.npy", zoo.tokens(1, length, seed)[0].numpy())
    where = [str(root / name) for name in ("model", "tokens", "out")]
    with pytest.raises(SystemExit) as stopped:
        quality.main([*where, "--quick", "--only", "bandit-0"], rows=mixing.ROWS, summary=mixing.summary)
    assert stopped.value.code == 0
    return root / "out", json.loads((root / "out" / "results.json").read_text())


def test_a_toy_run(result):
    out, found = result
    assert found["tokens"] == {"code.train": 200, "books.train": 1400}
    assert [stage["kind"] for stage in found["rows"]["bandit-0"]["stages"]] == ["attention_transfer", "lora"]
    assert (out / "results.md").read_text() == mixing.summary(found)


def test_large_and_small_domains_are_told_apart(result):
    found = copy.deepcopy(result[1])
    books, code = (found["rows"]["bandit-0"]["evaluation"]["domains"][f"{name}.val"] for name in ("books", "code"))
    found["rows"]["tau-1-0"] = copy.deepcopy(found["rows"]["bandit-0"])
    books["nll"], code["nll"] = books["nll"] + 0.25, code["nll"] - 0.5
    head, _, first, second = mixing.table(found).splitlines()
    assert head == "| rows drawn by | books, 0.0 M | code, 0.0 M | mean of large | mean of small |"
    assert first.startswith("| tau 1 | ") and "(" not in first
    assert second.startswith("| bandit | ") and second.count("(+0.2500)") == second.count("(-0.5000)") == 2
