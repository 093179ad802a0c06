"""Small denoisers of diffusers with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'surgery[diffusion]'")

RECIPE = "diffusion/linfusion"
DIT = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8)


def unet(**changes: Any) -> Any:
    blocks = dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    sizes = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8)
    return diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=12, **blocks, **sizes, **changes)


def unconditional() -> Any:
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )


def dit() -> Any:
    return diffusers.DiTTransformer2DModel(**DIT, norm_num_groups=8)


def pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(
        **DIT, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False
    )


BUILDERS = {"unet": unet, "unconditional": unconditional, "dit": dit, "pixart": pixart}


def build(kind: str = "unet") -> Any:
    """In eval mode, with weights that make attention matter: diffusers starts some layers at zero."""
    torch.manual_seed(0)
    model = BUILDERS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(kind: str = "unet", size: int = 8, batch: int = 2) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(size)
    channels = 3 if kind == "unconditional" else 4
    found: dict[str, Any] = {
        "sample" if kind.startswith("un") else "hidden_states": torch.randn(
            batch, channels, size, size, generator=draw
        ),
        "timestep": torch.arange(batch) + 3,
    }
    if kind in ("unet", "pixart"):
        found["encoder_hidden_states"] = torch.randn(batch, 5, 12, generator=draw)
    if kind == "pixart":
        found["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    if kind == "dit":
        found["class_labels"] = torch.arange(batch)
    return found


def run(model: nn.Module, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**given).sample


def shake(model: nn.Module, size: float = 0.05) -> None:
    """Move what a conversion added away from where it starts."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mixer." in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=draw))
