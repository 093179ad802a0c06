"""What attention transfer can compare, what it costs, and how it shares a fit with others."""

from __future__ import annotations

import lightning
import pytest
import torch
import zoo
from healing import Module, Plain, by_hand, fit, model, parameters, rows, same, trainer
from torch import Tensor, nn

import surgery
from surgery.callbacks import AttentionTransfer, LoRAUnfreezing
from surgery.callbacks.schedules import Hard
from surgery.mixers.windows import narrowed
from surgery.patchers.interface import converted_layers


def softmax_attention(context) -> Tensor:
    """[B, T, H, D], by the formula."""
    groups = context.q.shape[2] // context.k.shape[2]
    q, k, v = context.q, *(x.repeat_interleave(groups, 2) for x in (context.k, context.v))
    scores = context.scaling * torch.einsum("bihd,bjhd->bhij", q, k)
    ahead = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(ahead, float("-inf")).softmax(-1), v)


def terms_by_hand(network: nn.Module, batch: Tensor, linear: bool) -> list[dict[str, Tensor]]:
    """Of every layer, the terms of the loss from what its mixer is given while the model runs as teacher."""
    contexts = {}
    handles = [
        module.mixer.register_forward_pre_hook(lambda mixer, args, i=i: contexts.setdefault(i, args[0]))
        for i, module in enumerate(converted_layers(network).values())
    ]
    with surgery.mode(network, "transfer"):
        network(batch)
    for handle in handles:
        handle.remove()
    found = []
    for i, module in enumerate(converted_layers(network).values()):
        with narrowed(network, reach=0 if linear else None):
            student = module.mixer.forward(contexts[i])[0]
            cross_entropy = module.mixer.cross_entropy(contexts[i]).mean()
        teacher = softmax_attention(contexts[i])
        error = (student - teacher).square().mean()
        projected = ((student - teacher).flatten(2) @ module.o_proj.weight.T).norm(dim=-1).mean()
        found.append(
            {
                "mse": error,
                "normalized_mse": error / teacher.var(),
                "cross_entropy": cross_entropy,
                "projected_l2": projected / module.o_proj.weight.shape[0] ** 0.5,
            }
        )
    return found


@pytest.mark.parametrize("branch", ["both", "linear"])
@pytest.mark.parametrize("recipe", ["llama/logmass", "llama/lolcats"])
def test_every_term_is_its_formula(recipe, branch):
    network, batch = model(recipe=recipe), rows(1)[0]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".mixer." in name:
                parameter += 0.3 * torch.randn_like(parameter)
        terms = terms_by_hand(network, batch, branch == "linear")
    weights = {"mse": 2.0, "normalized_mse": 0.5, "cross_entropy": 0.1, "projected_l2": 3.0}
    for loss in [{name: 1.0} for name in weights] + [weights]:
        callback = AttentionTransfer(loss, branch=branch, layer_weights={1: 5.0})
        _, found = callback.transfer(Module(network), lambda: network(batch))
        by_layer = torch.stack([sum(w * layer[name] for name, w in loss.items()) for layer in terms])
        assert torch.allclose(found, (by_layer * torch.tensor([1.0, 5.0, 1.0])).mean(), rtol=1e-4)
        found.backward()
    assert all(p.grad is None or ".mixer." in name for name, p in network.named_parameters())


def test_a_scheduled_weight_and_branches_are_the_hand_written_loop():
    module, expected = Plain(model()), model()
    schedule = {"kind": "steps", "begin": 1.0, "then": [[1, 0.0], [0.75, 4.0]]}
    fit(module, [AttentionTransfer({"mse": 100}, branch="linear", weight=schedule, replace=False)], rows(4))

    def loss(step: int, batch: Tensor) -> Tensor:
        with narrowed(expected, reach=0), surgery.mode(expected, "transfer") as switch:
            own = expected(input_ids=batch, labels=batch).loss
        return own + [1.0, 0.0, 0.0, 4.0][step] * 100 * torch.stack(list(switch.losses.values())).mean()

    by_hand(expected, rows(4), loss)
    assert same(module.net, expected)


def test_a_transfer_to_the_linear_branch_leaves_the_balance_of_branches_alone():
    """Its gradient would be rounding, which AdamW makes as large as any other."""
    module, before = Module(model()), model().state_dict()
    fit(module, [AttentionTransfer({"mse": 1, "cross_entropy": 1}, branch="linear")], rows(4))
    moved = {
        name.split(".mixer.")[1] for name, p in module.net.state_dict().items() if not torch.equal(p, before[name])
    }
    assert moved == {"feature_map_q.weight", "feature_map_k.weight", "mix.k_weight"}


def test_one_forward_and_no_backward_through_the_network():
    """Stage 1: what is kept for the backward pass does not grow with what is outside of attention, and one forward
    serves student and teacher."""
    calls = {"model": 0, "mlp": 0, "mlp backward": 0}

    def kept(wide: bool) -> int:
        network = model(intermediate_size=2048 if wide else 48, vocab_size=2048 if wide else zoo.VOCAB)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.model.register_forward_hook(lambda *_: calls.update(model=calls["model"] + 1))
        mlp = network.model.layers[0].mlp
        mlp.register_forward_hook(lambda *_: calls.update(mlp=calls["mlp"] + 1))
        mlp.register_full_backward_hook(lambda *_: calls.update({"mlp backward": 1}))
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fit(Module(network), [AttentionTransfer()], rows(2))
        moved = [name for name, p in network.named_parameters() if not torch.equal(p, before[name])]
        assert moved and all(".mixer." in name for name in moved)
        return sum(seen.values())

    narrow = kept(False)
    assert calls == {"model": 2, "mlp": 2, "mlp backward": 0}
    assert kept(True) <= 1.2 * narrow


def test_the_order_of_callbacks_does_not_matter():
    """What transfer releases at its end must not freeze what starts to learn at the same step."""
    networks = []
    for order in (1, -1):
        module = Plain(model())
        torch.manual_seed(5)
        fit(module, [AttentionTransfer(stop=2), LoRAUnfreezing(start=2, rank=2, trains=["mix"])][::order], rows(4))
        networks.append(module.net)
        assert any(p.abs().sum() > 0 for p in parameters(module.net, ".lora_B."))
    assert same(*networks)


def test_resuming_in_the_middle_of_a_weights_plateau(tmp_path):
    """The weight falls once the loss has not fallen; a resumed fit remembers what it has seen."""

    class Logs(Plain):
        def training_step(self, batch, index):
            self.log("up", float(index))
            return super().training_step(batch, index)

    def callback() -> AttentionTransfer:
        plateau = {"kind": "plateau", "begin": 1.0, "end": 100.0, "monitor": "up", "patience": 2, "every": 1}
        return AttentionTransfer({"mse": 1}, weight=plateau)

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                trainer.should_stop = True

    whole, part, resumed = (Logs(model()) for _ in range(3))
    first, last = callback(), callback()
    fit(whole, [first], rows(5))
    assert first.weight.reached
    fit(part, [callback(), Stop()], rows(5))
    batches = torch.utils.data.DataLoader(rows(5)[3:], batch_size=None)

    class Rest:
        def __iter__(self):
            return iter(batches)

    trainer([last], 5).fit(resumed, Rest(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert last.weight == first.weight
    assert same(resumed.net, whole.net, 0.0)


def test_a_metric_that_nobody_logs_is_named():
    weight = {"kind": "plateau", "begin": 1.0, "end": 0.0, "monitor": "val_los", "every": 1}
    with pytest.raises(
        surgery.SurgeryError, match="plateau of 'val_los', which is not logged: name one of transfer_loss"
    ):
        fit(Module(model()), [AttentionTransfer(weight=weight)], rows(3))


class InSetup(Plain):
    """A user's own that loads its model late."""

    def setup(self, stage):
        self.net = model()


class InConfigureModel(Plain):
    """As sharded training wants it."""

    def configure_model(self):
        if self.net is None:
            self.net = model()


@pytest.mark.parametrize("kind", [InSetup, InConfigureModel])
def test_callbacks_wait_until_there_is_a_model(kind):
    expected, late = Plain(model()), kind(None)
    fit(expected, [AttentionTransfer()], rows(3))
    fit(late, [AttentionTransfer()], rows(3))
    assert same(late.net, expected.net, 0.0)
    assert not {"training_step", "configure_model"} & late.__dict__.keys()
    adapted = kind(None)
    fit(adapted, [AttentionTransfer(stop=1), LoRAUnfreezing(start=1, rank=2)], rows(3))
    assert any(p.abs().sum() > 0 for p in parameters(adapted.net, ".lora_B."))


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        surgery.SurgeryError, match=r"layer_weights names layers \[7\], but those converted are \[0, 1, 2\]"
    ):
        fit(Module(model()), [AttentionTransfer(layer_weights={7: 1.0})], rows(1))
    with pytest.raises(surgery.SurgeryError, match="no schedule 'lineer': choose one of constant, linear"):
        AttentionTransfer(weight={"kind": "lineer"})
    with pytest.raises(surgery.SurgeryError, match="schedule hard takes begin, end, at, not begin, finish"):
        AttentionTransfer(weight={"kind": "hard", "begin": 1, "finish": 0})
    with pytest.raises(surgery.SurgeryError, match="at a fraction between 0 and 1 or at a whole step, not at 1.5"):
        Hard(1, 0, at=1.5)
