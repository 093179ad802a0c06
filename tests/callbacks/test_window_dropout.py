"""Windows that are left out or made smaller: what mixers then compute, and a fit that does so by a schedule."""

from __future__ import annotations

import random

import lightning
import pytest
import torch
import zoo
from healing import Module, Plain, by_hand, fit, model, rows, same, trainer
from torch import Tensor

import surgery
from surgery import kernels
from surgery.callbacks import WindowDropout
from surgery.kernels import Features, Joint, LogMass, Window
from surgery.mixers.windows import narrowed, windowed

MIXERS = {
    "joint": {"kind": "linear", "window": {"size": 4}, "mix": {"kind": "joint"}},
    "logmass": {"kind": "linear", "window": {"size": 4, "sinks": 2}, "mix": {"kind": "logmass"}, "rope": "raw"},
    "terraced": {"kind": "linear", "window": {"size": 4, "layout": "terraced"}, "mix": {"kind": "joint"}},
    "average": {"kind": "linear", "window": {"size": 4}, "mix": {"kind": "average"}},
    "gla": {"kind": "gla", "window": {"size": 4}},
}


def converted(name: str, **changes) -> torch.nn.Module:
    mixer = {**MIXERS[name], **changes}
    return surgery.apply(zoo.build("llama"), {"mixer": mixer}).train()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("mix", ["joint", "logmass"])
def test_a_window_of_no_keys_leaves_linear_attention(mix, backend):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 11, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    maps = [Features("hedgehog", torch.randn(heads, 8, 5, dtype=torch.float64)) for heads in (4, 2)]
    factor = torch.full((4,), 0.1, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 8), (4,), (2, 8), (2,))]
    mixed = Joint(factor) if mix == "joint" else LogMass(*weights)
    with kernels.backend(backend):
        y, _ = kernels.hybrid_attention(
            q, k, v, features_q=maps[0], features_k=maps[1], mix=mixed, window=Window(0), scaling=0.3
        )
    phi_q, phi_k = (kernels.features.apply(m, x) for m, x in zip(maps, (q, k), strict=True))
    weight = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k.repeat_interleave(2, 2)).tril()
    if mix == "logmass":
        b = 15 * torch.tanh((torch.einsum("bjhd,hd->bjh", k, weights[2]) + weights[3]) / 15)
        weight = weight * b.exp().repeat_interleave(2, 2).transpose(1, 2).unsqueeze(2)
    expected = torch.einsum("bhij,bjhd->bihd", weight / weight.sum(-1, True), v.repeat_interleave(2, 2))
    assert torch.allclose(y, expected, atol=1e-9)
    wanted = (q, k, v, *([factor] if mix == "joint" else weights))
    found = torch.autograd.grad(y.square().sum(), wanted)
    assert all(grad.isfinite().all() for grad in found)
    hand = torch.autograd.grad(expected.square().sum(), wanted, allow_unused=True)
    for grad, right in zip(found, hand, strict=True):
        assert torch.allclose(grad, torch.zeros_like(grad) if right is None else right, atol=1e-8)


@pytest.mark.parametrize("name", list(MIXERS))
def test_branches_alone_and_smaller_windows(name):
    network, ids = converted(name).eval(), zoo.tokens(2, 19)
    whole = network(ids).logits
    with narrowed(network, reach=2):
        smaller = network(ids).logits
    size = {**MIXERS[name]["window"], "size": 2}
    assert zoo.relative(smaller, converted(name, window=size).eval()(ids).logits) <= 1e-5
    with narrowed(network, reach=4):
        assert torch.equal(network(ids).logits, whole)
    with narrowed(network, linear=False):
        window = network(ids).logits
    only = surgery.apply(zoo.build("llama"), {"mixer": {"kind": "window", "window": MIXERS[name]["window"]}})
    assert zoo.relative(window, only.eval()(ids).logits) <= 1e-5
    with narrowed(network, reach=0):
        linear = network(ids).logits
    if name != "logmass":
        alone = converted(name, window=None, mix=None).eval()(ids).logits
        assert zoo.relative(linear, alone) <= 1e-5
    assert zoo.relative(linear, whole) > 1e-3
    assert torch.equal(network(ids).logits, whole)


@pytest.mark.parametrize("by_layer", [False, True])
def test_it_is_the_hand_written_loop(by_layer):
    module, expected = Plain(model()), model()
    callback = WindowDropout({"kind": "linear", "begin": 1.0, "end": 0.2}, size=2, by_layer=by_layer, seed=3, stop=5)
    seen = []

    class See(lightning.Callback):
        def on_train_batch_start(self, *_):
            seen.append([mixer.reach for mixer in windowed(module.net)])

    fit(module, [callback, See()], rows(6))
    drawn = []

    def loss(step: int, batch: Tensor) -> Tensor:
        draws, probability = random.Random(f"3 {step} 0"), 1.0 - 0.8 * step / 5
        first = draws.random()
        reaches = [0 if (draws.random() if by_layer else first) < probability else 2 for _ in range(3)]
        drawn.append(reaches if step < 5 else [None] * 3)
        for mixer, reach in zip(windowed(expected), drawn[-1], strict=True):
            mixer.reach = reach
        return expected(input_ids=batch, labels=batch).loss

    by_hand(expected, rows(6), loss)
    assert seen == drawn
    assert drawn[0] == [0, 0, 0]
    assert any(2 in reaches for reaches in drawn)
    assert same(module.net, expected)
    assert all(mixer.reach is None for mixer in windowed(module.net))


def test_accumulated_batches_draw_apart_and_a_checkpointed_backward_sees_the_same_window():
    seen, networks = [], []
    for checkpointed in (False, True):
        module = Plain(model())
        if checkpointed:
            module.net.gradient_checkpointing_enable({"use_reentrant": False})

        class See(lightning.Callback):
            def on_after_backward(self, *_):
                seen.append(windowed(module.net)[0].reach)

        fit(module, [WindowDropout(0.5), See()], rows(8), steps=4, accumulate_grad_batches=2)
        networks.append(module.net)
    assert seen[:8] == seen[8:]
    assert set(seen) == {0, None}
    assert len({tuple(seen[i : i + 2]) for i in range(0, 8, 2)}) > 1
    assert same(*networks, 1e-6)


def test_validation_sees_whole_windows():
    seen = []

    class Validates(Module):
        def validation_step(self, batch):
            seen.append([mixer.reach for mixer in windowed(self.net)])

    module = Validates(model())
    loader = torch.utils.data.DataLoader(rows(2), batch_size=None)
    trainer([WindowDropout(1.0)], 2, num_sanity_val_steps=1).fit(module, loader, loader)
    assert seen == [[None] * 3] * 3


def test_nothing_to_drop_is_said():
    plain = Module(surgery.apply(zoo.build("llama"), {"mixer": {"kind": "linear"}}))
    with pytest.raises(surgery.SurgeryError, match="no mixer with both a window and a linear branch"):
        fit(plain, [WindowDropout()], rows(1))
