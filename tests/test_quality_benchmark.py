"""The driver of quality benchmarks, on a toy, and the rows of the form search."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import zoo
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import forms, quality
from benchmarks.quality import Row
from benchmarks.quality_report import ends, gap, report
from surgery.evaluation import Evaluation, gap_closed
from surgery.recipe import load_recipe

FORMS = Path(forms.__file__).parent / "results" / "forms.json"
ROWS = """
- {name: teacher}
- {name: logmass, recipe: llama/logmass, set: {mixer.window.size: 8}, seed: 3, tokens: 1_000_000}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quality")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=zoo.VOCAB, **sizes, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    (root / "tokens").mkdir()
    for seed, part in enumerate(("train", "val")):
        np.save(root / "tokens" / f"books.{part}.npy", zoo.tokens(1, 1100, seed)[0].numpy())
    (root / "rows.yaml").write_text(ROWS)
    return root


def run(toy: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        quality.main(
            [*map(str, (toy / "rows.yaml", toy / "model", toy / "tokens", toy / "out")), "--quick", *more]
            + ["--results", str(toy / "results" / "toy")]
        )
    return stopped.value.code


def test_a_toy_run_is_gathered_and_not_repeated(toy, capsys, monkeypatch):
    assert run(toy, "--only", "logmass") == 0, capsys.readouterr().out
    rows = json.loads((toy / "results" / "toy.json").read_text())["rows"]
    assert list(rows) == ["logmass"]
    found = rows["logmass"]
    assert (found["recipe"], found["seed"], found["tokens"]) == ("llama/logmass", 3, 1_000_000)
    assert [stage["tokens"] for stage in found["stages"]] == [128, 128] and found["minutes"] > 0
    assert found["evaluation"]["provenance"]["source"] and found["evaluation"]["branches"]
    assert "window 8" in found["evaluation"]["attention"]
    # what is there is not run again; the other row is, as far as this test goes, done elsewhere
    teacher = {"name": "teacher", "recipe": None, "changes": {}, "seed": 0, "tokens": None, "stages": []}
    (toy / "out" / "teacher.json").write_text(json.dumps(found | teacher))
    monkeypatch.setattr(quality.subprocess, "run", lambda *a, **k: pytest.fail("run again"))
    assert run(toy) == 0
    gathered = {path.suffix: path for path in (toy / "results").iterdir()}
    assert set(gathered) == {".json", ".md", ".png"}
    result = json.loads(gathered[".json"].read_text())
    assert list(result["rows"]) == ["teacher", "logmass"] and "torch" in result["environment"]
    text = gathered[".md"].read_text()
    assert "| logmass | llama/logmass | 3 |" in text and "| logmass, above softmax | +0.000 ± 0.000 |" in text
    assert gathered[".png"].read_bytes().startswith(b"\x89PNG")
    (toy / "rows.yaml").write_text(ROWS.replace("seed: 3", "seed: 4"))
    assert "is of other settings" in run(toy)


def test_a_row_that_fails_is_said_to(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality, "commands", lambda row, chosen: [[sys.executable, "-c", "raise SystemExit('why')"]])
    with pytest.raises(SystemExit) as stopped:
        quality.main([str(toy / "model"), str(toy / "tokens"), str(tmp_path)], rows=[Row("a"), Row("b")])
    output = capsys.readouterr().out
    assert stopped.value.code == 1 and output.count("FAILED\nwhy") == 2
    assert not list(tmp_path.glob("*.json"))


def test_commands_say_all_that_a_row_is(tmp_path):
    for part in ("train", "val"):
        (tmp_path / f"a.{part}.npy").touch()
    chosen = argparse.Namespace(model=Path("m"), tokens=tmp_path, out=tmp_path, quick=False, tasks=["piqa"])
    row = Row("x", "llama/logmass", {"mixer.window.sinks": 4}, seed=2, tokens=1000)
    convert, evaluate = quality.commands(row, chosen)
    assert convert[convert.index("--seed") + 1] == "2" and f"{tmp_path}/a.train.npy" in convert
    sets = [convert[i + 1] for i, word in enumerate(convert) if word == "--set"]
    assert {"mixer.window.sinks=4", "stages.0.tokens=500", "stages.1.tokens=500"} <= set(sets)
    assert evaluate[evaluate.index("--tasks") + 1] == "piqa" and f"{tmp_path}/a.train.npy" not in evaluate
    (tmp_path / "models" / "x").mkdir(parents=True)
    (tmp_path / "models" / "x" / "healing.json").touch()
    assert quality.commands(row, chosen) == [evaluate]
    assert [command[3:5] for command in quality.commands(Row("y"), chosen)] == [["evaluate", "m"]]


def test_rows_of_the_form_search_fit_their_recipes():
    names = [row.name for row in forms.ROWS]
    assert len(set(names)) == len(names)
    for row in forms.ROWS:
        assert row.control is None or row.control in names
        for quick in (False, True):
            recipe = load_recipe(row.recipe).override(row.settings(quick))
            assert not quick or {stage.tokens for stage in recipe.stages} == {128}


def test_gaps_are_those_of_the_evaluations(capsys):
    rows = json.loads(FORMS.read_text())
    softmax, common = ends(rows)
    assert (softmax, common) == ("softmax-ce", "window-ce")
    found = {name: Evaluation.from_dict(rows[name]["evaluation"]) for name in (softmax, common, "logmass")}
    ratio = gap_closed(found["logmass"], found[common], found[softmax]).mean
    assert gap(found, "logmass", common, softmax) == ratio and gap(found, common, common, softmax) is None
    quality.main(["--show", str(FORMS)])
    shown = capsys.readouterr().out
    assert shown == report(rows)
    line = next(line for line in shown.splitlines() if line.startswith("| logmass |"))
    assert f"{100 * ratio.value:.1f} ± {100 * ratio.stderr:.1f} %" in line
    assert any(line.startswith("| per-head |") and "3.5323" in line for line in shown.splitlines())
