"""QLoRA: adapters and mixers learn on a base in 4 bits, as bitsandbytes makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from healing import Module, fit, rows
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import surgery
from surgery.adapters import canonical
from surgery.callbacks import AttentionTransfer, LogitDistillation, LoRAUnfreezing
from surgery.training.head import head_of

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
SWITCH, STEPS = 4, 12


@pytest.fixture(autouse=True)
def _no_packing(monkeypatch):
    # in eval mode some cpus pack the weights for good, and no gradient passes them any more
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


@pytest.fixture
def folder(tmp_path) -> Path:
    zoo.build("llama", hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path / "base")
    return tmp_path


def quantized(folder: Path, **more) -> nn.Module:
    config = BitsAndBytesConfig(**FOUR_BITS, **more)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})


def callbacks(**lora) -> list:
    return [
        AttentionTransfer(stop=SWITCH),
        LoRAUnfreezing(start=SWITCH, rank=4, trains=["mixer"], **lora),
        LogitDistillation(start=SWITCH, replace=True),
    ]


class Losses(surgery.callbacks.base.HealingCallback):
    """Those of all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.found.append(float(outputs["loss"]))


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
def test_qlora_heals_and_reloads(folder):
    network, ids = quantized(folder / "base"), zoo.tokens(2, 20)
    with torch.no_grad():
        softmax = network(ids).logits
    zoo.convert(network, "llama/logmass", window=4).train()
    with torch.no_grad(), surgery.mode(network, "teacher"):
        assert torch.equal(network(ids).logits, softmax)
    before = {name: p.clone() for name, p in network.named_parameters()}
    losses = Losses()
    torch.manual_seed(0)
    fit(Module(network, lr=1e-3), [*callbacks(), losses], rows(1) * STEPS)
    assert losses.found[SWITCH - 1] < losses.found[0] and losses.found[-1] < 0.9 * losses.found[SWITCH]

    after = {canonical(name): p for name, p in network.named_parameters()}
    moved = {name for name, p in before.items() if not torch.equal(after[name], p)}
    assert moved == {name for name in before if ".mixer." in name}
    assert all(p.abs().sum() > 0 for name, p in after.items() if ".lora_B." in name)
    network.eval().save_pretrained(folder / "healed")
    again = AutoModelForCausalLM.from_pretrained(folder / "healed", device_map={"": "cpu"})
    assert isinstance(again.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, network(ids).logits)


def test_a_users_own_adapter_learns_on_four_bits(folder):
    network = zoo.convert(quantized(folder / "base"), "llama/logmass", window=4)
    wrapped = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    fit(Module(wrapped.train()), callbacks(adapter="default", targets=["q", "v"]), rows(SWITCH + 2))
    assert all(p.abs().sum() > 0 for name, p in wrapped.named_parameters() if ".lora_B." in name)


def test_converting_while_loading_leaves_mixers_wide(folder):
    config = BitsAndBytesConfig(**FOUR_BITS)
    network = surgery.from_pretrained(
        folder / "base", recipe="llama/gla", quantization_config=config, device_map={"": "cpu"}
    )
    assert isinstance(network.model.layers[0].self_attn.q_proj, bitsandbytes.nn.Linear4bit)
    assert {p.dtype for name, p in network.named_parameters() if ".mixer." in name} == {torch.float32}


def test_what_four_bits_cannot_do_is_refused(folder):
    network = zoo.convert(quantized(folder / "base"), "llama/logmass", window=4).train()
    with pytest.raises(surgery.SurgeryError, match="too coarse to take"):
        fit(Module(network), callbacks(merge=True), rows(1))
    whole = zoo.convert(quantized(folder / "base", llm_int8_skip_modules=["none"]), "llama/logmass", window=4)
    assert isinstance(whole.lm_head, bitsandbytes.nn.Linear4bit)
    with pytest.raises(surgery.SurgeryError, match="leave the head out of adapters and quantisation"):
        head_of(whole)
