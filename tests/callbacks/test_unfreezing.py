"""LoRA that joins layer by layer, takes a user's own adapter, an optimizer among several, and merges in the end."""

from __future__ import annotations

import lightning
import peft
import pytest
import torch
import zoo
from healing import Module, Plain, by_hand, fit, model, parameters, rows, same, trainer
from torch import nn
from transformers import AutoModelForCausalLM

import surgery
from surgery import adapters
from surgery.callbacks import AttentionTransfer, LoRAUnfreezing
from surgery.callbacks.lora_unfreezing import ADAPTER
from surgery.patchers.sites import projections


@pytest.mark.parametrize("order", ["top", "bottom"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_join_group_by_group_as_in_a_loop_by_hand(family, order):
    module, expected = Plain(model(family)), model(family)
    torch.manual_seed(5)
    fit(module, [LoRAUnfreezing(start=1, then=(2, 4), order=order, rank=2, alpha=4, trains=["mix"])], rows(5))

    torch.manual_seed(5)
    adapters.inject(expected, ADAPTER, projections(expected, "qkvo"), rank=2, alpha=4)
    own = [p for name, p in expected.named_parameters() if ".lora_" not in name]

    def learning(step: int) -> list[nn.Parameter]:
        if step == 0:
            return own
        layers = [0, 1, 2] if order == "bottom" else [2, 1, 0]
        joined = [f".{layer}." for at, layer in zip((1, 2, 4), layers, strict=True) if step >= at]
        lora = [p for name, p in expected.named_parameters() if ".lora_" in name and any(x in name for x in joined)]
        return lora + parameters(expected, ".mixer.mix.")

    by_hand(expected, rows(5), lambda step, batch: expected(input_ids=batch, labels=batch).loss, learning)
    assert same(module.net, expected)
    assert all(p.abs().sum() > 0 for p in parameters(module.net, ".lora_B."))


@pytest.mark.parametrize("killed_at", [2, 3])
def test_resuming_between_two_groups(killed_at, tmp_path):
    callbacks = lambda: [LoRAUnfreezing(start=1, then=(3,), rank=2, lr=1e-2)]  # noqa: E731

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == killed_at:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                trainer.should_stop = True

    class Rest:
        def __iter__(self):
            return iter(rows(5)[killed_at:])

    whole, part, resumed = (Module(model()) for _ in range(3))
    torch.manual_seed(5)
    fit(whole, callbacks(), rows(5))
    torch.manual_seed(5)
    fit(part, [*callbacks(), Stop()], rows(5))
    trainer(callbacks(), 5).fit(resumed, Rest(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert same(resumed.net, whole.net, 0.0)


def test_a_users_own_adapter_learns_in_place_of_a_new_one():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    torch.manual_seed(0)
    module = Plain(peft.get_peft_model(model(), config))
    before = {name: p.clone() for name, p in module.named_parameters()}
    fit(module, [AttentionTransfer(stop=1), LoRAUnfreezing(adapter="default", start=1, targets=["q"])], rows(3))
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in moved if ".mixer." not in name} == {name for name in before if ".lora_" in name}
    assert any(".mixer." in name for name in moved)
    assert not any(f".{ADAPTER}." in name for name in before)
    with pytest.raises(surgery.SurgeryError, match="no adapter 'mine', but default"):
        fit(module, [LoRAUnfreezing(adapter="mine")], rows(1))
    with pytest.raises(surgery.SurgeryError, match="projections got no adapter"):
        fit(module, [LoRAUnfreezing(adapter="default", targets=["q", "k"])], rows(1))
    with pytest.raises(surgery.SurgeryError, match="call merge_and_unload"):
        LoRAUnfreezing(adapter="default", merge=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_that_are_not_merged_are_saved_with_the_model(dtype, tmp_path):
    network = zoo.convert(zoo.build("llama", dtype=dtype), "llama/logmass", window=4).train()
    fit(Plain(network), [LoRAUnfreezing(rank=2, alpha=3, dropout=0.1, targets=["q", "o"])], rows(4))
    ids = zoo.tokens(2, 15)
    network.eval().save_pretrained(tmp_path / "apart")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "apart")
    assert {p.dtype for name, p in again.named_parameters() if ".lora_" in name} == {torch.float32}
    assert torch.equal(again(ids).logits, network(ids).logits)
    adapters.merge(again)
    again.save_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict())


def test_adapters_that_cannot_be_saved_are_refused(tmp_path):
    network = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["q_proj"], use_dora=True)).get_base_model()
    with pytest.raises(surgery.SurgeryError, match="'default' is no plain LoRA"):
        network.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    network = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["q_proj"])).get_base_model()
    network.save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(text.replace('"adapters"', '"unknown"'))
    with pytest.raises(surgery.SurgeryError, match="does not say how they were made"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_merging_at_the_end_leaves_a_plain_model_with_the_same_function(tmp_path):
    apart, merged = Plain(model()), Plain(model())
    for module, merge in ((apart, False), (merged, True)):
        torch.manual_seed(5)
        fit(module, [LoRAUnfreezing(rank=2, merge=merge)], rows(4))
    assert merged.net.training
    ids = zoo.tokens(2, 15)
    assert zoo.relative(merged.net.eval()(ids).logits, apart.net.eval()(ids).logits) <= 1e-5
    assert not any("lora" in name for name in merged.net.state_dict())
    assert not same(merged.net, model(), 1e-4)
    merged.net.save_pretrained(tmp_path)
    again = type(merged.net).from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, merged.net(ids).logits)
    # a fit that was interrupted keeps its adapters for the one that goes on

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    interrupted = Plain(model())
    fit(interrupted, [LoRAUnfreezing(rank=2, merge=True), Stop()], rows(4))
    assert parameters(interrupted.net, ".lora_B.")


class TwoOptimizers(lightning.LightningModule):
    """Manual optimization: layers and head in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = self.net(input_ids=batch, labels=batch).loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        layers = torch.optim.SGD(self.net.model.layers.parameters(), lr=1e-2)
        return layers, torch.optim.SGD([*self.net.lm_head.parameters()], lr=1e-2)


def test_a_module_with_two_optimizers_says_which():
    module = TwoOptimizers()
    used = fit(module, [LoRAUnfreezing(start=2, rank=2, lr=0.5, optimizer=1)], rows(4), steps=8)
    assert [len(optimizer.param_groups) for optimizer in used.optimizers] == [1, 2]
    held = [id(p) for optimizer in used.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert {id(p) for p in parameters(module.net, ".lora_")} <= set(held)
    assert all(p.abs().sum() > 0 for p in parameters(module.net, ".lora_B."))
    with pytest.raises(surgery.SurgeryError, match="there are 2: say which by its index"):
        fit(TwoOptimizers(), [LoRAUnfreezing(rank=2)], rows(1), steps=2)


def test_what_makes_no_sense_is_refused():
    for then in ((0, 2), (3, 2), (2, 2)):
        with pytest.raises(surgery.SurgeryError, match="give increasing steps after start"):
            LoRAUnfreezing(then=then)
    with pytest.raises(surgery.SurgeryError, match="makes 5 groups of 3 layers"):
        fit(Module(model()), [LoRAUnfreezing(then=(1, 2, 3, 4))], rows(1))
