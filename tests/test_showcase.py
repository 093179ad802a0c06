"""The demo: what healing learned ships and is worth something, and `surgery demo` runs from end to end."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from surgery import SurgeryError, adapters, apply, showcase
from surgery.cli import app
from surgery.evaluation.comparison import read_result
from surgery.evaluation.losses import token_nll
from surgery.recipe import load_recipe
from surgery.showcase import CONTROL, DEMO, RECIPE, Size, run_demo
from surgery.training.data.tokens import windows
from surgery.training.delta import load_delta

ROOT = Path(__file__).resolve().parent.parent
TINY = Size(transfer_steps=2, lora_steps=1, batch_size=1, length=128, characters=20_000, windows=2, new_tokens=8)
SHIPPED = {"healed": RECIPE, "control": CONTROL}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def embedded():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def shipped(name: str):
    model = apply(embedded(), SHIPPED[name])
    load_delta(model, DEMO / f"{name}.safetensors")
    assert adapters.merge(model) == 4 * model.config.num_hidden_layers
    return model


@pytest.fixture(scope="module")
def healed():
    return shipped("healed")


# what ships


def test_healing_is_worth_what_the_readme_says(healed):
    ids = torch.cat([windows(tokens, 1024) for tokens in showcase.held_out(3, 1024).values()])
    models = [embedded(), healed, shipped("control"), apply(embedded(), RECIPE)]
    with torch.no_grad():
        teacher, ours, control, untrained = (float(token_nll(model, ids).mean()) for model in models)
    # the gap from the control to the teacher is 0.25, of which a quarter is closed
    assert teacher < ours < control - 0.03 < untrained - 0.5
    assert 0.15 < (control - ours) / (control - teacher) < 0.5


def test_it_is_small():
    assert sum((DEMO / f"{name}.safetensors").stat().st_size for name in SHIPPED) <= 3_000_000


@pytest.mark.parametrize("name", SHIPPED)
def test_the_record_belongs_to_the_weights(name):
    text = (DEMO / f"{name}.json").read_text(encoding="utf-8")
    assert not re.search(r'"\s*(/|~|[A-Za-z]:\\)', text)
    record = json.loads(text)
    with safe_open(DEMO / f"{name}.safetensors", "pt") as file:
        assert json.loads(file.metadata()["recipe"]) == record["recipe"]
    assert record["recipe"]["mixer"] == load_recipe(SHIPPED[name]).to_dict()["mixer"]


def test_the_control_is_matched():
    ours, control = (json.loads((DEMO / f"{name}.json").read_text(encoding="utf-8")) for name in SHIPPED)
    assert ours["recipe"]["mixer"]["window"] == control["recipe"]["mixer"]["window"]
    assert (ours["data"], ours["validation"]) == (control["data"], control["validation"])
    last, only = ours["recipe"]["stages"][-1], control["recipe"]["stages"][-1]
    assert {key for key in last if last[key] != only[key]} == {"trains"}


# the demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder that two small demos wrote to, and what the second one showed and returned."""
    out = tmp_path_factory.mktemp("demo") / "out"
    (out / "healed").mkdir(parents=True)
    (out / "healed" / "mine.txt").write_text("kept")
    run_demo(out, lambda shown: None, size=TINY)
    shown: list = []
    return out, shown, run_demo(out, shown.append, size=TINY)


def test_writes_what_it_names_and_nothing_else(demo):
    out, shown, written = demo
    mine = out / "healed" / "mine.txt"
    assert {path for path in out.rglob("*") if path.is_file()} == {*written, mine}
    assert mine.read_text() == "kept"
    assert shown[-len(written) :] == [f"  {path}" for path in written]


def test_shows_the_losses_falling(demo):
    lines = [line for line in demo[1] if isinstance(line, str)]
    assert [line for line in lines if re.match(r"  step 2/2  transfer_loss \d", line)]
    assert [line for line in lines if re.match(r"  step 1/1  loss \d", line)]
    (summary,) = [line for line in lines if line.startswith("attention_transfer: held-out loss ")]
    first, last = re.findall(r"(\d\.\d+) after step", summary)
    assert float(last) < float(first)


def test_the_numbers_and_the_picture(demo):
    out = demo[0]
    result = read_result(out / "evaluation.json")
    data = json.loads((out / "evaluation.json").read_text())
    assert result.model == "converted, healed on a GPU"
    assert [control["model"] for control in data["controls"]] == [
        "window only, trained",
        "converted, untrained",
        "converted, healed here",
    ]
    assert data["softmax"]["model"] == "softmax teacher"
    assert [gap["control"] for gap in data["gap_closed"]] == ["window only, trained"]
    assert all(domain.history is not None for domain in result.domains.values())
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert {"transfer_loss", "loss"} <= set((out / "metrics.csv").read_text().splitlines()[0].split(","))


def test_the_healed_model_loads_from_its_folder(demo, healed):
    folder = demo[0] / "healed"
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(showcase.PROMPT * 5, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, healed(ids).logits)


def test_the_continuation_is_the_same_every_time(healed):
    text = showcase._continue(healed, 8)
    assert text.startswith(showcase.PROMPT) and len(text) > len(showcase.PROMPT)
    assert showcase._continue(healed, 8) == text


def test_heals_on_nothing_that_is_measured(tmp_path):
    showcase.write_library(tmp_path / "text.jsonl", 10**9)
    text = (tmp_path / "text.jsonl").read_text(encoding="utf-8")
    assert "class ArgumentParser" in text  # the library itself is there
    assert "class AbstractContextManager" not in text  # contextlib.py is held out


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(showcase, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "out", lambda shown: None, size=TINY)
    assert not list(tmp_path.iterdir())


def test_says_at_once_that_matplotlib_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert (result.exit_code, result.stderr) == (2, 'no plot without matplotlib: pip install "surgery[plot]"\n')
    assert not list(tmp_path.iterdir())


def test_refuses_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(SurgeryError, match="out is a file: name a folder with --out"):
        run_demo(tmp_path / "out", size=TINY)


def test_make_knows_it():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo: \$\(STAMP\)\n\t\$\(BIN\)/surgery demo --out demo-output$", makefile, re.MULTILINE)
    assert "demo-output/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()
