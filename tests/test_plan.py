"""Plans: what they count is what models have, what runs hold and allocate, and what formulas on paper say."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from unittest.mock import patch

import lightning
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig
from typer.testing import CliRunner

import surgery
from surgery import SurgeryError, adapters, kernels
from surgery.callbacks import AttentionTransfer, LoRAUnfreezing
from surgery.callbacks.recipes import stage_callbacks
from surgery.cli import app
from surgery.patchers.sites import projections
from surgery.planning import Request, plan
from surgery.planning.hardware import GIB, GPUS, RESERVED
from surgery.planning.layers import per_layer
from surgery.planning.recorder import Recorder
from surgery.planning.shapes import SHAPES, load_config, with_layers
from surgery.planning.step import Step, count, measure
from surgery.training.delta import learned, save_delta
from surgery.training.losses import cross_entropy

PUBLISHED = {"1b": 1_235_814_400, "8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800}
PLAIN = Request(precision="32-true", checkpointing=False)
LENGTH, ROWS = 40, 2


def llama_parameters(shape: dict) -> int:
    """By hand, from the architecture."""
    c, f, v, kv = shape["hidden_size"], shape["intermediate_size"], 128256, 8 * shape["head_dim"]
    layer = 2 * c * c + 2 * c * kv + 3 * c * f + 2 * c
    return shape["num_hidden_layers"] * layer + (1 if shape.get("tie_word_embeddings") else 2) * v * c + c


def small(recipe: str, **changes) -> surgery.Recipe:
    """A recipe with stages for tiny models."""
    found = surgery.load_recipe(recipe)
    for index in range(len(found.stages)):
        changes[f"stages.{index}.sequence_length"] = LENGTH
        changes[f"stages.{index}.batch_size"] = ROWS
    if found.mixer is not None and found.mixer.window is not None:
        changes["mixer.window.size"] = 8
    return found.override(changes)


@pytest.fixture(autouse=True, scope="module")
def _measured_once():
    """Steps that tests have in common are run once."""
    seen: dict[tuple, dict[str, float]] = {}

    def once(step: Step, *kinds: int) -> dict[str, float]:
        stages = repr([stage.model_copy(update={"tokens": None}) for stage in step.recipe.stages[: step.index + 1]])
        settings = (step.index, step.batch, step.length, step.autocast, step.checkpointing, step.gpu)
        key = (step.config.to_json_string(), repr(step.recipe.mixer), stages, *settings, *kinds)
        if key not in seen:
            seen[key] = measure(step, *kinds)
        return seen[key]

    with patch.object(sys.modules["surgery.planning.plan"], "measure", once):
        yield


def counted(config, recipe: surgery.Recipe, index: int, converted: int, softmax: int = 0) -> dict[str, float]:
    """From models of two and three layers."""
    step = Step(config, recipe, index, 1, LENGTH, False, False, GPUS["h100"])
    return per_layer(lambda *kinds: count(step, *kinds), converted, softmax).at(converted, softmax)


# counts


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_model_on_the_meta_device(shape):
    config = load_config(shape=shape)
    found = counted(config, surgery.load_recipe("llama/liger-gla"), 0, config.num_hidden_layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["parameters"] == PUBLISHED[shape] == llama_parameters(SHAPES[shape])
    assert found["weights"] == 2 * found["parameters"]


@pytest.mark.parametrize("recipe", ["llama/lolcats", "llama/logmass", "llama/liger-gla"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "phi3", "mixtral"])
def test_counts_are_what_apply_reports(family, recipe):
    config, chosen = with_layers(zoo.CONFIGS[family], 5), small(recipe)
    found = counted(config, chosen, len(chosen.stages) - 1, 5)
    model = layered(family, 5)
    base = sum(p.numel() for p in model.parameters())
    report = surgery.apply(model, chosen).surgery.report
    assert found["parameters"] == base
    assert found["mixer"] == report.new_parameters
    assert found["state"] == report.state_bytes
    assert found["cache"] == sum(layer.cache_bytes_per_token for layer in report.layers)
    stage = chosen.stages[-1]
    lora = adapters.inject(model, "a", projections(model, stage.targets), rank=stage.rank, alpha=stage.alpha)
    assert found["adapter"] == sum(p.numel() for p in lora)


def test_layers_left_alone_are_counted_apart():
    chosen = small("llama/lolcats", layers=[0, -1])
    config = with_layers(zoo.CONFIGS["llama"], 5)
    report = surgery.apply(layered("llama", 5), chosen).surgery.report
    found = counted(config, chosen, 0, 2, 3)
    assert found["mixer"] == report.new_parameters
    assert found["state"] == report.state_bytes
    assert found["cache"] == sum(layer.cache_bytes_per_token for layer in report.layers)
    whole = plan(config, chosen.override({"stages": [chosen.to_dict()["stages"][0]]}), PLAIN)
    assert (whole.layers, whole.converted, whole.new_parameters) == (5, 2, report.new_parameters)


# what runs hold


class Module(lightning.LightningModule):
    """Keeps what it holds at its last step: bytes of parameters, of gradients and of the optimizer's moments."""

    def __init__(self, model: nn.Module, lr: float = 1e-3) -> None:
        super().__init__()
        self.net, self.held = model, {}

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def on_before_zero_grad(self, optimizer) -> None:
        moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        if moments and gradients:
            self.held = {
                "parameters": size(self.net.parameters()),
                "gradients": size(gradients),
                "optimizer": size(moments),
                "trainable": sum(p.numel() for p in self.net.parameters() if p.requires_grad),
            }


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_parameters_gradients_and_optimizer_are_what_a_run_holds(tmp_path):
    chosen = small("llama/logmass")
    found = plan(zoo.CONFIGS["llama"], chosen, PLAIN)
    model = surgery.apply(zoo.build("llama"), chosen)
    for stage, expected in zip(chosen.stages, found.stages, strict=True):
        module = Module(model.train())
        trainer = lightning.Trainer(
            max_steps=2,
            callbacks=stage_callbacks(stage),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader([zoo.tokens(2, 16, seed=i) for i in range(3)], batch_size=None))
        memory = expected.memory
        assert memory.weights + memory.new_parameters == module.held["parameters"]
        assert memory.gradients == module.held["gradients"]
        assert memory.optimizer == module.held["optimizer"]
        assert expected.trainable == module.held["trainable"]
        save_delta(model, tmp_path / "delta.safetensors", None)
        assert expected.disk["delta"] == size(learned(model).values())
        assert 0 <= (tmp_path / "delta.safetensors").stat().st_size - expected.disk["delta"] < 30_000


# what a step allocates


def layered(family: str, layers: int) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(with_layers(zoo.CONFIGS[family], layers), dtype=torch.float32)


def prepared(
    family: str, recipe: surgery.Recipe, index: int, layers: int
) -> tuple[nn.Module, AttentionTransfer | None]:
    """A real model as a stage trains it, with gradients in place."""
    model = layered(family, layers)
    if recipe.mixer is not None:
        model = surgery.apply(model, recipe)
    callbacks = [stage_callbacks(stage)[0] for stage in recipe.stages[: index + 1]]
    module = Module(model)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for callback in callbacks:
        if isinstance(callback, LoRAUnfreezing):
            callback.setup(trainer, module, "fit")
    last = callbacks[-1]
    if isinstance(last, AttentionTransfer):
        last._freeze(module)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return model.train(), last if isinstance(last, AttentionTransfer) else None


def attention_loss(model: nn.Module, transfer: AttentionTransfer) -> Tensor:
    tokens = zoo.tokens(ROWS, LENGTH)
    return transfer.transfer(Module(model), lambda: model.base_model(input_ids=tokens, use_cache=False)[0].sum())[1]


def run_step(model: nn.Module, transfer: AttentionTransfer | None, stage, autocast: bool) -> tuple[Recorder, dict]:
    """A stage's loss by hand on real numbers, and what was alive on the way."""
    tokens, recorder = zoo.tokens(ROWS, LENGTH), Recorder(GPUS["h100"])
    with recorder:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if transfer is not None:
                loss = attention_loss(model, transfer)
            else:
                logits = model(input_ids=tokens, use_cache=False).logits
                loss = stage.loss.cross_entropy * cross_entropy(logits, tokens)
                del logits
        found = {"kept": recorder.live, "forward": recorder.peak}
        recorder.peak = recorder.live
        loss.backward()
    return recorder, {**found, "backward": recorder.peak}


@pytest.mark.parametrize(
    ("family", "recipe", "index", "autocast"),
    [
        ("llama", "llama/lolcats", 0, True),
        ("llama", "llama/hedgehog", 0, False),
        ("llama", "llama/logmass", 1, False),
        ("llama", "control/softmax-lora", 0, True),
        ("qwen3", "llama/lolcats", 0, False),
        ("gemma2", "llama/lolcats", 1, False),
        ("gpt2", "llama/lolcats", 1, True),
    ],
)
def test_a_real_step_of_six_layers_allocates_what_two_and_three_foretell(family, recipe, index, autocast):
    chosen = small(recipe)
    with kernels.backend("chunked"):
        expected = foretold(family, chosen, index, autocast)
        recorder, found = run_step(*prepared(family, chosen, index, 6), chosen.stages[index], autocast)
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=0.02), name
    assert recorder.flops == pytest.approx(expected["flops"], rel=0.01)
    assert recorder.live == pytest.approx(0, abs=100)


def foretold(family: str, recipe: surgery.Recipe, index: int, autocast: bool, checkpointing: bool = False) -> dict:
    """Of six layers."""
    step = Step(zoo.CONFIGS[family], recipe, index, ROWS, LENGTH, autocast, checkpointing, GPUS["h100"])
    layers = (0, 6) if recipe.mixer is None else (6, 0)
    return per_layer(lambda *kinds: measure(step, *kinds), *layers).at(*layers)


def test_kernels_are_planned_for_in_bf16_and_keep_less():
    """As on a GPU, without one: what they keep is what they keep when interpreted."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted only where there is no GPU")
    chosen = small("llama/lolcats")
    step = Step(zoo.CONFIGS["llama"], chosen, 0, ROWS, LENGTH, True, False, GPUS["h100"])
    model, transfer = prepared("llama", chosen, 0, 2)
    expected = measure(step, 2, 0)["kept"]
    with kernels.backend("triton"), Recorder(GPUS["h100"]) as recorder, torch.autocast("cpu", torch.bfloat16):
        loss = attention_loss(model, transfer)
        assert recorder.live == pytest.approx(expected, rel=0.01)
    assert loss.requires_grad
    with kernels.backend("chunked"):
        assert expected < 0.7 * measure(step, 2, 0)["kept"]


def test_recomputed_activations_too():
    chosen = small("llama/lolcats")
    expected = foretold("llama", chosen, 1, False, checkpointing=True)
    model, _ = prepared("llama", chosen, 1, 6)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, found = run_step(model, None, chosen.stages[1], False)
    for name, value in found.items():
        assert value == pytest.approx(expected[f"checkpointed_{name}"], rel=0.02), name
    assert expected["checkpointed_kept"] < 0.3 * expected["kept"]


@pytest.mark.parametrize("recipe", ["llama/lolcats", "llama/logmass"])
def test_what_is_kept_is_what_autograd_saves(recipe):
    """Counted in another way: by hooks on what is saved for the backward pass of attention transfer."""
    chosen = small(recipe, **{"stages.0.loss": {"mse": 1}})
    step = Step(zoo.CONFIGS["llama"], chosen, 0, ROWS, LENGTH, False, False, GPUS["h100"])
    expected = per_layer(lambda *kinds: measure(step, *kinds), 4, 0).at(4, 0)
    model, transfer = prepared("llama", chosen, 0, 4)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention_loss(model, transfer)
    assert sum(count for _, count in storages.values()) == pytest.approx(expected["kept"], rel=0.025)


def test_a_hand_counted_graph():
    """y = (x W)², then its sum: the product and its square are made, the product is kept."""
    x, weight = torch.randn(8, 16), torch.randn(16, 4, requires_grad=True)
    with Recorder(GPUS["h100"]) as recorder:
        product = x @ weight
        loss = product.square().sum()
        assert (recorder.live, recorder.peak) == (4 * (8 * 4 + 1), 4 * (2 * 8 * 4 + 1))
        del product
        assert recorder.live == 4 * (8 * 4 + 1)
        assert recorder.flops == 2 * 8 * 16 * 4
        loss.backward()
    assert recorder.flops == 2 * (2 * 8 * 16 * 4)  # x needs no gradient
    assert recorder.ops > 3 and recorder.seconds > 0


# numbers on paper


def test_floating_point_operations_of_lora():
    """Frozen weights: two for each forward and two for each backward, and the attention beside them."""
    shape = SHAPES["8b"]
    (stage,) = plan(
        load_config(shape="8b"), surgery.load_recipe("control/softmax-lora"), Request(checkpointing=False)
    ).stages
    weights = PUBLISHED["8b"] - 128256 * 4096  # the embedding is a look-up
    attention = 32 * 4096 * 1024 / 2 * (4 + 10)  # layers, width, causal keys; forward and flash's backward
    lora = 32 * 6 * 16 * (2 * 4096 + 2 * (4096 + 1024) + 2 * 4096)
    assert shape["num_hidden_layers"] == 32
    # the first layer's projections need no gradient of their input
    assert stage.flops_per_token == pytest.approx(4 * weights + attention + lora, rel=0.01)


def test_transfer_makes_no_logits_and_goes_through_the_network_once():
    (stage, _) = plan(
        load_config(shape="8b"), surgery.load_recipe("llama/lolcats"), Request(checkpointing=False)
    ).stages
    layers = PUBLISHED["8b"] - 2 * 128256 * 4096
    assert stage.memory.logits == 0
    assert 2 * layers < stage.flops_per_token < 2.3 * layers
    assert stage.trainable == 32 * (2 * 32 * 128 * 64 + 32)


def test_distillation_keeps_no_logits_and_asks_the_teacher_too():
    config, plain = with_layers(zoo.CONFIGS["llama"], 3), small("llama/lolcats")
    steps = [
        Step(config, chosen, 1, ROWS, LENGTH, False, False, GPUS["h100"])
        for chosen in (plain, plain.override({"stages.1.loss": {"kl": 1}}))
    ]
    language, distilled = (measure(step, 2, 0) for step in steps)
    assert language["logits"] == pytest.approx(4 * ROWS * LENGTH * zoo.VOCAB, rel=0.05)
    assert distilled["logits"] == 0
    assert distilled["flops"] > 1.05 * language["flops"]  # in a tiny model, most are of the mixers


def test_packed_documents_are_planned_for():
    packed = small("llama/lolcats", **{"stages.0.packing": "documents"})
    step = Step(zoo.CONFIGS["llama"], packed, 0, ROWS, LENGTH, False, False, GPUS["h100"])
    plain = replace(step, recipe=small("llama/lolcats"))
    # who belongs to whom is kept as well
    assert measure(plain, 2, 0)["kept"] < measure(step, 2, 0)["kept"] < 1.3 * measure(plain, 2, 0)["kept"]


def test_strategies():
    config, chosen = load_config(shape="1b"), shortened("llama/lolcats")
    request = Request(gpus=1, checkpointing=False)
    single = plan(config, chosen, request).stages[0]
    ddp = plan(config, chosen, replace(request, gpus=4, strategy="ddp")).stages[0]
    fsdp = plan(config, chosen, replace(request, gpus=4, strategy="fsdp")).stages[0]
    assert ddp.memory == replace(single.memory, communication=4 * single.trainable)
    assert fsdp.memory.weights == single.memory.weights / 4
    assert fsdp.memory.optimizer == single.memory.optimizer / 4 == 8 * single.trainable / 4
    assert fsdp.memory.activations == single.memory.activations
    layer = 2 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048) + 4 * (2 * 32 * 64 * 64 + 32)
    root = 2 * (128256 * 2048 + 2048)
    assert fsdp.memory.communication == root + 2 * layer + 4 * single.trainable / 16
    assert single.tokens_per_second < ddp.tokens_per_second < 4 * single.tokens_per_second
    assert ddp.tokens == single.tokens and ddp.steps == single.steps
    assert single.memory.reserved > RESERVED


def test_blockwise():
    """LoLCATs' 405B: 14 blocks of 9 layers; 2·T·D·L/k bytes of hidden states."""
    config, chosen = load_config(shape="405b"), shortened("llama/lolcats-405b-blockwise", rows=16)
    request = Request(gpus=16, strategy="blockwise", checkpointing=False)
    found = plan(config, chosen, request)
    check(found)
    transfer, lora = found.stages
    layer = (PUBLISHED["405b"] - 2 * 128256 * 16384 - 16384) / 126
    assert (transfer.strategy, lora.strategy) == ("blockwise", "fsdp")
    assert transfer.memory.weights == 2 * 9 * layer
    assert transfer.trainable == 126 * (2 * 128 * 128 * 64 + 128)
    assert transfer.memory.optimizer == 8 * transfer.trainable * 9 / 126
    assert transfer.disk["hidden_states"] == 2 * transfer.tokens * 16384 * 126 / 9
    assert transfer.memory.total < 80 * GIB
    assert lora.memory.weights == 2 * PUBLISHED["405b"] / 16


def test_more_tokens_per_batch_take_proportional_memory():
    chosen = small("control/softmax-lora")
    one, four = (
        plan(zoo.CONFIGS["llama"], chosen, replace(PLAIN, tokens_per_batch=LENGTH * rows)).stages[0] for rows in (1, 4)
    )
    assert four.memory.activations == pytest.approx(4 * one.memory.activations, rel=0.02)
    assert four.memory.logits == pytest.approx(4 * one.memory.logits, rel=0.03)
    assert one.memory.logits == pytest.approx(4 * LENGTH * zoo.VOCAB, rel=0.03)
    assert four.memory.weights == one.memory.weights
    assert four.steps == pytest.approx(one.steps / 4, abs=1)


# every recipe and every shape


def test_mixers_of_different_depth_are_counted_by_their_mean():
    found = plan(load_config(shape="1b"), shortened("llama/transnormer"), Request(checkpointing=False))
    shape, half = SHAPES["1b"], 8
    width = 8 * shape["head_dim"]
    assert found.new_parameters == half * shape["num_attention_heads"]
    ring, recurrence = 2 * 64 * width * 2 + 8, width * shape["head_dim"] * 4
    assert found.state == half * (ring + recurrence)


@pytest.mark.parametrize("name", [name for name in surgery.list_recipes() if surgery.load_recipe(name).causal])
def test_every_recipe_has_a_plan(name):
    check(plan(load_config(shape="1b"), shortened(name), Request(checkpointing=False)))


@pytest.mark.parametrize("shape", ["8b", "70b"])
def test_larger_shapes_have_a_plan(shape):
    request = Request(gpus=8, strategy="fsdp", checkpointing=shape == "8b")
    check(plan(load_config(shape=shape), shortened("llama/lolcats-70b-fsdp", rows=8), request))


def shortened(name: str, rows: int = 1) -> surgery.Recipe:
    """With rows of 256 tokens, which are soon gone through."""
    recipe, changes = surgery.load_recipe(name), {}
    for index in range(len(recipe.stages)):
        changes |= {f"stages.{index}.sequence_length": 256, f"stages.{index}.batch_size": rows}
    return recipe.override(changes)


def check(found) -> None:
    assert json.loads(json.dumps(found.to_dict()))["stages"]
    for stage in found.stages:
        for memory in (stage.memory, stage.checkpointed):
            values = {} if memory is None else memory.to_dict()
            assert all(value >= 0 for value in values.values()), values
        assert stage.seconds > 0 and stage.steps > 0 and stage.trainable > 0
        assert 1 < stage.tokens_per_second < 1e7
        # no step is faster than its products at their peak
        devices = found.request.gpus
        assert stage.tokens_per_second * stage.flops_per_token < devices * GPUS[found.request.gpu].flops16
        if stage.checkpointed is not None:
            assert stage.checkpointed.total < stage.memory.total


# the command


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_command_reads_a_folder(tmp_path):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, vocab_size=99
    )
    config.save_pretrained(tmp_path)
    values = json.loads(run("--model", str(tmp_path), "-r", "llama/lolcats", "--json").output)
    with torch.device("meta"):
        assert values["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert [stage["kind"] for stage in values["stages"]] == ["attention_transfer", "lora"]
    first, second = values["stages"]
    assert first["tokens"] == pytest.approx(20_000_000, rel=0.001)
    assert first["checkpointed"] is None and second["checkpointed"]["total"] < second["memory"]["total"]
    text = run("--model", str(tmp_path), "-r", "llama/lolcats").output
    assert "llama, 0.00 billion parameters, 4 of 4 layers converted, 1 x H100 of 80 GiB, single" in text
    for line in (
        "weights",
        "optimizer",
        "activations",
        "fits",
        "assumed: an epoch has 10,000,000 tokens",
        "GFLOP / token",
    ):
        assert line in text


def test_a_plan_that_does_not_fit_says_so():
    text = run("--shape", "8b", "-r", "control/softmax-lora", "--gpu-memory", "24", "--tokens-per-batch", "1024").output
    (line,) = [line.split() for line in text.splitlines() if line.strip().startswith("fits")]
    assert line == ["fits", "NO", "yes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-r", "llama/lolcats"], "for a model (a folder or a name) or for a shape (1b, 8b, 70b, 405b): give one"),
        (["-r", "llama/lolcats", "--shape", "3b"], "no shape '3b': there are 1b, 8b"),
        (["-r", "llama/lolcats", "--shape", "1b", "--gpu", "tpu"], "no GPU 'tpu' is known: choose one of h100"),
        (["-r", "llama/lolcats", "--shape", "1b", "--strategy", "dp"], "no strategy 'dp': choose one of single, ddp"),
        (["-r", "llama/lolcats", "--shape", "1b", "--gpus", "2"], "single is for one GPU, not for 2"),
        (["-r", "llama/lolcats", "--shape", "1b", "--precision", "fp8"], "no plan for precision 'fp8'"),
        (["-r", "llama/lolcats", "--shape", "1b", "--tokens-per-batch", "1000"], "no whole number of rows of 1024"),
        (["-r", "llama/lolcats", "--shape", "1b", "--strategy", "ddp", "--gpus", "3"], "3 devices cannot share out a"),
        (["-r", "llama/lolcats", "-s", "stages=[]", "--shape", "1b"], "no stages, so there is nothing to plan"),
        (["-r", "llama/lolcats", "-s", "layers=[99]", "--shape", "1b"], "layers [99] do not exist"),
        (["-r", "llama/lolcats", "--model", "/nowhere/at/all"], "cannot load a config from '/nowhere/at/all'"),
    ],
)
def test_mistakes_are_named(arguments, message):
    assert message in run(*arguments, code=2).output


def test_unsupported_and_converted_models_are_refused():
    falcon = FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, alibi=True)
    with pytest.raises(SurgeryError, match="cannot be converted: all it knows of positions is a bias"):
        plan(falcon, surgery.load_recipe("llama/lolcats"))
    converted = surgery.apply(layered("llama", 2), small("llama/lolcats")).config
    with pytest.raises(SurgeryError, match="is already converted: plan for the model it was made from"):
        plan(converted, surgery.load_recipe("llama/lolcats"))


def test_experts_are_followed_in_bf16_and_refused_in_fp32():
    """Their fused product takes nothing else on a CPU."""
    config = copy.deepcopy(zoo.CONFIGS["mixtral"])
    config.dtype = torch.bfloat16
    chosen = small("control/softmax-lora")
    (stage,) = plan(config, chosen, Request(checkpointing=False)).stages
    tokens, active = ROWS * LENGTH, 2 * 3 * 8 * 32  # of four experts two run, each of three projections
    attention = 2 * (32 * 32 + 32 * 16)
    assert stage.flops_per_token > 3 * 2 * (attention + active)
    assert stage.memory.logits == pytest.approx(tokens * zoo.VOCAB * 2, rel=0.05)
    with pytest.raises(SurgeryError, match="a step of MixtralForCausalLM cannot be followed on shapes alone"):
        plan(zoo.CONFIGS["mixtral"], chosen, PLAIN)


def test_stages_after_lora_keep_its_adapters():
    chosen = small("llama/lolcats")
    stages = [stage.model_dump() for stage in (*chosen.stages, chosen.stages[0])]
    again = surgery.load_recipe({**chosen.to_dict(), "stages": stages})
    first, lora, last = (counted(zoo.CONFIGS["llama"], again, index, 3) for index in range(3))
    assert (first["adapter"], last["adapter"]) == (0, lora["trainable"])
    assert last["trainable"] == first["trainable"] == first["mixer"]
