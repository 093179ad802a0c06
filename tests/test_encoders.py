"""Encoders under bidirectional linear attention: what is converted, padding, documents, modes, saving, refusals."""

from __future__ import annotations

import encoder_zoo as zoo
import peft
import pytest
import torch
import transformers as tf

import surgery
from surgery.patchers.interface import converted_layers

RECIPE = "bert/hedgehog"
CONVERTED = {"siglip": 6, "whisper": 2, "bart": 2, "modernbert": 2}
every_model = pytest.mark.parametrize("name", zoo.MODELS)
every_text_model = pytest.mark.parametrize("name", zoo.PADDED)


def hidden(model, ids, mask=None, positions=None) -> torch.Tensor:
    encoder = model.get_encoder() if hasattr(model, "decoder") else model
    extra = {} if positions is None else {"position_ids": positions}
    with torch.no_grad():
        return encoder(ids, attention_mask=mask, **extra).last_hidden_state


@every_model
def test_modes_saving_and_the_way_back(name, tmp_path):
    model, given = zoo.build(name), zoo.inputs(name)
    before = zoo.outputs(model, given)
    planned = surgery.inspect(model, RECIPE)
    report = surgery.apply(model, RECIPE).surgery.report
    assert planned == report and len(report.converted) == CONVERTED.get(name, 3)
    assert report.state_bytes == 0 and all(layer.break_even is None for layer in report.layers)

    after = zoo.outputs(model, given)
    assert not zoo.equal(after, before) and all(x.isfinite().all() for x in after)
    with surgery.mode(model, "teacher"):
        assert zoo.equal(zoo.outputs(model, given), before)
    with surgery.mode(model, "transfer", cross_entropy=1.0) as switch:
        assert zoo.equal(zoo.outputs(model, given), before)
        assert len(switch.losses) == len(report.converted) and min(switch.losses.values()) > 0

    model.save_pretrained(tmp_path)
    assert zoo.equal(zoo.outputs(type(model).from_pretrained(tmp_path).eval(), given), after)
    assert zoo.equal(zoo.outputs(tf.AutoModel.from_pretrained(tmp_path).eval(), given), after)
    surgery.revert(model)
    assert type(model) is zoo.MODELS[name][0] and zoo.equal(zoo.outputs(model, given), before)


@pytest.mark.parametrize("cls", [tf.BertForMaskedLM, tf.BertForSequenceClassification, tf.BertModel])
def test_checkpoints_keep_their_heads(cls, tmp_path):
    softmax, given = zoo.build("bert", cls), zoo.inputs("bert")
    softmax.save_pretrained(tmp_path / "softmax")
    expected = zoo.outputs(surgery.apply(softmax, RECIPE), given)
    model = surgery.from_pretrained(tmp_path / "softmax", RECIPE).eval()
    assert zoo.equal(zoo.outputs(model, given), expected)
    model.save_pretrained(tmp_path / "linear")
    again = surgery.from_pretrained(tmp_path / "linear").eval()
    assert isinstance(again, cls) and zoo.equal(zoo.outputs(again, given), expected)


@every_text_model
@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"), [("sdpa", torch.float64, 1e-9), ("eager", torch.float32, 1e-4)]
)
def test_padding_changes_nothing(name, implementation, dtype, tolerance):
    model = zoo.build(name, dtype=dtype)
    model.set_attn_implementation(implementation)
    row, other = zoo.tokens(1, 13), zoo.tokens(1, 18)
    # those without positions see every token move when padding comes first
    sides = ("right",) if name in ("distilbert", "bart") else ("left", "right")
    first = model.config.pad_token_id + 1 if name == "roberta" else 0
    # with a layer of softmax left, all share the mask that it needs
    for layers in (None, [0]):
        surgery.apply(model, RECIPE, layers=layers)
        alone = hidden(model, row)
        for side in sides:
            before = 5 if side == "left" else 0
            ids = torch.cat([torch.nn.functional.pad(row, (before, 5 - before)), other])
            mask = torch.ones_like(ids)
            mask[0] = torch.nn.functional.pad(torch.ones(13), (before, 5 - before))
            positions = (mask.cumsum(1) - 1).clamp_min(0) + first if side == "left" else None
            found = hidden(model, ids, mask, positions)[0][mask[0].bool()]
            assert torch.allclose(found, alone[0], atol=tolerance), (layers, side)
        surgery.revert(model)


def test_packed_documents_do_not_see_each_other():
    model = surgery.apply(zoo.build("bert", dtype=torch.float64), RECIPE)
    first, second = zoo.tokens(1, 7), zoo.tokens(1, 11, seed=1)
    document = torch.tensor([0] * 7 + [1] * 11)
    mask = (document[:, None] == document)[None, None]
    positions = torch.cat([torch.arange(7), torch.arange(11)])[None]
    packed = hidden(model, torch.cat([first, second], 1), mask, positions)
    expected = torch.cat([hidden(model, first), hidden(model, second)], 1)
    assert torch.allclose(packed, expected, atol=1e-9)
    with pytest.raises(surgery.SurgeryError, match="other than padding and documents"):
        hidden(model, first, torch.ones(7, 7).tril().bool()[None, None])


@pytest.mark.parametrize("kind", ["exp", "elu1", "softmax", "taylor2", "relu"])
def test_other_feature_maps(kind):
    model, given = zoo.build("bert"), zoo.inputs("bert")
    surgery.apply(model, {"mixer": {"kind": "bidirectional", "feature_map": {"kind": kind}}})
    assert all(x.isfinite().all() for x in zoo.outputs(model, given))


def test_adapters():
    model, given = zoo.build("bert"), zoo.inputs("bert")
    before = zoo.outputs(model, given)
    surgery.apply(model, RECIPE)
    after = zoo.outputs(model, given)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    assert not zoo.equal(zoo.outputs(adapted, given), after)
    with surgery.mode(adapted, "teacher"):
        assert zoo.equal(zoo.outputs(adapted, given), before)


def test_every_parameter_of_the_mixer_learns():
    model, given = surgery.apply(zoo.build("bert"), RECIPE), zoo.inputs("bert")
    model(**given).last_hidden_state.square().sum().backward()
    learned = [p for module in converted_layers(model).values() for p in module.mixer.parameters()]
    assert learned and all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)


def test_decoders_beside_encoders_are_left_alone():
    """The towers and stacks that the recipe's direction does not fit stay as they are, and take the other kind."""
    clip, given = zoo.build("clip"), zoo.inputs("clip")
    surgery.apply(clip, RECIPE)
    assert all("vision_model" in path for path in converted_layers(clip))
    surgery.revert(clip)
    before = clip.get_text_features(given["input_ids"]).pooler_output
    surgery.apply(clip, {"mixer": {"kind": "window", "window": {"size": 64}}})
    assert all("text_model" in path for path in converted_layers(clip)) and len(converted_layers(clip)) == 3
    after = clip.get_text_features(given["input_ids"]).pooler_output
    assert torch.allclose(after, before, atol=1e-5)

    bart = surgery.apply(zoo.build("bart"), RECIPE)
    assert all(path.startswith("encoder.") for path in converted_layers(bart))
    decoded = bart(**zoo.inputs("bart"), use_cache=True)
    assert decoded.encoder_last_hidden_state.isfinite().all()


def test_refusals():
    with pytest.raises(surgery.SurgeryError, match="encoders take the mixer bidirectional"):
        surgery.apply(zoo.build("bert"), "llama/hedgehog")
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**zoo.SHAPE, **zoo.TEXT, num_key_value_heads=2))
    with pytest.raises(surgery.SurgeryError, match="would let its tokens see those that follow"):
        surgery.apply(llama, RECIPE)
    decoder = tf.BertLMHeadModel(tf.BertConfig(**zoo.SHAPE, **zoo.TEXT, is_decoder=True))
    with pytest.raises(surgery.SurgeryError, match="would let its tokens see those that follow"):
        surgery.apply(decoder, RECIPE)
    with pytest.raises(surgery.SurgeryError, match=r"layers \[1\] see a window on both sides"):
        surgery.apply(zoo.build("modernbert"), RECIPE, layers=[0, 1])
    t5 = tf.T5Model(tf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    deberta = tf.DebertaV2Model(tf.DebertaV2Config(**zoo.SHAPE, **zoo.TEXT))
    for model in (t5, deberta):
        with pytest.raises(surgery.SurgeryError, match="a learned term for the distance of query and key"):
            surgery.apply(model, RECIPE)
    kinds = [{"kind": "linear"}, {"kind": "bidirectional"}]
    with pytest.raises(surgery.RecipeError, match="all causal or all bidirectional"):
        surgery.load_recipe({"mixer": {"kind": "by_depth", "mixers": kinds}})
    with pytest.raises(surgery.RecipeError, match="can be negative"):
        surgery.load_recipe({"mixer": {"kind": "bidirectional", "feature_map": {"kind": "silu"}}})


def test_the_recipe_heals_in_a_trainer(tmp_path):
    """Transfer nears the softmax while the network rests; then adapters and features learn a task."""
    L = pytest.importorskip("lightning.pytorch")
    from surgery.callbacks import StageRunner

    class Task(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = surgery.apply(zoo.build("bert", tf.BertForSequenceClassification), RECIPE)

        def training_step(self, batch, index):
            ids = batch[0]
            return self.net(ids, labels=(ids[:, 0] > 50).long()).loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def distance(net) -> float:
        with (
            torch.no_grad(),
            surgery.mode(net.eval(), "transfer", loss=lambda s, t: 0 * s.sum(), cross_entropy=1) as way,
        ):
            net(ids[:8])
            return float(torch.stack(list(way.losses.values())).mean())

    ids = zoo.tokens(96, 16)
    changes = {f"stages.{i}.tokens": 8 * 16 * 12 for i in range(2)} | {"stages.0.schedule": {"kind": "constant"}}
    recipe = surgery.load_recipe(RECIPE).override(changes)
    task, runner = Task(), StageRunner(recipe, tokens_per_step=8 * 16)
    before = distance(task.net)
    trainer = L.Trainer(
        max_steps=runner.steps, callbacks=[runner], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=8))
    assert distance(task.net) < before
    adapters = {name: p for name, p in task.named_parameters() if "lora_B" in name}
    assert len(adapters) == 9 and all(p.abs().sum() > 0 for p in adapters.values())


def test_convert_is_for_decoders(tmp_path):
    from surgery.training.convert import convert

    with pytest.raises(surgery.SurgeryError, match="trains on the next token"):
        convert("any", surgery.load_recipe(RECIPE), [], tmp_path / "out")
