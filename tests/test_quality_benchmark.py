"""The driver of quality benchmarks, on a toy, and the rows of the form search."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zoo
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import forms, quality, recipes
from benchmarks.quality import Row
from benchmarks.quality_report import course, ends, gap, report
from surgery.cli import app
from surgery.evaluation import Evaluation, gap_closed
from surgery.recipe import list_recipes, load_recipe

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
    chosen.windows, chosen.no_probes = 3, True
    row = Row("x", "llama/logmass", {"mixer.window.sinks": 4}, seed=2, tokens=1000)
    convert, evaluate = quality.commands(row, chosen)
    assert convert[convert.index("--seed") + 1] == "2" and f"{tmp_path}/a.train.npy" in convert
    sets = [convert[i + 1] for i, word in enumerate(convert) if word == "--set"]
    assert {"mixer.window.sinks=4", "stages.0.tokens=500", "stages.1.tokens=500"} <= set(sets)
    assert evaluate[evaluate.index("--windows") + 1] == "3" and "--no-probes" in evaluate
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


def test_every_recipe_has_its_rows_within_the_budget():
    rows = recipes.rows(4_000_000)
    causal = [name for name in list_recipes() if load_recipe(name).causal]
    assert list(dict.fromkeys(row.recipe for row in rows)) == causal and "bert/hedgehog" not in causal
    kinds: dict[str, list[bool]] = {}
    for row in rows:
        recipe = load_recipe(row.recipe).override(row.settings(quick=False))
        controls = row.recipe.startswith("control/")
        assert sum(stage.tokens for stage in recipe.training) == (2_000_000 if controls else 4_000_000)
        assert all((stage.batch_size, stage.sequence_length) == (8, 1024) for stage in recipe.training)
        assert all(getattr(stage.schedule, "warmup", 0) <= stage.tokens / 8192 / 10 for stage in recipe.training)
        kinds.setdefault(row.recipe, []).append(len(recipe.training) < len(recipe.stages))
        quick = load_recipe(row.recipe).override(row.settings(quick=True))
        assert {stage.tokens for stage in quick.training} == {128}
    # the published gates of Liger cannot set themselves; what has a calibration of its own is also run without
    assert kinds["llama/liger-gla"] == [False] and kinds["llama/calibrated"] == [False, True]


def test_a_recipe_is_run_calibrated_and_its_course_told(toy, tmp_path, capsys, monkeypatch):
    def here(command: list[str], **options) -> subprocess.CompletedProcess:
        assert command[1:3] == ["-m", "surgery.cli"]
        app(command[3:], standalone_mode=False)
        return subprocess.CompletedProcess(command, 0)

    # without a process, whose start takes longest
    monkeypatch.setattr(quality, "subprocess", SimpleNamespace(run=here, STDOUT=subprocess.STDOUT))
    name = "llama-lizard-calibrated"
    with pytest.raises(SystemExit) as stopped:
        recipes.run(
            [*map(str, (toy / "model", toy / "tokens", tmp_path / "out")), "--quick", "--no-probes", "--only", name]
        )
    assert stopped.value.code == 0, capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    stages = result["rows"][name]["stages"]
    assert [stage["kind"] for stage in stages] == ["calibrate", "attention_transfer", "lora"]
    start, moved, end = stages[1]["nll"][0][1], stages[2]["nll"][0][1], stages[2]["nll"][1][1]
    text = (tmp_path / "out" / "results.md").read_text()
    assert f"| {name} | yes | {start:.3f} | {moved:.3f} | {end:.3f} | – |" in text
    assert "Not done, or failed: control-softmax-lora, " in text


def test_a_course_tells_what_is_not_a_number():
    stage = {"kind": "lora", "tokens": 10, "seconds": 2, "losses": [[1, 1.0]], "nll": [[0, 2.0], [1, 1.0]]}
    broken = {**stage, "losses": [[1, float("nan")]]}
    blocks = {**stage, "kind": "attention_transfer", "nll": []}
    rows = {name: {"recipe": "x", "stages": made} for name, made in (
        ("a", [stage]), ("b", [broken]), ("c", [blocks, stage]), ("old", [{**stage, "nll": []}]),
    )}  # fmt: skip
    assert course(rows).splitlines()[2:] == [
        "| a | no | 2.000 | – | 1.000 | – | – | 5 | yes |",
        "| b | no | 2.000 | – | 1.000 | – | – | 5 | NO |",
        "| c | no | – | 2.000 | 1.000 | – | – | 5 | yes |",
    ]
    assert course({"old": rows["old"]}) is None


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
