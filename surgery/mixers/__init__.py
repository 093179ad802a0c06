"""How tokens mix: one file per mathematical family. Adding one is a file and a line here."""

from typing import Annotated

from pydantic import Field

from .base import AttentionContext, AttentionShape, Config, Mixer, State
from .bidirectional import BidirectionalConfig
from .by_depth import ByDepthConfig
from .delta import DeltaConfig, GatedDeltaConfig, KDAConfig
from .diag import DiagConfig
from .gated_scalar import GatedScalarConfig
from .gla import GLAConfig
from .gsa import GSAConfig
from .hgrn2 import HGRN2Config
from .lightning import LightningConfig
from .linear import LinearConfig
from .mesa import MesaConfig
from .norm import NormConfig
from .window import WindowOnlyConfig

MixerConfig = Annotated[
    LinearConfig
    | LightningConfig
    | NormConfig
    | GatedScalarConfig
    | GLAConfig
    | HGRN2Config
    | GSAConfig
    | MesaConfig
    | DeltaConfig
    | GatedDeltaConfig
    | KDAConfig
    | DiagConfig
    | WindowOnlyConfig
    | BidirectionalConfig
    | ByDepthConfig,
    Field(discriminator="kind"),
]
ByDepthConfig.model_rebuild(_types_namespace={"MixerConfig": MixerConfig})

__all__ = [
    "AttentionContext",
    "AttentionShape",
    "BidirectionalConfig",
    "ByDepthConfig",
    "Config",
    "DeltaConfig",
    "DiagConfig",
    "GLAConfig",
    "GSAConfig",
    "GatedDeltaConfig",
    "GatedScalarConfig",
    "HGRN2Config",
    "KDAConfig",
    "LightningConfig",
    "LinearConfig",
    "MesaConfig",
    "Mixer",
    "MixerConfig",
    "NormConfig",
    "State",
    "WindowOnlyConfig",
]
