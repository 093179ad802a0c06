"""LinFusion's loss of three terms inside modules as users write them, and what it does to a small denoiser."""

from __future__ import annotations

import copy

import lightning
import pytest
import torch
from denoisers import RECIPE, build, inputs, run, shake
from healing import Module as LanguageModule
from healing import fit, model, rows
from torch import Tensor, nn

import surgery
from surgery import adapters
from surgery.callbacks import OutputDistillation, StageRunner, callbacks_for
from surgery.patchers.interface import converted_layers
from surgery.training.parameters import new_parameters, train_only

MIXER = surgery.load_recipe(RECIPE).to_dict()["mixer"]


class Denoiser(lightning.LightningModule):
    """A user's own: predicts the noise in latents."""

    def __init__(self, unet: nn.Module, lr: float = 1e-2, **how) -> None:
        super().__init__()
        self.unet, self.lr, self.how = unet, lr, how

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        noise = torch.randn(batch["sample"].shape, generator=torch.Generator().manual_seed(index))
        found = self.unet(**{**batch, "sample": batch["sample"] + noise}, **self.how)
        return nn.functional.mse_loss(found[0] if isinstance(found, tuple) else found.sample, noise)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def converted() -> nn.Module:
    unet = surgery.apply(build(), RECIPE)
    shake(unet)
    return unet


def batches(count: int) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        words = torch.randn(2, 5, 12, generator=draw)
        times = torch.randint(1000, (2,), generator=draw)
        found.append({"sample": torch.randn(2, 4, 8, 8, generator=draw), "timestep": times})
        found[-1]["encoder_hidden_states"] = words
    return found


@pytest.mark.parametrize("layers", [None, {"mse": 0.5}], ids=["output", "layers"])
@pytest.mark.parametrize("replace", [False, True])
def test_it_is_the_loop_by_hand(layers, replace):
    ours = converted()
    theirs = copy.deepcopy(ours)
    for unet in (ours, theirs):
        train_only(unet, new_parameters(unet, ["mixer"]).values())
    callback = OutputDistillation(weight=2.0, output=0.5, layers=layers, replace=replace)
    fit(Denoiser(ours, return_dict=replace), [callback], batches(3))

    teacher = build()
    learning = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-2, momentum=0.9)
    for index, batch in enumerate(batches(3)):
        noise = torch.randn(batch["sample"].shape, generator=torch.Generator().manual_seed(index))
        given = {**batch, "sample": batch["sample"] + noise}
        seen: dict[str, tuple] = {}
        handles = [
            teacher.get_submodule(path).register_forward_hook(
                lambda _, args, kwargs, out, path=path: seen.update({path: (args[0], out)}), with_kwargs=True
            )
            for path in converted_layers(theirs)
        ]
        with torch.no_grad():
            wanted = teacher(**given).sample
        for handle in handles:
            handle.remove()
        found = theirs(**given).sample
        loss = nn.functional.mse_loss(found, wanted)
        terms = []
        for path, module in converted_layers(theirs).items() if layers else ():
            # each layer on the teacher's tokens, before the output projection
            before = []
            for each in (module, teacher.get_submodule(path)):
                handle = each.to_out[0].register_forward_hook(lambda _, args, out: before.append(args[0]))
                each(seen[path][0])
                handle.remove()
            terms.append(nn.functional.mse_loss(*before))
        added = 0.5 * loss + (0.5 * torch.stack(terms).mean() if terms else 0)
        total = 2 * added + (0 if replace else nn.functional.mse_loss(found, noise))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6), name


def test_the_recipe_heals_in_a_trainer():
    recipe = surgery.load_recipe(RECIPE).override({"stages.0.tokens": 64 * 2 * 4, "stages.0.rank": 2})
    unet = surgery.apply(build(), recipe)
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    runner = StageRunner(recipe, tokens_per_step=64 * 2)
    assert runner.steps == 4
    fit(Denoiser(unet), [runner], batches(4))
    moved = {
        name
        for name, x in unet.named_parameters()
        if not torch.equal(before.get(adapters.canonical(name), torch.zeros(())), x)
    }
    assert moved and all(".mixer." in name or ".lora_" in name for name in moved)
    attention = converted_layers(unet)
    assert all(any(name.startswith(f"{path}.to_q.lora_") for name in moved) for path in attention)
    assert all(f"{path}.mixer.residual_k.up_weight" in moved for path in attention)
    with surgery.mode(unet, "teacher"):
        assert torch.equal(run(unet, inputs()), run(build(), inputs()))


def test_callbacks_follow_the_weights_of_the_recipe():
    loss = {"task": 2, "output": 1, "layers": {"mse": 3}}
    stage = {"kind": "denoising", "loss": loss, "tokens": 10, "lr": 1e-3}
    _, distillation = callbacks_for({"mixer": MIXER, "stages": [stage]}, tokens_per_step=1)
    assert (distillation.weight(0, 1), distillation.output, distillation.layers.loss.mse) == (0.5, 1, 3)
    assert not distillation.replace
    _, alone = callbacks_for({"mixer": MIXER, "stages": [stage | {"loss": {"task": 0}}]}, tokens_per_step=1)
    assert alone.replace and alone.weight(0, 1) == 1
    assert (
        len(
            callbacks_for(
                {"mixer": MIXER, "stages": [stage | {"loss": {"output": 0, "layers": None}}]}, tokens_per_step=1
            )
        )
        == 1
    )


def test_what_is_refused():
    stage = {"kind": "denoising", "tokens": 10, "lr": 1e-3}
    with pytest.raises(surgery.RecipeError, match="bidirectional"):
        surgery.load_recipe({"mixer": {"kind": "linear"}, "stages": [stage]})
    with pytest.raises(surgery.RecipeError, match="no term has a weight"):
        surgery.load_recipe({"mixer": MIXER, "stages": [stage | {"loss": {"task": 0, "output": 0, "layers": None}}]})

    class Idle(Denoiser):
        def training_step(self, batch, index):
            return self.unet.conv_in.weight.sum()

    with pytest.raises(surgery.SurgeryError, match="never ran the converted model"):
        fit(Idle(converted()), [OutputDistillation()], batches(1))


def test_language_models_have_outputs_too():
    network = model()
    before = copy.deepcopy(network.state_dict())
    fit(LanguageModule(network), [OutputDistillation(replace=True)], rows(2))
    assert any(not torch.equal(before[name], x) for name, x in network.state_dict().items())


def test_distillation_closes_the_gap():
    """A random denoiser, with attention that matters: the error against its own softmax falls by a third."""
    unet = surgery.apply(build(), RECIPE)
    given = inputs(batch=8)
    with surgery.mode(unet, "teacher"):
        wanted = run(unet, given)
    start = (run(unet, given) - wanted).norm() / wanted.norm()
    recipe = surgery.load_recipe(RECIPE).override(
        {"stages.0.tokens": 80, "stages.0.lr": 1e-2, "stages.0.rank": 4, "stages.0.loss.task": 0}
    )

    class Adam(Denoiser):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), weight_decay=0)

    fit(Adam(unet), [StageRunner(recipe, tokens_per_step=1)], batches(80))
    error = (run(unet, given) - wanted).norm() / wanted.norm()
    assert error < 0.7 * start
