"""`surgery evaluate`: tables, files, defaults and refusals; and the picture."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from evaluation_cases import made_up
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

import surgery
from surgery import SurgeryError
from surgery.cli import app
from surgery.evaluation.comparison import compare
from surgery.evaluation.plot import plot, smooth_loss
from surgery.evaluation.report import remarks, tables
from surgery.evaluation.run import is_demo, output_files

DEMO = Path(find_spec("surgery").submodule_search_locations[0]) / "demo"
SHORT = ("--length", "64", "--copy-tokens", "20", "--no-probes", "--device", "cpu")


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny Llama with a tokenizer of single bytes, two conversions of it, and text."""
    root = tmp_path_factory.mktemp("evaluate")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[-1])
    found = {name: root / name for name in ("softmax", "window", "converted", "tokens")}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=255,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(found["softmax"])
    recipe = surgery.load_recipe("llama/liger-gla").override({"mixer.window.size": 8})
    surgery.from_pretrained(found["softmax"], recipe=recipe).save_pretrained(found["converted"])
    window = {"mixer": {"kind": "window", "window": {"size": 8}}}
    surgery.from_pretrained(found["softmax"], recipe=window).save_pretrained(found["window"])
    for name in ("softmax", "window", "converted"):
        tokenizer.save_pretrained(found[name])
    found["text"] = root / "prose.txt"
    found["text"].write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 15)
    found["npy"] = root / "tokens.npy"
    np.save(found["npy"], zoo.tokens(1, 200)[0].numpy())
    return found


def test_a_conversion_beside_its_softmax_model_and_control(folders, tmp_path):
    data = ("--data", folders["text"], "--data", folders["npy"])
    beside = ("--softmax", folders["softmax"], "--control", folders["window"])
    output = run("--model", folders["converted"], *data, *beside, *SHORT, "--out", f"{tmp_path}/new/").output
    numbers, picture = tmp_path / "new" / "evaluation.json", tmp_path / "new" / "evaluation.png"
    for words in ("softmax softmax", "control window", "converted converted", "prose (17)", "tokens (3)", "gap closed"):
        assert words in output
    for words in (
        "keys and values of softmax",
        "fewer than 16 windows: tokens",
        f"wrote {numbers}",
        f"wrote {picture}",
    ):
        assert words in output
    assert "\x1b" not in output
    assert is_png(picture)
    text = (tmp_path / "new" / "evaluation.md").read_text()
    for words in (
        f"# {folders['converted']}",
        "| converted converted, above softmax | +",
        "## gap closed",
        "transformers",
    ):
        assert words in text
    data = json.loads(numbers.read_text())
    assert set(data["result"]["domains"]) == {"prose", "tokens"}
    gap = data["gap_closed"][0]
    parts = (data["result"], data["controls"][0], data["softmax"])
    result, control, softmax = (part["domains"]["prose"]["nll"] for part in parts)
    assert gap["domains"]["prose"]["value"] == pytest.approx((control - result) / (control - softmax))


def test_earlier_runs_are_read_back(folders, tmp_path):
    data = ("--data", folders["text"], *SHORT)
    run("--model", folders["softmax"], *data, "--out", tmp_path / "softmax")
    run("--model", folders["window"], *data, "--out", tmp_path / "window")
    earlier = ("--softmax", tmp_path / "softmax.json", "--control", tmp_path / "window.json")
    run("--model", folders["converted"], *data, *earlier, "--out", tmp_path / "both")
    both, window = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("both", "window"))
    assert both["controls"] == [window["result"]]
    other = ("--model", folders["converted"], "--data", folders["npy"], *SHORT, "--out", tmp_path / "x")
    assert (
        "cannot compare"
        in run(*other, "--softmax", tmp_path / "softmax.json", "--control", tmp_path / "window.json", code=2).stderr
    )
    assert not (tmp_path / "x.json").exists()


def test_a_quick_run_measures_a_little_of_everything(folders, tmp_path):
    tasks = tmp_path / "piqa.jsonl"
    tasks.write_text('{"query": "Question: How cold is it?\\n", "choices": ["cold", "not at all"], "gold": 0}\n' * 30)
    data = ("--data", folders["text"], "--tasks", tasks, "--device", "cpu", "--out", tmp_path / "quick")
    output = run(folders["converted"], *data, "--against", folders["softmax"], "--quick").output
    for words in ("piqa acc_norm (20)", "tokens a second", "branches of the converted model"):
        assert words in output
    data = json.loads((tmp_path / "quick.json").read_text())
    for found in (data["result"], data["softmax"]):
        assert found["domains"]["prose"]["windows"] == 4 and found["length"] == 256
        assert found["tasks"]["piqa"]["metrics"]["acc"]["count"] == 20
        assert {recall["kind"] for recall in found["recall"]} == {"pairs", "needle"}
        assert found["parity"]["kl"]["value"] < 1e-6 and found["speed"]["decode"]["count"] == 2
    assert data["result"]["branches"] and not data["softmax"]["branches"]
    assert (tmp_path / "quick.md").read_text().count("| softmax softmax |") >= 4


def test_tokens_need_no_tokenizer(folders, tmp_path):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folders["softmax"] / file).read_bytes())
    run("--model", tmp_path, "--data", folders["npy"], *SHORT, "--out", tmp_path / "bare")
    assert is_png(tmp_path / "bare.png")
    assert "there is no tokenizer" in run("--model", tmp_path, "--data", folders["text"], *SHORT, code=2).stderr


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((), "no text to evaluate"),
        (("--data", "absent.txt"), "absent.txt: cannot be read: "),
        (("--data", "TEXT", "--tasks", "absent.jsonl"), "absent.jsonl: cannot be read: "),
        (("--data", "TEXT", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("--data", "TEXT", "--length", "4000"), "prose: 1111 tokens hold no window of 4000"),
        (("--data", "TEXT", "--softmax", "absent.json"), "absent.json: cannot be read as an evaluation: "),
        (("--data", "TEXT", "--control", "/nowhere", *SHORT), "cannot load a model from '/nowhere': "),
    ],
)
def test_refusals_are_one_sentence(folders, extra, message):
    extra = [folders["text"] if word == "TEXT" else word for word in extra]
    error = run("--model", folders["softmax"], *extra, code=2).stderr
    # weights may have been loaded before, with transformers' own bar
    assert error.splitlines()[-1].startswith(message)
    assert "Traceback" not in error


def test_the_embedded_model_brings_its_own_text(folders, tmp_path):
    for folder, expected in ((DEMO, True), (folders["softmax"], False)):
        assert is_demo(AutoConfig.from_pretrained(folder)) == expected
    window = {"mixer": {"kind": "window", "window": {"size": 64}}}
    surgery.from_pretrained(DEMO, recipe=window).save_pretrained(tmp_path)
    assert is_demo(AutoConfig.from_pretrained(tmp_path))
    assert is_demo(AutoConfig.from_pretrained(DEMO))


def test_where_files_go(tmp_path):
    assert output_files(str(tmp_path))[0] == tmp_path / "evaluation.json"
    assert output_files("new/")[2] == Path("new/evaluation.png")
    assert output_files("runs/liger.v1") == tuple(Path(f"runs/liger.v1.{end}") for end in ("json", "md", "png"))


def test_a_model_is_named():
    assert run(code=2).stderr.startswith("no model: surgery evaluate MODEL")


# what is shown


def test_an_unused_history_is_said_in_red():
    result = made_up({"a": [2.0] * 20, "b": [2.0]}, attention="gla", history_used=False)
    short, dead = remarks(result)
    assert "fewer than 16 windows: b" in short.plain
    assert "NOT used" in dead.plain and "red" in str(dead.style)
    assert "red" not in str(remarks(made_up({"a": [2.0]}, history_used=True))[-1].style)


def test_one_model_alone_has_no_gap_table():
    titles = [table.title for table in tables(compare(made_up({"a": [2.0, 2.1]})))]
    assert len(titles) == 3 and not any("copies" in title for title in titles)
    assert not any("gap" in title for title in titles)


def test_smoothing_keeps_a_constant_and_follows_a_step():
    flat = made_up({"a": [2.0] * 20}).domains["a"]
    step = [3.0] * 100 + [1.0] * 923

    def curve(values):
        domain = type(flat)(**{**vars(flat), "position_nll": values})
        return smooth_loss(made_up({"a": [2.0] * 20}, domains={"a": domain}))

    assert np.allclose(curve([2.0] * 1023)[1], 2)
    at, loss = curve(step)
    assert np.allclose(loss[at < 80], 3)
    assert np.allclose(loss[at > 125], 1)


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SurgeryError, match=r'pip install "surgery\[plot\]"'):
        plot(compare(made_up({"a": [2.0]})), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_waits_until_it_is_needed():
    code = "import sys, surgery, surgery.evaluation, surgery.evaluation.plot; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
