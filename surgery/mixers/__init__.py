"""How tokens mix: one file per mathematical family. Adding one is a file and a line here."""

from typing import Annotated

from pydantic import Field

from .base import AttentionContext, AttentionShape, Config, Mixer, State
from .gated_scalar import GatedScalarConfig
from .gla import GLAConfig
from .gsa import GSAConfig
from .hgrn2 import HGRN2Config
from .lightning import LightningConfig
from .linear import LinearConfig
from .window import WindowOnlyConfig

MixerConfig = Annotated[
    LinearConfig | LightningConfig | GatedScalarConfig | GLAConfig | HGRN2Config | GSAConfig | WindowOnlyConfig,
    Field(discriminator="kind"),
]

__all__ = [
    "AttentionContext",
    "AttentionShape",
    "Config",
    "GLAConfig",
    "GSAConfig",
    "GatedScalarConfig",
    "HGRN2Config",
    "LightningConfig",
    "LinearConfig",
    "Mixer",
    "MixerConfig",
    "State",
    "WindowOnlyConfig",
]
