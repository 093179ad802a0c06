"""Generated images: one coloured shape on a dark gradient, anywhere, of any size."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = ("disc", "square", "triangle", "ring")
COLORS = {"red": (1.0, -0.6, -0.6), "green": (-0.6, 0.8, -0.6), "blue": (-0.4, -0.2, 1.0), "yellow": (1.0, 0.9, -0.7)}


def draw_batch(count: int, pixels: int, device: torch.device, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(images [N, 3, P, P] in [-1, 1], labels [N, 2]: index of the shape and of the colour)."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=draw, device=device)

    labels = torch.stack([torch.randint(len(x), (count,), generator=draw, device=device) for x in (SHAPES, COLORS)], 1)
    axis = torch.linspace(-1, 1, pixels, device=device)
    radius = uniform(0.25, 0.5)
    x, y = axis[None, None, :] - uniform(-0.45, 0.45), axis[None, :, None] - uniform(-0.45, 0.45)
    far = (x.square() + y.square()).sqrt()
    # how far each pixel is outside of each shape
    outside = torch.stack(
        [
            far - radius,
            torch.maximum(x.abs(), y.abs()) - 0.85 * radius,
            torch.maximum(0.87 * x.abs() - 0.5 * y - 0.5 * radius, y - 0.6 * radius),
            (far - 0.75 * radius).abs() - 0.25 * radius,
        ],
        1,
    )
    mine = outside[torch.arange(count, device=device), labels[:, 0]]
    inside = (0.5 - mine * pixels / 2).clamp(0, 1).unsqueeze(1)
    paint = torch.tensor(list(COLORS.values()), device=device)[labels[:, 1]].view(count, 3, 1, 1)
    ground = (-0.7 + 0.3 * uniform(-1, 1) * axis[None, :, None]).expand(-1, -1, pixels).unsqueeze(1)
    return inside * paint + (1 - inside) * ground, labels
