"""Denoisers of diffusers: the self-attention of UNets and of DiT-type transformers. Cross-attention is left alone."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ..errors import SurgeryError, UnsupportedModelError
from ..mixers.base import AttentionShape
from .families import Family
from .interface import Call, Site, Surgical, surgery_attention

SUPPORTED = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "ControlNetModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
)
PLAIN = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
"""Processors that compute nothing but attention: what `Denoising.forward` does around a mixer is what they do."""
JOINT = "text and image tokens attend to each other in one softmax (joint attention), which no recipe converts"
PARTS = ("unet", "transformer")
"""Where pipelines keep their denoiser."""
PREFIX = "Surgical"
"""Of the names that classes have while they are converted."""
FAMILY = Family("Attention", q="to_q", k="to_k", v="to_v", o="to_out.0")


class Denoising(Surgical):
    """Mixin put before diffusers' `Attention`; see `Surgical`. Its processor goes on serving the teacher."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, T, C] or [B, C, height, width] to the same.

        Raises:
            SurgeryError: there is a mask, or something else to attend to, or a processor that does more than attention.
        """
        if self.surgery_switch.mode == "teacher":
            return super(Surgical, self).forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if encoder_hidden_states is not None or attention_mask is not None:
            problem = "a mask" if encoder_hidden_states is None else "other tokens"
            raise SurgeryError(
                f"{self.surgery_path} was given {problem}, and tokens of a converted denoiser see all of an image: "
                "leave it out, or leave the layer unconverted (layers=...)"
            )
        if type(self.processor).__name__ not in PLAIN:
            raise SurgeryError(
                f"{self.surgery_path} was given a {type(self.processor).__name__}, which a mixer does not run: call "
                "set_attn_processor(AttnProcessor2_0()), or leave the layer unconverted (layers=...)"
            )
        self._surgery_hook()
        residual, tokens = hidden_states, hidden_states
        if self.spatial_norm is not None:
            tokens = self.spatial_norm(tokens, kwargs.get("temb"))
        image = tokens.shape[2:] if tokens.dim() == 4 else None
        if image is not None:
            tokens = tokens.flatten(2).transpose(1, 2)
        if self.group_norm is not None:
            tokens = self.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        q = q if self.norm_q is None else self.norm_q(q)
        k = k if self.norm_k is None else self.norm_k(k)
        call = Call(cache=None, hidden_states=tokens, position_ids=None, cu_seqlens=None)
        y, _ = surgery_attention(self, q, k, v, None, scaling=self.scale, surgery=call)
        y = y.flatten(2)
        for layer in self.to_out:
            y = layer(y)
        if image is not None:
            y = y.transpose(1, 2).unflatten(2, image)
        if self.residual_connection:
            y = y + residual
        return y / self.rescale_output_factor


def is_denoiser(module: Any) -> bool:
    """Whether it is a denoiser of diffusers, convertible or not."""
    library = sys.modules.get("diffusers.models.modeling_utils")  # else nobody can have made one
    kinds = ("UNet", "ControlNet", "Transformer")
    return library is not None and isinstance(module, library.ModelMixin) and any(k in _name(module) for k in kinds)


def denoiser_of(pipeline: Any) -> Any:
    """The denoiser of a pipeline of diffusers; whatever else is given, itself.

    Raises:
        UnsupportedModelError: the pipeline has none.
    """
    library = sys.modules.get("diffusers.pipelines.pipeline_utils")
    if library is None or not isinstance(pipeline, library.DiffusionPipeline):
        return pipeline
    found = [part for part in (getattr(pipeline, name, None) for name in PARTS) if is_denoiser(part)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(pipeline).__name__} has no one denoiser called {' or '.join(PARTS)}: pass the model itself"
        )
    return found[0]


def find_sites(model: nn.Module) -> list[Site]:
    """Every self-attention of a denoiser, in the order of its modules. Touches nothing.

    Raises:
        UnsupportedModelError: there is none, or one cannot be converted.
    """
    joint = any(getattr(module, "added_kv_proj_dim", None) for module in model.modules())
    if _name(model) not in SUPPORTED:
        reason = JOINT if joint else f"of diffusers, {', '.join(SUPPORTED)} are supported"
        raise UnsupportedModelError(f"{_name(model)} cannot be converted: {reason}")
    library = sys.modules["diffusers.models.attention_processor"]
    modules = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, library.Attention) and not module.is_cross_attention and not module.added_kv_proj_dim
    ]
    if not modules:
        reason = JOINT if joint else "it has no self-attention"
        raise UnsupportedModelError(f"{_name(model)} cannot be converted: {reason}")
    return [_site(path, module, index, len(modules)) for index, (path, module) in enumerate(modules)]


def _site(path: str, module: Any, layer: int, layers: int) -> Site:
    processor = type(module.processor).__name__
    if processor.startswith("Fused"):
        raise UnsupportedModelError(
            f"{path} has fused projections, and mixers are put between separate ones: call "
            "unfuse_qkv_projections() first"
        )
    if processor not in PLAIN:
        raise UnsupportedModelError(
            f"{path} has the processor {processor}, which does more than attention: if it may go, call "
            "set_attn_processor(AttnProcessor2_0()) first"
        )
    if module.is_causal:
        raise UnsupportedModelError(f"{path} is causal, and the tokens of an image see each other on both sides")
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        raise UnsupportedModelError(
            f"the forward of {path} was replaced on the instance (by another library?): apply surgery before that patch"
        )
    heads = module.heads
    shape = AttentionShape(heads, heads, module.inner_dim // heads, module.query_dim, layer, layers, causal=False)
    return Site(path, module, FAMILY, shape, Denoising)


def projections(model: nn.Module, roles: list[str]) -> list[str]:
    """Paths of the projections that play `roles` in self-attention."""
    library = sys.modules["diffusers.models.attention_processor"]
    names = [getattr(FAMILY, role) for role in roles]
    own = [p for p, m in model.named_modules() if isinstance(m, library.Attention) and not m.is_cross_attention]
    return [f"{path}.{name}" for path in own for name in names]


def _name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix(PREFIX)
