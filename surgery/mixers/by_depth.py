"""`by_depth`: one mixer in the early layers of a model, another in the late ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from .base import AttentionShape, Mixer, MixerBase

if TYPE_CHECKING:
    from . import MixerConfig


class ByDepthConfig(MixerBase):
    """Mixers for equal parts of the stack, the first for the layers nearest to the input. It makes no module of its
    own: every layer has the mixer of its part."""

    kind: Literal["by_depth"] = "by_depth"
    mixers: Annotated[list[MixerConfig], Field(min_length=2)]

    @model_validator(mode="after")
    def _one_direction(self) -> ByDepthConfig:
        if len({mixer.causal for mixer in self.mixers}) > 1:
            raise ValueError("mixers of one stack are all causal or all bidirectional: take the odd ones out")
        return self

    @property
    def causal(self) -> bool:
        return self.mixers[0].causal

    @property
    def has_weights(self) -> bool:
        return all(mixer.has_weights for mixer in self.mixers)

    @property
    def kinds(self) -> int:
        return len(self.mixers)

    def build(self, shape: AttentionShape) -> Mixer:
        return self.mixers[shape.layer * len(self.mixers) // shape.layers].build(shape)
