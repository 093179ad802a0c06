"""All callbacks together inside modules as users write them are the loop by hand."""

from __future__ import annotations

import copy
import random

import lightning
import peft
import pytest
import torch
import zoo
from healing import Module, Plain, fit, model, parameters, rows, same, trainer
from torch import Tensor, nn

import surgery
from surgery import adapters
from surgery.callbacks import (
    AttentionTransfer,
    BranchMonitor,
    LogitDistillation,
    LoRAUnfreezing,
    TemperatureCooldown,
    WindowDropout,
)
from surgery.callbacks.lora_unfreezing import ADAPTER
from surgery.mixers.windows import narrowed, windowed
from surgery.patchers.sites import find_model, projections

SWITCH, STEPS = 3, 8


def all_of_them(path: str | None = None) -> list:
    return [
        BranchMonitor(every=4, model=path),
        WindowDropout(0.5, start=SWITCH, model=path),
        LogitDistillation(weight={"kind": "linear", "begin": 2.0, "end": 0.0}, start=SWITCH, model=path),
        LoRAUnfreezing(start=SWITCH, then=(5,), rank=2, alpha=4, trains=["mix"], lr=2e-2, model=path),
        AttentionTransfer({"mse": 100}, stop=SWITCH, model=path),
        TemperatureCooldown(0.5, model=path),
    ]


def by_hand(network: nn.Module, batches: list[Tensor]) -> None:
    """What `all_of_them` does, step by step."""
    torch.manual_seed(5)
    lora = adapters.inject(network, ADAPTER, projections(network, "qkvo"), rank=2, alpha=4)
    named = dict(network.named_parameters())
    rest = [p for name, p in named.items() if ".lora_" not in name]
    groups = [{"params": rest, "lr": 1e-2}, {"params": lora, "lr": 2e-2}]
    optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    maps = [module for module in network.modules() if hasattr(module, "fold_temperature")]
    for step, batch in enumerate(batches):
        for feature_map in maps:
            feature_map.temperature.fill_(1 - 0.5 * step / STEPS)
        late = [p for name, p in named.items() if ".lora_" in name and any(f"layers.{i}." in name for i in (2, 1))]
        joined = [] if step < SWITCH else late if step < 5 else lora
        learning = [*joined, *parameters(network, ".mixer." if step < SWITCH else ".mixer.mix.")]
        for parameter in named.values():
            parameter.requires_grad_(any(parameter is p for p in learning))
        optimizer.zero_grad()
        if step < SWITCH:
            with surgery.mode(network, "transfer") as switch:
                network(input_ids=batch)
                loss = 100 * torch.stack(list(switch.losses.values())).mean()
        else:
            dropped = random.Random(f"0 {step} 0").random() < 0.5
            with narrowed(network, reach=0 if dropped else None):
                output = network(input_ids=batch, labels=batch)
            with torch.no_grad(), surgery.mode(network, "teacher"):
                teacher = network(batch).logits
            log_q, log_p = (x.log_softmax(-1).flatten(0, 1) for x in (output.logits, teacher))
            kl = nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
            loss = output.loss + (2 - 2 * (step - SWITCH) / (STEPS - SWITCH)) * kl
        loss.backward()
        optimizer.step()
    for feature_map in maps:
        feature_map.temperature.fill_(0.5)
        feature_map.fold_temperature()


@pytest.fixture(scope="module")
def expected() -> nn.Module:
    network = model()
    by_hand(network, rows(STEPS))
    return network


class Bare(Plain):
    """Takes the batch alone, and logs what it likes."""

    def training_step(self, batch):
        loss = self.net(input_ids=batch, labels=batch).loss
        self.log("mine", loss)
        return loss


class EMA(Plain):
    """Keeps an average of what it trains."""

    def on_train_start(self):
        self.average = {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def on_train_batch_end(self, *_):
        for name, p in self.net.named_parameters():
            self.average[name].lerp_(p.detach(), 0.5)


class TwoModels(Plain):
    """A softmax model of its own beside the converted one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.other = zoo.build("gpt2")


class Submodule(Plain):
    """The model somewhere inside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(nn.ModuleDict({"inner": network}))

    def training_step(self, batch, index):
        return {"loss": self.net["inner"](input_ids=batch, labels=batch).loss, "index": index}


def checkpointed(network: nn.Module) -> nn.Module:
    network.gradient_checkpointing_enable({"use_reentrant": False})
    return Plain(network)


KINDS = {
    "tensor": Plain,
    "dict": lambda network: Plain(network, as_dict=True),
    "bare": Bare,
    "ema": EMA,
    "two models": TwoModels,
    "submodule": Submodule,
    "checkpointed": checkpointed,
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_all_together_are_the_hand_written_loop(kind, expected):
    module = KINDS[kind](model())
    path = "net" if kind == "two models" else None
    torch.manual_seed(5)
    callbacks = all_of_them(path)
    fit(module, callbacks, rows(STEPS))
    network = module.net["inner"] if kind == "submodule" else module.net
    assert same(network, expected, 1e-6 if kind != "checkpointed" else 2e-6)
    assert [step for step, _ in callbacks[0].history] == [4, 8]
    assert all(mixer.reach is None for mixer in windowed(network))
    if kind == "ema":
        assert all(tensor.isfinite().all() for tensor in module.average.values())
        assert any(not torch.equal(module.average[name], p) for name, p in network.named_parameters())


@pytest.mark.parametrize("way", ["inside", "in place", "whole"])
def test_compiled_modules(way):
    """torch.compile of the model, of the model in place, or of the LightningModule: the fit is that of plain ones."""

    def callbacks() -> list:
        return [AttentionTransfer(stop=1), LoRAUnfreezing(start=1, rank=2), LogitDistillation(start=1)]

    plain, network = Plain(model(num_hidden_layers=1)), model(num_hidden_layers=1)
    torch.manual_seed(5)
    fit(plain, callbacks(), rows(2))
    torch._dynamo.reset()
    if way == "inside":
        module = Plain(torch.compile(network, backend="eager"))
    elif way == "in place":
        network.compile(backend="eager")
        module = Plain(network)
    else:
        module = torch.compile(Plain(network), backend="eager")
    torch.manual_seed(5)
    fit(module, callbacks(), rows(2))
    assert same(find_model(network), plain.net)


def test_inside_a_peft_model():
    """The user's adapter is the one that is unfrozen; all else as ever."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    module, plain = Plain(peft.get_peft_model(model(), config)), Plain(model())
    adapters.inject(plain.net, "default", projections(plain.net, "qkvo"), rank=2, alpha=4)
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in module.net.state_dict().items()}
    plain.net.load_state_dict(state)
    for each in (module, plain):
        callbacks = [AttentionTransfer(stop=2), LoRAUnfreezing(start=2, adapter="default"), LogitDistillation(start=2)]
        fit(each, callbacks, rows(5))
    assert same(find_model(module.net), plain.net)
    assert all(p.abs().sum() > 0 for p in parameters(plain.net, ".lora_B."))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_bf16_everything_stays_finite(precision):
    module = Module(model(), lr=1e-3)
    torch.manual_seed(5)
    fit(module, all_of_them(), rows(STEPS), precision=precision)
    assert all(p.isfinite().all() for p in module.parameters())
    assert all(p.abs().sum() > 0 for p in parameters(module.net, ".lora_B."))


def test_accumulated_batches_are_one_step():
    """What changes from step to step does so between steps, and gradients are those of the larger batch."""
    callbacks = lambda: [  # noqa: E731
        AttentionTransfer({"mse": 100}, stop=1),
        LoRAUnfreezing(start=1, rank=2, trains=["mixer"]),
        LogitDistillation(start=1),
        WindowDropout(1.0, start=1),
        TemperatureCooldown(0.5),
    ]
    whole, halves = Plain(model()), Plain(model())
    batches = rows(3, batch=4)
    torch.manual_seed(5)
    fit(whole, callbacks(), batches)
    torch.manual_seed(5)
    fit(halves, callbacks(), [half for batch in batches for half in batch.split(2)], 3, accumulate_grad_batches=2)
    assert same(whole.net, halves.net, 1e-5)


class Manual(lightning.LightningModule):
    """Manual optimization with two optimizers, one of which learns the mixers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net = network
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.net(input_ids=batch, labels=batch).loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        mixers = parameters(self.net, ".mixer.")
        rest = [p for p in self.net.parameters() if not any(p is q for q in mixers)]
        return torch.optim.SGD(mixers, lr=1e-2), torch.optim.SGD(rest, lr=1e-3)


def test_manual_optimization_works_where_no_loss_is_changed():
    module, hand = Manual(model()), model()
    monitor = BranchMonitor(every=2)
    fit(module, [TemperatureCooldown(0.5), WindowDropout(0.5), monitor], rows(3), steps=6)
    mixers = parameters(hand, ".mixer.")
    rest = [p for p in hand.parameters() if not any(p is q for q in mixers)]
    optimizers = torch.optim.SGD(mixers, lr=1e-2), torch.optim.SGD(rest, lr=1e-3)
    maps = [m for m in hand.modules() if hasattr(m, "fold_temperature")]
    for index, batch in enumerate(rows(3)):
        step = 2 * index  # lightning counts the steps of both
        for feature_map in maps:
            feature_map.temperature.fill_(1 - 0.5 * step / 6)
        dropped = random.Random(f"0 {step} 0").random() < 0.5
        with narrowed(hand, reach=0 if dropped else None):
            loss = hand(input_ids=batch, labels=batch).loss
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    for feature_map in maps:
        feature_map.temperature.fill_(0.5)
        feature_map.fold_temperature()
    assert same(module.net, hand)
    assert len(monitor.history) == 3
    for callback in (AttentionTransfer(), LogitDistillation()):
        with pytest.raises(surgery.SurgeryError, match=f"{type(callback).__name__} .* manual optimization"):
            fit(Manual(model()), [callback], rows(1), steps=2)


def test_an_average_of_weights_by_lightning():
    """Its copy of the module is made before the fit, and validates in its place."""
    averaging = pytest.importorskip("lightning.pytorch.callbacks").WeightAveraging()
    module = Plain(model())
    start = copy.deepcopy(module.net.state_dict())
    fit(module, [AttentionTransfer(), averaging], rows(4))
    moved = {name for name, tensor in module.net.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved
    assert all(".mixer." in name for name in moved)


def test_two_fits_after_one_another_and_a_sanity_check():
    class Validates(Plain):
        def validation_step(self, batch):
            self.log("val_loss", self.net(input_ids=batch, labels=batch).loss)

    module, loader = Validates(model()), torch.utils.data.DataLoader(rows(4), batch_size=None)
    for callback in (AttentionTransfer(), LogitDistillation()):
        used = trainer([callback], 2, limit_train_batches=2, num_sanity_val_steps=1)
        used.fit(module, loader, loader)
        assert torch.isfinite(used.callback_metrics[callback.name])
        assert torch.isfinite(used.callback_metrics["val_loss"])
    assert "training_step" not in module.__dict__
