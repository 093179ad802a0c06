"""How tokens mix: one file per mathematical family. Adding one is a file and a line here."""

from typing import Annotated

from pydantic import Field

from .base import AttentionContext, AttentionShape, Config, Mixer, State
from .gla import GLAConfig
from .linear import LinearConfig
from .window import WindowOnlyConfig

MixerConfig = Annotated[LinearConfig | GLAConfig | WindowOnlyConfig, Field(discriminator="kind")]

__all__ = [
    "AttentionContext",
    "AttentionShape",
    "Config",
    "GLAConfig",
    "LinearConfig",
    "Mixer",
    "MixerConfig",
    "State",
    "WindowOnlyConfig",
]
