"""Recipes: shipped ones say what their papers say, every mistake is reported at once, data makes the round trip."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from surgery.errors import RecipeError, SurgeryError
from surgery.recipe import Recipe, list_recipes, load_recipe, recipe_path

SHIPPED = [
    "bert/hedgehog",
    "control/softmax-lora",
    "control/window-lora",
    "diffusion/linfusion",
    "gpt2/hedgehog",
    "llama/calibrated",
    "llama/deltanet",
    "llama/gated-deltanet",
    "llama/gla",
    "llama/hedgehog",
    "llama/kda",
    "llama/liger-gla",
    "llama/liger-gsa",
    "llama/liger-hgrn2",
    "llama/lightning",
    "llama/lizard",
    "llama/logmass",
    "llama/lolcats-405b-blockwise",
    "llama/lolcats-70b-fsdp",
    "llama/lolcats-8b",
    "llama/lolcats",
    "llama/mesa",
    "llama/transnormer",
    "mistral/hedgehog",
    "mistral/liger-gla",
    "mistral/lolcats",
]
MIXER = {"kind": "linear"}


def problems(recipe) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# shipped recipes


def test_list():
    assert list_recipes() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_is_short_and_says_how_to_run_it(name):
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert len(lines) <= 30
    assert all(len(line) <= 120 for line in lines)
    assert f"--recipe {name}" in header
    assert "arXiv" in header or name == "llama/logmass" or name.startswith("control/")
    assert load_recipe(name).description


@pytest.mark.parametrize("name", SHIPPED)
def test_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    data = json.loads(json.dumps(recipe.to_dict()))
    assert load_recipe(data) == recipe
    assert load_recipe(written(tmp_path, json.dumps(data))) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_lolcats_is_the_papers(family):
    recipe = load_recipe(f"{family}/lolcats")
    mixer, (transfer, lora) = recipe.mixer, recipe.stages
    assert (mixer.kind, mixer.state, mixer.rope) == ("linear", "head", "rotated")
    assert (mixer.feature_map.kind, mixer.feature_map.features) == ("hedgehog", 64)
    assert (mixer.window.size, mixer.window.layout, mixer.window.sinks) == (64, "sliding", 0)
    assert (mixer.mix.kind, mixer.mix.factor, mixer.mix.learned) == ("joint", 0.1, True)
    assert (transfer.kind, transfer.loss.mse, transfer.loss.cross_entropy) == ("attention_transfer", 1000, 0)
    assert (transfer.lr, transfer.epochs, transfer.sequence_length) == (1e-2, 2, 1024)
    assert (lora.kind, lora.rank, lora.alpha, lora.dropout, lora.lr) == ("lora", 8, 16, 0, 1e-4)
    assert lora.targets == ["q", "k", "v", "o"]
    for stage in recipe.stages:
        assert (stage.batch_size, stage.accumulate, stage.weight_decay) == (1, 8, 0)
        plateau = stage.schedule
        assert (plateau.kind, plateau.factor, plateau.patience, plateau.min_lr) == ("plateau", 0.1, 10, 1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_liger_is_the_papers(family):
    recipe = load_recipe(f"{family}/liger-gla")
    mixer, (lora,) = recipe.mixer, recipe.stages
    assert (mixer.kind, mixer.feature_map.kind, mixer.rope) == ("gla", "softmax", "raw")
    assert (mixer.gate.kind, mixer.gate.normalizer) == ("key", 16)
    assert (mixer.window.size, mixer.mix.kind, mixer.mix.weight) == (64, "average", 0.5)
    assert (lora.kind, lora.rank, lora.alpha, lora.lr, lora.epochs) == ("lora", 8, 8, 1e-3, 2)
    assert lora.targets == ["q", "k", "v"]


@pytest.mark.parametrize(
    ("name", "kind", "gate"),
    [("deltanet", "delta", "none"), ("gated-deltanet", "gated_delta", "mamba2"), ("kda", "kda", "low_rank")],
)
def test_delta_rules_are_their_papers(name, kind, gate):
    mixer = load_recipe(f"llama/{name}").mixer
    assert (mixer.kind, mixer.gate.kind, mixer.feature_map.kind, mixer.rope) == (kind, gate, "silu", "raw")
    assert (mixer.beta.source, mixer.beta.initial, mixer.beta.maximum) == ("hidden", 0.5, 1)
    assert (mixer.window.size, mixer.mix.kind, mixer.mix.weight) == (64, "average", 0.5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_hedgehog_is_the_papers(family):
    recipe = load_recipe(f"{family}/hedgehog")
    mixer, (transfer, lora) = recipe.mixer, recipe.stages
    assert (mixer.kind, mixer.feature_map.kind, mixer.feature_map.init) == ("linear", "hedgehog", "identity")
    assert mixer.window is None
    assert (transfer.loss.cross_entropy, transfer.loss.mse) == (1, 0)
    assert lora.kind == "lora"


def test_lizard_is_the_papers_but_for_what_it_says():
    recipe = load_recipe("llama/lizard")
    mixer, (transfer, lora) = recipe.mixer, recipe.stages
    assert (mixer.kind, mixer.gate.kind, mixer.normalize, mixer.rope) == ("gated_scalar", "sigmoid", "z", "raw")
    assert (mixer.window.size, mixer.window.sinks) == (128, 4)
    assert (transfer.kind, transfer.lr, lora.lr, lora.rank, lora.alpha) == ("attention_transfer", 1e-3, 5e-4, 8, 16)
    for stage in recipe.stages:
        steps = stage.tokens / (stage.batch_size * stage.accumulate * stage.sequence_length)
        assert (stage.tokens, stage.sequence_length, stage.schedule.kind) == (20_000_000, 2048, "cosine")
        assert stage.schedule.warmup == round(steps / 10)


@pytest.mark.parametrize(("kind", "normalizer"), [("hgrn2", 1), ("gsa", 16)])
def test_other_ligers_differ_in_the_recurrence(kind, normalizer):
    liger, other = load_recipe("llama/liger-gla"), load_recipe(f"llama/liger-{kind}")
    assert other.stages == liger.stages
    assert (other.mixer.kind, other.mixer.gate.kind, other.mixer.gate.normalizer) == (kind, "key", normalizer)
    assert (other.mixer.window, other.mixer.mix, other.mixer.rope) == (liger.mixer.window, liger.mixer.mix, "raw")


def test_transnormer_is_the_papers():
    early, late = load_recipe("llama/transnormer").mixer.mixers
    assert (early.kind, early.window.size, early.window.layout) == ("diag", 64, "block")
    assert (late.kind, late.feature_map.kind, late.gate.kind, late.normalize) == ("norm", "elu1", "none", "rms")


def test_families_differ_only_in_what_they_are_tuned_for():
    for method in ("lolcats", "liger-gla", "hedgehog"):
        assert load_recipe(f"llama/{method}") == load_recipe(f"mistral/{method}")


# finding


def test_sources_agree():
    recipe = load_recipe("llama/lolcats")
    path = recipe_path("llama/lolcats")
    assert load_recipe(path) == load_recipe(str(path)) == load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(recipe) is recipe
    assert Recipe.resolve("llama/lolcats") == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "lama/lolcats",
            f"no recipe named 'lama/lolcats'; did you mean 'llama/lolcats'? `surgery recipes` lists all {len(SHIPPED)}",
        ),
        (
            "liger-gla",
            "no recipe named 'liger-gla'; did you mean 'llama/liger-gla' or 'mistral/liger-gla'? "
            f"`surgery recipes` lists all {len(SHIPPED)}",
        ),
        ("quadratic", f"no recipe named 'quadratic'; `surgery recipes` lists all {len(SHIPPED)}"),
        ("../llama/lolcats", "no recipe named '../llama/lolcats'; did you mean 'llama/lolcats'? "),
        ("mine.yaml", "no recipe file 'mine.yaml'; `surgery recipes` lists those that need no file"),
        (Path("mine"), "no recipe file 'mine'; `surgery recipes` lists those that need no file"),
        (3, "a recipe is a shipped name, a path, a dict or a Recipe; not int"),
    ],
)
def test_unknown_names(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = problems(name)
    assert line.startswith(message)


def test_errors_are_value_errors_and_survive_pickling():
    with pytest.raises(ValueError, match="lolcats") as caught:
        load_recipe("lama/lolcats")
    assert isinstance(caught.value, SurgeryError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is RecipeError
    assert again.problems == caught.value.problems


def test_unreadable_files(tmp_path):
    (line,) = problems(written(tmp_path, ""))
    assert line.endswith("expected a mapping with at least the key `mixer`, found nothing")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    assert "bytes.yaml" in problems(tmp_path / "bytes.yaml")[0]


# mistakes


def test_all_mistakes_of_a_file_at_once_with_line_path_and_hint(tmp_path):
    path = written(
        tmp_path,
        """\
# a header
mixr:
  kind: lineer
  window: {siz: 3, layout: slide}
  state: head
  state: kv_head
  mix: {kind: log_mass}
stages:
  - kind: lora
    lr: fast
    epochs: 1
    targets: [q, z]
  - kind: attention_transfer
    lr: -1
    schedule: {kind: cosin}
""",
    )
    found = problems(path)
    expected = [
        (2, "mixr", "unknown key; did you mean 'mixer'?"),
        (3, "mixer.kind", "found 'lineer'; did you mean 'linear'?"),
        (4, "mixer.window.siz", "unknown key; did you mean 'size'?"),
        (4, "mixer.window.layout", "expected 'sliding', 'terraced' or 'block', found 'slide'; did you mean 'sliding'?"),
        (6, "mixr.state", "given twice, first on line 5; keep one"),
        (7, "mixer.mix.kind", "found 'log_mass'; did you mean 'logmass'?"),
        (10, "stages[0].lr", "expected a valid number, found 'fast'"),
        (12, "stages[0].targets[1]", "expected 'q', 'k', 'v' or 'o', found 'z'"),
        (14, "stages[1].lr", "expected a value greater than 0, found -1"),
        (15, "stages[1].schedule.kind", "found 'cosin'; did you mean 'cosine'?"),
    ]
    for line, key, text in expected:
        assert any(p.startswith(f"{path}:{line}: {key}: ") and p.endswith(text) for p in found), (line, key, found)
    assert len(found) == len(expected)
    lines = [int(p.removeprefix(f"{path}:").partition(":")[0]) for p in found]
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({}, "recipe: mixer: missing; it is required"),
        ({"mixer": {}}, "recipe: mixer.kind: missing; expected "),
        ({"mixer": {"knid": "linear"}}, "recipe: mixer.knid: unknown key; did you mean 'kind'?"),
        ({"mixer": "linear"}, "recipe: mixer: expected a mapping with `kind`: "),
        ({"mixer": {"kind": 3}}, "recipe: mixer.kind: expected "),
        (
            {"mixer": MIXER, "colour": 1},
            "recipe: colour: unknown key; expected 'description', 'layers', 'mixer' or 'st",
        ),
        ({"mixer": MIXER, "layers": [1, 2, 1]}, "recipe: layers: lists 1 more than once"),
        ({"mixer": MIXER, "layers": []}, "recipe: layers: "),
        ({"mixer": MIXER, "layers": 3}, "recipe: layers: expected a valid list"),
        ({"mixer": MIXER, "layers": {"auto": 0}}, "recipe: layers.auto: expected a value greater than 0"),
        (
            {"mixer": MIXER, "layers": {"auto": 2, "token": 5}},
            "recipe: layers.token: unknown key; did you mean 'tokens'?",
        ),
        ({"mixer": MIXER, "layers": {"tokens": 5}}, "recipe: layers.auto: missing; it is required"),
        (
            {"mixer": None, "stages": [{"kind": "calibrate"}]},
            "recipe: stages[0] calibrates a mixer before it is trained",
        ),
        (
            {"mixer": MIXER, "stages": [3]},
            "recipe: stages[0]: expected a mapping with `kind`: 'calibrate', 'attention_transfer', 'lora' or ",
        ),
        (
            {"mixer": MIXER, "stages": [{"kind": "lora", "lr": 1e-3}]},
            "recipe: stages[0]: a stage needs exactly one of `tokens` and `epochs`, to know when it ends",
        ),
        (
            {"mixer": MIXER, "stages": [{"kind": "lora", "lr": 1e-3, "epochs": 1, "schedule": "cosine"}]},
            "recipe: stages[0].schedule: expected a mapping with `kind`: 'constant', 'linear', 'cosine' or 'plateau', "
            "found 'cosine'",
        ),
        (
            {"mixer": MIXER, "stages": [{"kind": "attention_transfer", "lr": 1e-3, "epochs": 1, "loss": {"mse": 0}}]},
            "recipe: stages[0].loss: no term has a weight: ",
        ),
    ],
)
def test_single_mistakes(recipe, expected):
    (line,) = problems(recipe)
    assert line.startswith(expected)


def test_a_mistake_does_not_change_what_was_given():
    recipe = {"mixr": {"kind": "lineer"}}
    assert len(problems(recipe)) == 2
    assert recipe == {"mixr": {"kind": "lineer"}}


# yaml


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1e-3", "0.1e-2", ".1e-2", "1.e-3", "0.001"])
def test_numbers_with_exponents(number, tmp_path):
    path = written(tmp_path, f"mixer: {{kind: linear}}\nstages: [{{kind: lora, lr: {number}, tokens: 2e7}}]\n")
    (stage,) = load_recipe(path).stages
    assert stage.lr == 1e-3
    assert (stage.tokens, type(stage.tokens)) == (20_000_000, int)


def test_words_stay_words(tmp_path):
    assert load_recipe(written(tmp_path, "description: e3\nmixer: {kind: linear}\n")).description == "e3"


@pytest.mark.parametrize(
    "text",
    [
        "mixer: [",
        "description: !!python/object/apply:os.system ['touch executed']",
        "description: !!python/name:os.system",
        "? [1]: 2",
        "description: 2020-13-99",
        "--- 1\n--- 2",
    ],
)
def test_not_plain_yaml(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, text)
    (line,) = problems(path)
    assert line.startswith(f"{path}:")
    assert "not plain YAML" in line
    assert not (tmp_path / "executed").exists()


def test_anchors(tmp_path):
    text = """\
mixer: {kind: linear}
stages:
  - &first {kind: lora, lr: 1e-3, epochs: 1}
  - {<<: *first, lr: 1e-4}
"""
    assert [stage.lr for stage in load_recipe(written(tmp_path, text)).stages] == [1e-3, 1e-4]
    assert problems(written(tmp_path, "&a {mixer: *a}"))


# overrides


def test_override():
    recipe = load_recipe("llama/lolcats")
    changed = recipe.override({"mixer.window.size": 32, "stages.0.lr": 1e-4, "layers": [0, -1]})
    assert (changed.mixer.window.size, changed.stages[0].lr, changed.layers) == (32, 1e-4, [0, -1])
    assert (recipe.mixer.window.size, recipe.stages[0].lr, recipe.layers) == (64, 1e-2, None)


def test_override_makes_what_was_null():
    changed = load_recipe("llama/hedgehog").override({"mixer.window.size": 16, "mixer.mix.kind": "logmass"})
    assert (changed.mixer.window.size, changed.mixer.mix.kind) == (16, "logmass")


def test_another_kind_starts_afresh():
    changed = load_recipe("llama/lolcats").override({"mixer.mix.kind": "logmass"})
    assert changed.mixer.mix.kind == "logmass"
    same = load_recipe("llama/lolcats").override({"mixer.mix.factor": 0.3, "mixer.mix.kind": "joint"})
    assert same.mixer.mix.factor == 0.3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mixer.windo.size": 3}, "override: mixer.windo: unknown key; did you mean 'window'?"),
        ({"stages.7.lr": 3}, "override: stages.7.lr: there is no item '7' in this list of 2 (counted from 0)"),
        ({"description.x": 3}, "override: description.x: leads into 'LoLCATs"),
        ({"mixer.window.size": 0}, "override: mixer.window.size: expected a value greater than"),
    ],
)
def test_override_mistakes(changes, expected):
    with pytest.raises(RecipeError) as caught:
        load_recipe("llama/lolcats").override(changes)
    assert caught.value.problems[0].startswith(expected)
