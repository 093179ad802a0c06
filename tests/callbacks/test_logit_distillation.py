"""Distillation inside a user's training step is the loop that runs both models and compares their logits."""

from __future__ import annotations

import lightning
import pytest
import torch
import zoo
from healing import LENGTH, Module, Plain, by_hand, fit, model, rows, same
from torch import Tensor, nn

import surgery
from surgery.callbacks import AttentionTransfer, LogitDistillation, TemperatureCooldown
from surgery.callbacks.schedules import Linear

STEPS = 5


def dense(network: nn.Module, logits: Tensor, temperature: float = 1.0, **inputs) -> Tensor:
    """KL(teacher ‖ student) of whole logits, times T²."""
    with torch.no_grad(), surgery.mode(network, "teacher"):
        teacher = network(**inputs).logits
    log_q, log_p = ((x / temperature).log_softmax(-1).flatten(0, 1) for x in (logits, teacher))
    return temperature**2 * nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("replace", [False, True], ids=["added", "replaced"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_it_is_the_hand_written_loop(family, replace):
    module, expected = Plain(model(family), as_dict=replace), model(family)

    def loss(step: int, batch: Tensor) -> Tensor:
        output = expected(input_ids=batch, labels=batch)
        kl = dense(expected, output.logits, 2.0 - step / STEPS, input_ids=batch)
        weight = 0.5 + step / STEPS
        return weight * kl if replace else output.loss + weight * kl

    callback = LogitDistillation(weight=Linear(0.5, 1.5), temperature=Linear(2.0, 1.0), replace=replace)
    fit(module, [callback], rows(STEPS))
    by_hand(expected, rows(STEPS), loss)
    assert same(module.net, expected)
    assert not same(module.net, model(family), 1e-3)
    assert "training_step" not in module.__dict__
    assert not module.net.get_decoder()._forward_hooks


def test_padding_several_calls_and_a_temperature_that_cools():
    """A step that calls the model twice, with padding: the mean is over all real tokens."""
    masks = [torch.ones(2, LENGTH, dtype=torch.long) for _ in range(2)]
    masks[0][0, 12:] = 0
    masks[1] = masks[1][:, :9]

    class Twice(Plain):
        def training_step(self, batch):  # lightning must see that it takes one argument
            losses = [
                self.net(
                    input_ids=batch[:, : mask.shape[1]], attention_mask=mask, labels=batch[:, : mask.shape[1]]
                ).loss
                for mask in masks
            ]
            return sum(losses)

    module, expected = Twice(model(), lr=1e-3), model()
    distillation = LogitDistillation()
    fit(module, [distillation, TemperatureCooldown(1.0, begin=3.0, of=distillation)], rows(2))
    assert distillation.temperature == 1.0

    def loss(step: int, batch: Tensor) -> Tensor:
        total, kl, count = 0.0, 0.0, 0
        for mask in masks:
            ids, real = batch[:, : mask.shape[1]], mask.bool()
            output = expected(input_ids=ids, attention_mask=mask, labels=ids)
            total = total + output.loss
            with torch.no_grad(), surgery.mode(expected, "teacher"):
                teacher = expected(input_ids=ids, attention_mask=mask).logits
            temperature = 3.0 - step
            log_q, log_p = ((x[real] / temperature).log_softmax(-1) for x in (output.logits, teacher))
            kl = kl + temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
            count += int(real.sum())
        return total + kl / count

    by_hand(expected, rows(2), loss, lr=1e-3)
    assert same(module.net, expected)


def test_the_teacher_has_neither_adapters_nor_dropout_nor_a_trained_head():
    """Inside a PeftModel that trains its head as a whole: the teacher keeps the head that it had."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], lora_dropout=0.5)
    network = peft.get_peft_model(model(), config)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name or "modules_to_save" in name:
            nn.init.normal_(parameter)
    original, ids = model(), rows(1)[0]
    with surgery.mode(original, "teacher"):
        logits = original(ids).logits
    module = Module(network, lr=0.0)
    seen = []

    class See(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(trainer.callback_metrics["distillation_loss"].item())

    network.eval()
    with torch.no_grad():
        student = network(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)
    teacher = logits.detach().log_softmax(-1).flatten(0, 1)
    expected = nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True).item()
    fit(module, [LogitDistillation(replace=True), See()], rows(1))  # lightning leaves modules in eval mode as they are
    assert seen[0] == pytest.approx(expected, rel=1e-4)


def test_checkpointing_and_accumulation_change_nothing():
    ways = {}
    for name in ("plain", "checkpointed"):
        module = Plain(model())
        if name == "checkpointed":
            module.net.gradient_checkpointing_enable({"use_reentrant": False})
        fit(module, [LogitDistillation(replace=True)], rows(4), steps=2, accumulate_grad_batches=2)
        ways[name] = module.net
    assert same(ways["plain"], ways["checkpointed"])
    whole = Plain(model())
    pairs = [torch.cat([rows(4)[i], rows(4)[i + 1]]) for i in (0, 2)]
    fit(whole, [LogitDistillation(replace=True)], pairs)
    assert same(ways["plain"], whole.net, 1e-4)


def test_in_bf16_autocast_the_loss_falls_and_stays_finite():
    losses = []

    class See(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(trainer.callback_metrics["distillation_loss"].item())

    module = Module(model(), lr=3e-3)
    fit(module, [LogitDistillation(replace=True), See()], rows(1) * 8, precision="bf16-mixed")
    assert all(p.isfinite().all() for p in module.parameters())
    assert losses[-1] < 0.8 * losses[0]


def test_situations_that_cannot_work_are_refused():
    class Manual(Module):
        def __init__(self):
            super().__init__(model())
            self.automatic_optimization = False

    with pytest.raises(surgery.SurgeryError, match="LogitDistillation changes the loss .* manual optimization"):
        fit(Manual(), [LogitDistillation()], rows(1))
    for both in ([AttentionTransfer(), LogitDistillation()], [LogitDistillation(), AttentionTransfer()]):
        with pytest.raises(surgery.SurgeryError, match="let one stop before the other starts"):
            fit(Module(model()), both, rows(1))

    class Without(Module):
        def training_step(self, batch, index):
            return sum(p.sum() for p in self.parameters())

    with pytest.raises(surgery.SurgeryError, match="never ran the converted model"):
        fit(Without(model()), [LogitDistillation()], rows(1))

    class Cached(Module):
        def training_step(self, batch, index):
            cache = self.net(input_ids=batch, use_cache=True)[zoo.CACHE]
            return self.net(input_ids=batch, labels=batch, **{zoo.CACHE: cache}).loss

    with pytest.raises(surgery.SurgeryError, match="without a filled cache"):
        fit(Cached(model()), [LogitDistillation()], rows(1))


def test_a_step_that_skips_its_batch_is_left_alone():
    class Skips(Plain):
        def training_step(self, batch, index):
            return None if index == 0 else super().training_step(batch, index)

    skipping, plain = Skips(model()), Plain(model())
    fit(skipping, [LogitDistillation()], rows(2))
    fit(plain, [LogitDistillation()], rows(2)[1:])
    assert same(skipping.net, plain.net)
