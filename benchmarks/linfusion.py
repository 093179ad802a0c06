"""What a denoiser loses to linear attention: `python -m benchmarks.linfusion --out DIR --minutes 10`.

Trains a UNet of diffusers to draw coloured shapes by name (half the time), converts a copy of nothing but its
self-attention by the recipe diffusion/linfusion, distils it (the other half), and samples from the softmax model, the
converted and the distilled one with the same seeds. The folder then has

linfusion.png: those samples, a row for each model; linfusion.json: everything below, with versions and device;
model/: the distilled UNet, as `surgery.from_pretrained` reads it.

noise: the error of the noise on images that were not trained on. output: how far the predicted noise is from the
softmax model's, relative. right: samples in which a classifier of real images sees the shape and colour asked for.
frechet: between the classifier's features of samples and of real images (FID has other features, and is out of scope).
seconds: of one prediction, by resolution, on one image. Runs on the first GPU, else on the CPU. `--quick` is a toy.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import lightning
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import surgery
from benchmarks.shapes import COLORS, SHAPES, draw_batch
from surgery import adapters
from surgery.callbacks import StageRunner
from surgery.evaluation.provenance import provenance

RECIPE = "diffusion/linfusion"
WORDS = 32
"""Width of what the UNet is told in place of a text."""


@dataclass(frozen=True)
class Size:
    """per_class: samples that are measured; drawn: of each row of the picture; held_out: images whose noise is
    predicted; resolutions: of the timing."""

    pixels: int = 32
    channels: tuple[int, int] = (64, 128)
    layers: int = 2
    batch: int = 128
    steps: int = 50
    per_class: int = 64
    drawn: int = 12
    held_out: int = 1024
    classifier: int = 600
    resolutions: tuple[int, ...] = (32, 64, 128, 256)
    rank: int = 16


QUICK = Size(8, (16, 16), 1, 8, 2, 1, 3, 8, 4, (8, 16), 2)


class Painter(nn.Module):
    """A UNet and the two words, shape and colour, that it is told by cross-attention."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.words = nn.Embedding(len(SHAPES) + len(COLORS), WORDS)
        self.unet = diffusers.UNet2DConditionModel(
            sample_size=size.pixels,
            in_channels=3,
            out_channels=3,
            block_out_channels=size.channels,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            layers_per_block=size.layers,
            cross_attention_dim=WORDS,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        self.scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")

    def forward(self, images: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        told = self.words(labels + torch.tensor([0, len(SHAPES)], device=labels.device))
        return self.unet(images, times, encoder_hidden_states=told).sample

    def noised(self, images: Tensor, draw: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy images, times, noise)."""
        noise = torch.randn(images.shape, generator=draw, device=images.device)
        times = torch.randint(1000, (len(images),), generator=draw, device=images.device)
        return self.scheduler.add_noise(images, noise, times), times, noise

    @torch.no_grad()
    def sample(self, labels: Tensor, steps: int) -> Tensor:
        """Images in [-1, 1], the same for the same labels but for the weights."""
        shape = (len(labels), 3, self.unet.config.sample_size, self.unet.config.sample_size)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(labels.device)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self(x, t.to(x.device), labels), t, x).prev_sample
        return x.clamp(-1, 1)


class Denoiser(lightning.LightningModule):
    """As anyone would train it; nothing of ours."""

    def __init__(self, painter: Painter, lr: float = 1e-3) -> None:
        super().__init__()
        self.painter, self.lr = painter, lr

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        noisy, times, noise = self.painter.noised(images)
        return nn.functional.mse_loss(self.painter(noisy, times, labels), noise)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)


class Drawings(IterableDataset):
    """Batches without end."""

    def __init__(self, size: Size, device: torch.device, seed: int) -> None:
        self.size, self.device, self.seed = size, device, seed

    def __iter__(self) -> Any:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        while True:
            yield draw_batch(self.size.batch, self.size.pixels, self.device, generator)


def fit(painter: Painter, size: Size, device: torch.device, steps: int, callbacks: list, seed: int) -> float:
    """Train; returns the seconds of a step, without the first ones."""
    torch.manual_seed(seed)
    clock = Clock()
    trainer = lightning.Trainer(
        max_steps=steps,
        callbacks=[*callbacks, clock],
        accelerator=device.type,
        devices=1,
        precision="bf16-mixed" if device.type == "cuda" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Denoiser(painter.train()), DataLoader(Drawings(size, device, seed), batch_size=None))
    painter.to(device).eval()
    return clock.seconds()


class Clock(lightning.Callback):
    """When steps ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.monotonic())

    def seconds(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        late = self.times[len(self.times) // 2 :]
        return (time.monotonic() - late[0]) / max(1, len(late) - 1)


def steps_in(seconds: float, run: Callable[[int], float], probe: int) -> int:
    """How many steps last so long, by those of a short run."""
    return max(2, round(seconds / run(probe)))


def cosine(steps: int) -> dict[str, Any]:
    """The recipe of a fit of so many steps; one token stands for a step."""
    warm = min(100, steps // 10)
    return {"stages.0.tokens": steps, "stages.0.schedule": {"kind": "cosine", "warmup": warm}}


class Falling(lightning.Callback):
    """The learning rate of the softmax model's own training falls to zero."""

    def __init__(self, lr: float, steps: int) -> None:
        self.lr, self.steps = lr, steps

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.lr * min(1.0, (trainer.global_step + 1) / 100) * (1 - trainer.global_step / self.steps)


def classifier(size: Size, device: torch.device) -> nn.Sequential:
    """Tells shapes and colours of real images; its last layer but one are the features."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    layers += [nn.Flatten(), nn.LazyLinear(64), nn.ReLU()]
    net = nn.Sequential(nn.Sequential(*layers), nn.Linear(64, len(SHAPES) + len(COLORS))).to(device)
    generator = torch.Generator(device).manual_seed(11)
    net(draw_batch(2, size.pixels, device, generator)[0])  # makes the lazy layer
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(size.classifier):
        images, labels = draw_batch(size.batch, size.pixels, device, generator)
        shape, color = net(images + 0.05 * torch.randn_like(images)).split([len(SHAPES), len(COLORS)], 1)
        loss = nn.functional.cross_entropy(shape, labels[:, 0]) + nn.functional.cross_entropy(color, labels[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def judge(net: nn.Sequential, images: Tensor, labels: Tensor, real: Tensor) -> dict[str, float]:
    """right and frechet, see above."""
    features, wanted = net[0](images), net[0](real)
    shape, color = net[1](features).split([len(SHAPES), len(COLORS)], 1)
    right = (shape.argmax(1) == labels[:, 0]) & (color.argmax(1) == labels[:, 1])
    a, b = features.double().cpu(), wanted.double().cpu()
    # tr √(A B) is the sum of the roots of its eigenvalues, which are not negative
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * roots
    return {"right": float(right.double().mean()), "frechet": float(distance)}


@torch.no_grad()
def errors(painter: Painter, size: Size, device: torch.device) -> dict[str, float]:
    """noise and output, see above."""
    draw = torch.Generator(device).manual_seed(12)
    own, apart = [], []
    for _ in range(max(1, size.held_out // size.batch)):
        images, labels = draw_batch(size.batch, size.pixels, device, draw)
        noisy, times, noise = painter.noised(images, draw)
        found = painter(noisy, times, labels)
        own.append(nn.functional.mse_loss(found, noise))
        if hasattr(painter.unet, "surgery"):
            with surgery.mode(painter.unet, "teacher"):
                wanted = painter(noisy, times, labels)
            apart.append((found - wanted).norm() / wanted.norm())
    return {"noise": float(torch.stack(own).mean()), "output": float(torch.stack(apart).mean()) if apart else 0.0}


@torch.no_grad()
def seconds(painter: Painter, pixels: int, device: torch.device) -> float:
    """The median of some predictions on one image, in bf16 on a GPU."""
    x, labels = torch.randn(1, 3, pixels, pixels, device=device), torch.zeros(1, 2, dtype=torch.long, device=device)
    took = []
    for _ in range(7):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            painter(x, torch.zeros(1, device=device), labels)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return sorted(took[2:])[2]


def picture(rows: list[Tensor], path: Path, scale: int = 4) -> None:
    """A row of images [N, 3, H, W] in [-1, 1] for each model."""
    pixels = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("linfusion"))
    parser.add_argument("--minutes", type=float, default=10.0, help="of both trainings together")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(arguments)
    size = QUICK if given.quick else Size()
    budget = 0.0 if given.quick else 30 * given.minutes
    device = torch.device("cuda" if torch.cuda.is_available() and not given.quick else "cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    with torch.random.fork_rng():
        return measure(given.out, size, budget, device)


def measure(out: Path, size: Size, budget: float, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    painter = Painter(size).to(device)
    probe = 60 if budget else 2
    steps = steps_in(budget, lambda n: fit(copy.deepcopy(painter), size, device, n, [], 1), probe)
    print(f"training {sum(p.numel() for p in painter.unet.parameters()):,} weights for {steps} steps", flush=True)
    fit(painter, size, device, steps, [Falling(1e-3, steps)], 2)

    net = classifier(size, device)
    labels = torch.cartesian_prod(torch.arange(len(SHAPES)), torch.arange(len(COLORS))).to(device)
    order = torch.randperm(len(labels) * size.per_class, generator=torch.Generator().manual_seed(0)).to(device)
    asked = labels.repeat(size.per_class, 1)[order]
    real = draw_batch(len(asked), size.pixels, device, torch.Generator(device).manual_seed(13))[0]
    rows: list[Tensor] = []
    result: dict[str, Any] = {
        "provenance": provenance(painter.unet) | {"diffusers": diffusers.__version__},
        "recipe": RECIPE,
        "parameters": sum(p.numel() for p in painter.unet.parameters()),
        "steps": {"softmax": steps},
    }
    # how much of frechet is chance
    others = draw_batch(len(asked), size.pixels, device, torch.Generator(device).manual_seed(14))
    result["models"] = {"real": judge(net, *others, real)}

    def look(name: str) -> None:
        images = torch.cat([painter.sample(part, size.steps) for part in asked.split(512)])
        found = judge(net, images, asked, real) | errors(painter, size, device)
        found["pixels"] = float((images[: size.drawn] - rows[0]).square().mean()) if rows else 0.0
        rows.append(images[: size.drawn])
        result["models"][name] = found
        print(name, found, flush=True)

    look("softmax")
    times = {"softmax": [seconds(painter, pixels, device) for pixels in size.resolutions]}
    recipe = surgery.load_recipe(RECIPE).override({"stages.0.rank": size.rank, "stages.0.alpha": size.rank})
    recipe = recipe.override({"stages.0.lr": 1e-3})  # of small models

    def heal(painter: Painter, steps: int, seed: int) -> float:
        runner = StageRunner(recipe.override(cosine(steps)), tokens_per_step=1)
        return fit(painter, size, device, steps, [runner], seed)

    surgery.apply(painter.unet, recipe)
    look("converted")
    times["linear"] = [seconds(painter, pixels, device) for pixels in size.resolutions]
    steps = steps_in(budget, lambda n: heal(copy.deepcopy(painter), n, 3), probe)
    print(f"distilling for {steps} steps", flush=True)
    heal(painter, steps, 4)
    look("distilled")
    adapters.merge(painter.unet)
    painter.unet.save_pretrained(out / "model")
    loaded = surgery.from_pretrained(out / "model").state_dict()
    kept = painter.unet.state_dict()
    result["saved whole"] = loaded.keys() == kept.keys() and all(
        torch.equal(loaded[k], x.cpu()) for k, x in kept.items()
    )
    result["steps"]["distillation"] = steps
    result["seconds"] = [
        {"pixels": pixels, "tokens": pixels**2, "softmax": a, "linear": b}
        for pixels, a, b in zip(size.resolutions, times["softmax"], times["linear"], strict=True)
    ]
    picture(rows, out / "linfusion.png")
    (out / "linfusion.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
