"""Finding what can be converted: the Hugging Face model inside whatever the user holds, and its attention modules."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import unwrap
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..mixers.base import AttentionShape
from . import diffusion, plain
from .families import ALIBI, FAMILIES, REFUSED, WRAPPERS, Family, size
from .interface import IMPLEMENTATION, Site, Surgical, converted_layers, original_class
from .registry import how_to_register

MODEL_TYPE_PREFIX = "surgery_"
SEE = "docs/models.md lists the models that are supported"
BY_ITSELF = "computes attention by itself instead of through transformers' AttentionInterface"
NO_DECODER = (
    "has no causal self-attention, and this mixer lets tokens see those before them alone: encoders take the mixer "
    "bidirectional, as in the recipe bert/hedgehog, and denoisers as in diffusion/linfusion"
)
NO_ENCODER = (
    "has causal self-attention alone, and the mixer bidirectional would let its tokens see those that follow: take a "
    "causal mixer, such as linear"
)
PARALLEL = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine", "DataParallel")


def base_model_type(config: object) -> str:
    """`llama` for both a Llama and a converted Llama."""
    return getattr(config, "model_type", "").removeprefix(MODEL_TYPE_PREFIX)


def find_family(config: Any) -> Family | None:
    """That of the model, or of the text model in a multimodal one; None: not supported."""
    model_type = base_model_type(config)
    return FAMILIES.get(text_model_type(config) if model_type in WRAPPERS else model_type)


def text_model_type(config: Any) -> str:
    """`llama` for a Llava around a Llama, and for a Llama."""
    return base_model_type(config.get_text_config(decoder=True))


def find_model(model: nn.Module) -> Any:
    """The one Hugging Face model in `model`: itself, or inside a PeftModel, a compiled module, a LightningModule, a
    pipeline of diffusers; where there is none, the module that holds registered attention.

    Raises:
        UnsupportedModelError: there is none, there are several, or `model` was wrapped for distribution unconverted.
    """
    model = diffusion.denoiser_of(model)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"surgery operates on torch modules, not on {type(model).__name__}: pass a loaded model, or use "
            "surgery.from_pretrained(name, recipe=...)"
        )
    converted = any(isinstance(module, Surgical) for module in model.modules())
    for path, module in [] if converted else model.named_modules():
        if type(module).__name__ in PARALLEL or type(module).__name__.startswith("FSDP"):
            raise UnsupportedModelError(
                f"{path or 'the model'} is already wrapped by {type(module).__name__}: apply surgery before wrapping, "
                "so that new parameters are wrapped too"
            )
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}." if outer else "") for outer in found)
        if (isinstance(module, PreTrainedModel) or diffusion.is_denoiser(module)) and not nested:
            found[path] = module
    if not found and (holder := plain.find_model(model)) is not None:
        return holder
    if not found and (advice := how_to_register(model)) is not None:
        raise UnsupportedModelError(advice)
    if not found:
        raise UnsupportedModelError(
            f"no Hugging Face model found in {type(model).__name__}: surgery converts PreTrainedModel instances, alone "
            "or inside another module"
        )
    if len(found) > 1:
        listing = ", ".join(f"{path} ({type(module).__name__})" for path, module in found.items())
        raise UnsupportedModelError(
            f"{type(model).__name__} holds several models: {listing}; say which by passing it itself, e.g. "
            f"surgery.apply(module.{next(iter(found))}, recipe)"
        )
    return next(iter(found.values()))


def find_sites(model: nn.Module, causal: bool = True) -> list[Site]:
    """Every attention module of `model` that can be converted, in layer order. Touches nothing.

    causal: those of decoders, else those of encoders; attention from one to the other is neither.

    Raises:
        UnsupportedModelError: unknown architecture, no attention of that kind, already converted or a patched forward.
    """
    name = type(model).__name__
    converted = next(iter(converted_layers(model).values()), None)
    if converted is not None:
        raise UnsupportedModelError(
            f"this {name} is already converted (to {converted.mixer.describe()}): call surgery.revert(model) first, or "
            "load the original again"
        )
    refuse_shares(model)
    if diffusion.is_denoiser(model):
        if causal:
            raise UnsupportedModelError(f"{name} {NO_DECODER}")
        return diffusion.find_sites(model)
    if not isinstance(model, PreTrainedModel):
        if not causal:
            raise UnsupportedModelError(f"{name} is no Hugging Face model, and recipes for encoders convert no others")
        return plain.find_sites(model)
    family = _family(model)
    modules = [(path, module) for path, module in model.named_modules() if type(module).__name__ == family.attention]
    if not modules:
        raise UnsupportedModelError(
            f"{name} has no {family.attention} modules, so there is no softmax attention to convert: pass the model "
            "that holds the decoder layers"
        )
    chosen = [(path, module) for path, module in modules if _is_causal(module, family) is causal]
    if not chosen:
        raise UnsupportedModelError(f"{name} {NO_DECODER if causal else NO_ENCODER}")
    text = model.config.get_text_config(decoder=True) if causal and family.causal is None else None
    sites: list[Site] = []
    for path, module in chosen:
        shape = _shape(path, module, family, text or module.config, causal, len(sites), len(chosen))
        sites.append(Site(path, module, family, shape))
    return sites


def refuse_shares(model: nn.Module) -> None:
    """
    Raises:
        UnsupportedModelError: this process has only a part of the weights that mixers are made to go with, by
            transformers' tp_plan or by DeepSpeed.
    """
    devices = getattr(model, "_tp_size", None) or 1
    if devices > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} is under a tensor-parallel plan, by which {devices} devices have some heads each, "
            "and mixers are made for all: load it without tp_plan, and use DDP or FSDP2"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"DeepSpeed's ZeRO-3 has shared out the weights of {type(model).__name__} already: load and convert it "
            "before TrainingArguments(deepspeed=...) are made, or outside of deepspeed.zero.Init"
        )


def has_softmax(model: PreTrainedModel) -> bool:
    """Whether any attention of the family is left unconverted, be it to an encoder."""
    attention = _family(model).attention
    return any(type(module).__name__ == attention for module in model.modules())


def projections(model: nn.Module, roles: Iterable[str]) -> list[str]:
    """Paths of the attention projections that play `roles` (q, k, v, o), of converted and softmax layers alike.

    A fused projection plays several roles and is listed once.
    """
    if diffusion.is_denoiser(model):
        return diffusion.projections(model, list(roles))
    if not isinstance(model, PreTrainedModel):
        return plain.projections(model, roles)
    family = _family(model)
    found = []
    for path, module in model.named_modules():
        cls = original_class(type(module)) if isinstance(module, Surgical) else type(module)
        if cls.__name__ == family.attention:
            names = [getattr(family, role) for role in roles]
            found += [f"{path}.{name}" for name in names if name is not None]
    return list(dict.fromkeys(found))


def _family(model: PreTrainedModel) -> Family:
    model_type = base_model_type(model.config)
    family = find_family(model.config)
    if family is not None and not getattr(model.config, "alibi", False):
        return family
    raise UnsupportedModelError(f"{type(model).__name__} ({model_type}) cannot be converted: {_reason(model)}; {SEE}")


def _reason(model: PreTrainedModel) -> str:
    for model_type in (base_model_type(model.config), text_model_type(model.config)):
        if model_type in REFUSED:
            return REFUSED[model_type]
    if getattr(model.config, "alibi", False):
        return ALIBI
    if not any("attention" in type(module).__name__.lower() for module in model.modules()):
        return "it has no attention"
    if not getattr(model, "_supports_attention_backend", False):
        return f"it {BY_ITSELF}"
    return "its family is not known yet"


def _is_causal(module: Any, family: Family) -> bool | None:
    """Whether tokens see those before them alone (decoders) or all (encoders); None: they see an encoder's."""
    if getattr(module, "is_cross_attention", False):
        return None
    if family.causal is not None:
        return family.causal(module)
    if getattr(module, "is_causal", True):
        return True
    return None if getattr(module, "is_decoder", False) else False


def _shape(
    path: str, module: Any, family: Family, config: Any, causal: bool, index: int, layers: int
) -> AttentionShape:
    layer = getattr(module, "layer_idx", None) if causal else index
    if layer is None and family.causal is not None:
        layer = index
    if layer is None:
        raise UnsupportedModelError(
            f"{path} has no layer_idx, which caches need: build the model from its config class"
        )
    # older versions of transformers may not have moved a family to the interface yet
    if family.forward is None and "ALL_ATTENTION_FUNCTIONS" not in unwrap(type(module).forward).__code__.co_names:
        raise UnsupportedModelError(f"{path} {BY_ITSELF}: upgrade transformers")
    if getattr(module, "is_kv_shared_layer", False):
        raise UnsupportedModelError(f"{path} attends to keys and values of an earlier layer, which needs them all")
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        raise UnsupportedModelError(
            f"the forward of {path} was replaced on the instance (by another library?): apply surgery before that patch"
        )
    heads, kv_heads, head_dim = size(module, config)
    return AttentionShape(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        layer=layer,
        layers=layers,
        sliding_window=getattr(module, "sliding_window", getattr(config, "sliding_window", None)) or None,
        softcap=getattr(module, "attn_logit_softcapping", None),
        causal=causal,
    )


__all__ = ["IMPLEMENTATION", "MODEL_TYPE_PREFIX", "base_model_type", "find_model", "find_sites", "projections"]
