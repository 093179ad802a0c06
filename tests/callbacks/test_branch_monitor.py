"""What the monitor says of branches is what their weights say, and it names the place where numbers end."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from healing import Module, fit, model, rows
from torch import Tensor, nn

import surgery
from surgery.callbacks import AttentionTransfer, BranchMonitor
from surgery.kernels import features
from surgery.mixers.share import linear_share
from surgery.mixers.windows import narrowed
from surgery.patchers.interface import converted_layers
from surgery.training.branches import inputs_of, measure

WINDOWS = [{"size": 4}, {"size": 4, "sinks": 2}, {"size": 3, "layout": "terraced", "sinks": 1}]


def contexts(network: nn.Module, **inputs) -> list:
    """What the mixers are given, layer by layer."""
    seen = []
    handles = [m.mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in layers(network)]
    network(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def layers(network: nn.Module) -> list:
    return list(converted_layers(network).values())


def share_by_hand(mixer, context) -> Tensor:
    """Of joint weights, as a matrix: [B, T, H]."""
    groups = context.q.shape[2] // context.k.shape[2]
    scores = context.scaling * torch.einsum("bihd,bjhd->bhij", context.q, context.k.repeat_interleave(groups, 2))
    phi_q = features.apply(mixer.feature_map_q(), context.q)
    phi_k = features.apply(mixer.feature_map_k(), context.k).repeat_interleave(groups, 2)
    linear = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k)
    start, rank = 0, torch.arange(context.q.shape[1]).expand(context.q.shape[0], -1)
    if context.segments is not None:
        opens = nn.functional.pad(context.segments[:, 1:] != context.segments[:, :-1], (1, 0))
        start = torch.where(opens, rank, 0).cummax(1).values
        rank = rank - start
    same = torch.ones(1, 1, 1, dtype=torch.bool) if isinstance(start, int) else start[:, :, None] == start[:, None]
    query, key = rank[:, :, None], rank[:, None]
    visible = ((key <= query) & same).unsqueeze(1)
    near = visible & mixer.window.sees(query, key).unsqueeze(1)
    largest = scores.masked_fill(~near, float("-inf")).amax(-1, True)
    factor = mixer.mix.window_factor.sigmoid()[:, None, None]
    exact = torch.where(near, factor * (scores - largest).exp(), 0.0).sum(-1)
    far = torch.where(visible & ~near, linear, 0.0).sum(-1)
    return (far / (far + exact)).transpose(1, 2)


@pytest.mark.parametrize("window", WINDOWS, ids=["sliding", "sinks", "terraced"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_share_is_that_of_the_weights(window, packed):
    mixer = {"kind": "linear", "window": window, "mix": {"kind": "joint", "factor": 0.4}}
    network = surgery.apply(zoo.build("llama"), {"mixer": mixer}).eval()
    inputs = {"input_ids": zoo.tokens(2, 19)}
    if packed:
        inputs["position_ids"] = torch.tensor([[*range(9), *range(10)], [*range(13), *range(6)]])
    for module, context in zip(layers(network), contexts(network, **inputs), strict=True):
        assert (context.segments is not None) == packed
        found, expected = linear_share(module.mixer, context), share_by_hand(module.mixer, context)
        known = ~found.isnan()
        assert known.any()
        assert torch.allclose(found[known], expected[known], atol=1e-5)
        if window.get("layout") == "terraced":
            assert known.all()


def test_padding_has_no_share_and_an_average_is_told_by_its_norms():
    network = surgery.apply(zoo.build("llama"), {"mixer": {"kind": "gla", "window": {"size": 4}}}).eval()
    ids, mask = zoo.tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    first, context = layers(network)[0].mixer, contexts(network, input_ids=ids, attention_mask=mask)[0]
    share = linear_share(first, context)
    assert share[0].isfinite().all()
    assert share[1, 7:].isnan().all()
    assert share[1, :7].isfinite().all()
    both = first(context)[0]
    with narrowed(first, reach=0):
        linear = first(context)[0] / 2
    near = both - linear
    expected = linear.norm(dim=-1) / (linear.norm(dim=-1) + near.norm(dim=-1))
    assert torch.allclose(share[0], expected[0], atol=1e-5)


def test_what_is_logged_is_what_each_branch_costs():
    module = Module(
        surgery.apply(zoo.build("llama"), {"mixer": {"kind": "gla", "window": {"size": 4}}}).train(), lr=0.0
    )
    monitor = BranchMonitor(every=2, rows=2)
    used = fit(module, [monitor], rows(8), steps=4, accumulate_grad_batches=2)
    assert [step for step, _ in monitor.history] == [2, 4]
    found = monitor.history[-1][1]
    network, batch = module.net, rows(8)[7]

    def loss() -> float:
        return network(input_ids=batch, labels=batch).loss.item()

    assert found["loss"] == pytest.approx(loss(), rel=1e-5)
    with narrowed(network, reach=0):
        assert found["loss_linear"] == pytest.approx(loss(), rel=1e-5)
    with narrowed(network, linear=False):
        assert found["loss_window"] == pytest.approx(loss(), rel=1e-5)
    assert found["linear_gain"] == pytest.approx(found["loss_window"] - found["loss"])
    assert {f"linear_share/{i}" for i in range(3)} < found.keys()
    log_gates = []
    handles = [m.mixer.gate.register_forward_hook(lambda _, args, out: log_gates.append(out)) for m in layers(network)]
    network(batch)
    for handle in handles:
        handle.remove()
    half_lives = -math.log(2) / torch.stack(log_gates)
    assert found["half_life_10"] < found["half_life_50"] < found["half_life_90"]
    assert found["half_life_50"] == pytest.approx(half_lives.median().item(), rel=0.1)
    assert used.callback_metrics["branches/linear_gain"] == pytest.approx(found["linear_gain"])
    assert module.net.training
    assert not any(m.mixer._forward_pre_hooks for m in layers(network))


def test_without_a_window_there_is_only_the_loss():
    network = surgery.apply(zoo.build("llama"), {"mixer": {"kind": "linear"}})
    assert set(measure(network, inputs_of(rows(1)[0]))) == {"loss"}


@pytest.mark.parametrize("where", ["feature_map_q.weight", "mix.q_bias"])
def test_a_parameter_that_is_no_number_is_named_before_it_spreads(where):
    module = Module(model())
    layer = module.net.model.layers[1].self_attn
    parameter = dict(layer.mixer.named_parameters())[where]
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    before = module.net.lm_head.weight.clone()
    place = rf"layer 1 \(model.layers.1.self_attn\), whose parameter {where} is not finite"
    with pytest.raises(surgery.SurgeryError, match=rf"the loss is nan at step 0: .* {place}"):
        fit(module, [BranchMonitor()], rows(2))
    assert torch.equal(module.net.lm_head.weight, before)


BREAKS = {
    "in its linear branch": lambda layer: layer.mixer.feature_map_q.weight.fill_(1e38),
    "in its window": lambda layer: [p.weight.mul_(1e25) for p in (layer.q_proj, layer.k_proj)],
    "which is given a v that is not finite": lambda layer: layer.v_proj.weight.fill_(torch.inf),
}


@pytest.mark.parametrize("part", list(BREAKS))
def test_the_broken_branch_is_named(part):
    class Breaks(Module):
        def training_step(self, batch, index):
            if index == 1:
                with torch.no_grad():
                    BREAKS[part](self.net.model.layers[2].self_attn)
            return super().training_step(batch, index)

    with pytest.raises(surgery.SurgeryError, match=rf"loss is nan at step 1: .* layer 2 \(.*\), {part}"):
        fit(Breaks(model()), [BranchMonitor(every=1)], rows(3))


def test_a_gradient_that_is_no_number_is_named():
    class Root(Module):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            zero = self.net.model.layers[0].self_attn.mixer.mix.k_bias
            return loss + (zero[0] - zero[0].detach()).abs().sqrt()  # zero, with an infinite slope

    with pytest.raises(surgery.SurgeryError, match=r"the gradient of net\..*mix.k_bias is not finite at step 0"):
        fit(Root(model()), [BranchMonitor()], rows(1))
    fit(Root(model()), [BranchMonitor(guard=False)], rows(1))


def test_it_watches_a_transfer_too_and_knows_batches():
    monitor = BranchMonitor(every=1)
    fit(Module(model()), [AttentionTransfer(), monitor], rows(2))
    assert len(monitor.history) == 2
    ids = rows(1)[0]
    for batch in (ids, {"input_ids": ids, "labels": ids}, (ids, 3), [{"input_ids": ids}]):
        assert torch.equal(inputs_of(batch)["input_ids"], ids)
    with pytest.raises(surgery.SurgeryError, match="no token ids found in a batch of type str: say where"):
        inputs_of("text")
    own = BranchMonitor(inputs=lambda batch: {"input_ids": batch["tokens"]})
    assert torch.equal(own.inputs({"tokens": ids})["input_ids"], ids)
