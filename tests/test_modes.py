"""Teacher, student and transfer are the same weights; revert gives the first back."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import surgery

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "c_proj", "up_proj"]
LORA = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)


def padded() -> dict[str, Tensor]:
    ids, mask = zoo.pad([zoo.tokens(1, 40), zoo.tokens(1, 28, seed=1)], "left")
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "one"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_teacher_mode_and_revert_are_exact(family, layers):
    model = zoo.build(family)
    original = copy.deepcopy(model)
    plain = {"input_ids": zoo.tokens(2, 40)}
    batches = [plain, padded()]
    before = [logits(original, batch) for batch in batches]
    greedy = original.generate(**plain, max_new_tokens=6, do_sample=False)
    names = list(original.state_dict())

    zoo.convert(model, "llama/liger-gla", window=8, layers=layers)
    student = logits(model, plain)
    assert zoo.relative(student, before[0]) > 1e-2
    with surgery.mode(model, "teacher"):
        assert all(torch.equal(logits(model, batch), expected) for batch, expected in zip(batches, before, strict=True))
        assert torch.equal(model.generate(**plain, max_new_tokens=6, do_sample=False), greedy)
    assert torch.equal(logits(model, plain), student)

    assert surgery.revert(model) is model
    assert type(model) is type(original) and type(model.config) is type(original.config)
    assert model.config.to_dict() == original.config.to_dict()
    assert list(model.state_dict()) == names
    assert not any("surgery" in key for module in model.modules() for key in module.__dict__)
    assert all(torch.equal(logits(model, batch), expected) for batch, expected in zip(batches, before, strict=True))
    assert torch.equal(model.generate(**plain, max_new_tokens=6, do_sample=False), greedy)


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gpt2", "gemma2"])
def test_teacher_mode_ignores_lora(family):
    model = zoo.build(family)
    before = [logits(model, batch) for batch in ({"input_ids": zoo.tokens(2, 40)}, padded())]
    model = get_peft_model(zoo.convert(model, "llama/lolcats", window=8), LORA)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for name in ("teacher", "transfer"):
        with surgery.mode(model, name):
            assert torch.equal(logits(model, {"input_ids": zoo.tokens(2, 40)}), before[0])
            assert torch.equal(logits(model, padded()), before[1])
    assert zoo.relative(logits(model, padded()), before[1]) > 1e-2
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model.merge_adapter()
    with pytest.raises(surgery.SurgeryError, match="merged into the base weights"), surgery.mode(model, "teacher"):
        pass


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_transfer_mode_trains_mixers_alone(family):
    model = zoo.build(family)
    before = logits(model, padded())
    zoo.convert(model, "llama/logmass", window=8)
    with surgery.mode(model, "transfer") as switch:
        output = model(**padded())
        assert torch.equal(output.logits, before)
        assert sorted(switch.losses) == [0, 1, 2]
        sum(switch.losses.values()).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and all(".mixer." in name for name in touched)
    with surgery.mode(model, "transfer", loss=lambda student, teacher: (student - teacher).abs().max()) as switch:
        logits(model, padded())
        assert all(loss > 0 for loss in switch.losses.values())


def test_transfer_loss_counts_real_tokens_only():
    model = zoo.convert(zoo.build("llama"), "llama/lolcats", window=8)
    row = zoo.tokens(1, 20)
    ids, mask = zoo.pad([row, row[:, :1]], "left")
    with torch.no_grad(), surgery.mode(model, "transfer") as switch:
        model(row)
        alone = dict(switch.losses)
        model(ids[:1].repeat(1, 1), attention_mask=mask[:1])
        assert all(torch.allclose(switch.losses[i], alone[i]) for i in alone)
        left = torch.cat([torch.zeros(1, 5, dtype=torch.long), row], 1)
        real = (left != 0).long()
        model(left, attention_mask=real, position_ids=(real.cumsum(-1) - 1).clamp_min(0))
        assert all(torch.allclose(switch.losses[i], alone[i], rtol=1e-4) for i in alone)


def test_revert_refuses_what_it_cannot_undo():
    ids = zoo.tokens(2, 20)
    model = zoo.convert(zoo.build("llama"), "llama/lolcats", window=8)
    merged = get_peft_model(model, LORA)
    with pytest.raises(surgery.SurgeryError, match=r"adapters were added since .*unload"):
        surgery.revert(merged)
    merged = merged.merge_and_unload()
    with pytest.raises(
        surgery.SurgeryError, match=r"base weights \(e.g. model.layers.0.self_attn.q_proj.weight\) changed"
    ):
        surgery.revert(merged)

    model = zoo.convert(zoo.build("llama"), "llama/lolcats", window=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    with pytest.raises(surgery.SurgeryError, match="base weights"):
        surgery.revert(model)

    model = zoo.build("llama")
    before = logits(model, {"input_ids": ids})
    zoo.convert(model, "llama/lolcats", window=8)
    mixers = [p for name, p in model.named_parameters() if ".mixer." in name]
    optimizer = torch.optim.SGD(mixers, lr=1e-2)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(logits(surgery.revert(model), {"input_ids": ids}), before)
    with pytest.raises(surgery.SurgeryError, match="not converted"):
        surgery.revert(model)


def test_adapters_from_before_survive_revert():
    model = get_peft_model(zoo.build("llama"), LORA)
    before = logits(model, padded())
    zoo.convert(model, "llama/lolcats", window=8)
    assert zoo.relative(logits(model, padded()), before) > 1e-2
    surgery.revert(model)
    assert torch.equal(logits(model, padded()), before)


def test_caches_of_teacher_and_student_do_not_mix():
    model = zoo.convert(zoo.build("llama"), "llama/lolcats", window=8)
    ids = zoo.tokens(1, 12)
    with torch.no_grad():
        student = model(ids, use_cache=True)[zoo.CACHE]
        with surgery.mode(model, "teacher"):
            teacher = model(ids, use_cache=True)[zoo.CACHE]
            with pytest.raises(surgery.SurgeryError, match="start from a new cache"):
                model(ids[:, :1], **{zoo.CACHE: student})
        with pytest.raises(surgery.SurgeryError, match="already holds keys and values"):
            model(ids[:, :1], **{zoo.CACHE: teacher})
    with pytest.raises(surgery.SurgeryError, match="unknown mode 'techer'"), surgery.mode(model, "techer"):
        pass


def test_transfer_works_with_gradient_checkpointing():
    """The losses' own backward pass runs after the mode has ended."""
    found = []
    for checkpointing in (False, True):
        model = zoo.convert(zoo.build("llama"), "llama/logmass", window=8).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with surgery.mode(model, "transfer", cross_entropy=0.3) as switch:
            model(zoo.tokens(2, 20))
            loss = sum(switch.losses.values())
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert model.model.layers[0].gradient_checkpointing is checkpointing
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
