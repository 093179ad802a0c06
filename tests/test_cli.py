"""The command line: what it prints, how it fails, and that it starts fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.panel import Panel
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    set_seed,
)
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.doctor import Check, check_kernels, relative_error
from surgery.recipe import list_recipes, recipe_path

PACKAGE = Path(surgery.__file__).parent


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer of single bytes."""
    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[-1]).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_starts_without_heavy_imports():
    # the package itself imports torch; the command line adds nothing to that until a command runs
    code = f"""
import sys, types
package = types.ModuleType("surgery")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["surgery"] = package
import surgery.cli
heavy = {{"torch", "transformers", "lightning", "peft", "matplotlib", "pydantic", "yaml"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_version():
    assert run("--version").output == f"surgery {surgery.__version__}\n"


def test_help_lists_the_commands():
    output = run("--help").output
    for command in ("recipes", "inspect", "import", "export", "generate", "doctor"):
        assert command in output


# recipes


def test_recipes_lists_all_plainly_when_not_a_terminal():
    output = run("recipes").output
    for name in list_recipes():
        assert name in output
    assert output.isascii()
    assert "\x1b" not in output
    assert len(output.splitlines()) == len(list_recipes()) + 1


def test_recipes_shows_one_as_it_is_written():
    assert run("recipes", "llama/lolcats").output == recipe_path("llama/lolcats").read_text(encoding="utf-8")


def test_an_unknown_recipe_is_one_clean_line():
    result = run("recipes", "lama/lolcats", code=2)
    assert result.stderr == (
        "no recipe named 'lama/lolcats'; did you mean 'llama/lolcats'? "
        f"`surgery recipes` lists all {len(list_recipes())}\n"
    )
    assert result.stdout == ""


def test_mistakes_in_a_file_are_all_shown(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mixr: {kind: lineer}\n")
    lines = run("recipes", str(path), code=2).stderr.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{path}:1"] * 2


# inspect


def test_inspect_prints_every_layer_and_loads_no_weights(folder, tmp_path):
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    output = run("inspect", "--model", str(tmp_path), "--recipe", "llama/lolcats").output
    for index in range(3):
        assert f"model.layers.{index}.self_attn" in output


def test_inspect_says_through_what_and_refuses_what_is_not_supported(folder, tmp_path):
    from transformers import GptOssConfig, MambaConfig

    assert "through LlamaAttention (families)" in run("inspect", str(folder)).output
    GptOssConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    output = run("inspect", "-m", str(tmp_path)).output
    assert "through GptOssAttention (families); leaves out the sinks of its softmax" in output
    MambaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    error = run("inspect", "-m", str(tmp_path), code=2).stderr
    assert error.startswith("MambaForCausalLM (mamba) cannot be converted: it has no attention")


def test_inspect_takes_the_recipe_that_fits(tmp_path):
    from transformers import BertConfig, T5Config, ViTConfig

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    for config, attention in ((BertConfig, "BertSelfAttention"), (ViTConfig, "ViTAttention")):
        config(**small).save_pretrained(tmp_path)
        output = run("inspect", str(tmp_path)).output
        assert attention in output and "bidirectional, hedgehog" in output
    assert "encoders take the mixer bidirectional" in run("inspect", str(tmp_path), "-r", "llama/gla", code=2).stderr
    T5Config(num_layers=2).save_pretrained(tmp_path)
    assert "a learned term for the distance" in run("inspect", str(tmp_path), code=2).stderr
    for given in ((), (str(tmp_path), "-m", str(tmp_path))):
        assert run("inspect", *given, code=2).stderr.startswith("name one model")


def test_inspect_as_json_with_changes(folder):
    arguments = ("inspect", "-m", str(folder), "-r", "llama/lolcats", "--layers", "0,-1", "--json")
    full = json.loads(run(*arguments).stdout)
    small = json.loads(run(*arguments, "--set", "mixer.window.size=32").stdout)
    assert [layer["converted"] for layer in full["layers"]] == [True, False, True]
    assert small["state_bytes"] < full["state_bytes"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--set", "mixer.windo.size=3"), "override: mixer.windo: unknown key; did you mean 'window'?"),
        (("--set", "mixer.window"), "--set mixer.window: expected KEY=VALUE"),
        (("--set", "mixer.window=[1"), "--set mixer.window:1: not plain YAML"),
        (("--layers", "one"), "--layers one: expected numbers separated by commas"),
        (("--layers", "7"), "layers [7] do not exist"),
    ],
)
def test_inspect_refuses(folder, extra, message):
    assert run("inspect", "-m", str(folder), "-r", "llama/lolcats", *extra, code=2).stderr.startswith(message)


def test_inspect_without_a_model(tmp_path):
    error = run("inspect", "-m", str(tmp_path), "-r", "llama/lolcats", code=2).stderr
    assert error.startswith(f"cannot load a model from '{tmp_path}': ")
    assert len(error.splitlines()) == 1


def test_inspect_names_an_unsupported_model(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    FalconConfig(**sizes, alibi=True).save_pretrained(tmp_path)
    error = run("inspect", "-m", str(tmp_path), "-r", "llama/lolcats", code=2).stderr
    assert "Falcon" in error
    assert len(error.splitlines()) == 1


# generate


def continuation(model, folder, **sampling) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("Once upon", return_tensors="pt", return_token_type_ids=False)
    return tokenizer.decode(model.generate(**inputs, max_new_tokens=12, **sampling)[0])


def test_generate_with_a_recipe_samples_as_the_library_does(folder):
    arguments = ("-r", "llama/lolcats", "--max-new-tokens", "12", "--temperature", "0.8", "--seed", "3")
    output = run("generate", "-m", str(folder), "-p", "Once upon", *arguments).stdout
    model = surgery.from_pretrained(folder, recipe="llama/lolcats").eval()
    set_seed(3)
    assert output.rstrip("\n") == continuation(model, folder, do_sample=True, temperature=0.8).rstrip("\n")


def test_generate_from_a_converted_folder(folder, tmp_path):
    model = surgery.from_pretrained(folder, recipe="llama/lolcats").eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    output = run("generate", "-m", str(tmp_path), "-p", "Once upon", "--max-new-tokens", "12").stdout
    assert output.rstrip("\n") == continuation(model, folder, do_sample=False).rstrip("\n")


def test_generate_refuses(folder, tmp_path):
    assert "name it with --recipe" in run("generate", "-m", str(folder), "-p", "a", "-s", "layers=[0]", code=2).stderr
    assert "recipe" in run("generate", "-m", str(folder), "-p", "a", code=2).stderr
    for file, what in (("tokenizer.json", "tokenizer"), ("config.json", "model")):
        error = run("generate", "-m", str(tmp_path), "-p", "a", "-r", "llama/lolcats", code=2).stderr
        assert error.startswith(f"cannot load a {what} from '{tmp_path}': ")
        assert len(error.splitlines()) == 1
        (tmp_path / file).write_bytes((folder / file).read_bytes())


# doctor


def op(chunked, reference=lambda x: x.cumsum(-1)):
    def example(device, dtype):
        return {"x": torch.linspace(0, 1, 8, device=device, dtype=dtype)}

    return SimpleNamespace(reference=reference, chunked=chunked, example=example)


def test_doctor_compares_every_kernel():
    from surgery.kernels import OPS

    output = run("doctor").stdout
    for word in ("python", "torch", "transformers", *OPS):
        assert word in output
    checks = list(check_kernels())
    assert {check.op for check in checks} == set(OPS)
    assert all(check.right for check in checks), checks
    assert f"{len(checks)} of {len(checks)} kernel checks right" in output


def test_doctor_finds_wrong_and_failing_kernels():
    def fails(x):
        raise RuntimeError("no such device\nand a long tail")

    ops = {
        "good": op(lambda x: x.cumsum(-1)),
        "off": op(lambda x: x.cumsum(-1) + 1),
        "nan": op(lambda x: x.cumsum(-1) * float("nan")),
        "fails": op(fails),
    }
    found = {(check.op, check.dtype): check for check in check_kernels(ops)}
    assert found["good", "float32"].right
    assert not found["off", "float32"].right
    assert found["nan", "float32"].error == float("inf")
    assert (found["fails", "float32"].error, found["fails", "float32"].note) == (None, "no such device")


def test_doctor_exits_with_1_when_something_is_wrong(monkeypatch):
    wrong = Check("op", "chunked", "cpu", "float32", 0.5, 1e-4)
    monkeypatch.setattr("surgery.doctor.check_kernels", lambda: iter([wrong]))
    output = run("doctor", code=1).stdout
    assert "WRONG" in output
    assert "0 of 1 kernel checks right" in output


def test_relative_error_is_relative_to_the_largest_output():
    assert relative_error([torch.tensor([100.0, 1.0])], [torch.tensor([100.0, 2.0])]) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="zip"):
        relative_error([], [torch.ones(1)])


def test_demo_shows_lines_and_tables(monkeypatch, tmp_path):
    def run_demo(out, show, progress):
        table = Table("layer")
        table.add_row("eleven")
        show("[a line] as it is")
        show(table)
        show(Panel("framed"))

    monkeypatch.setattr("surgery.showcase.run_demo", run_demo)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert all(said in result.output for said in ("[a line] as it is", "layer", "eleven", "framed"))
