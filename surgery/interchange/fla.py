"""Models of flash-linear-attention in its Hugging Face layout: those of `fla_layers.KINDS`.

model.embeddings, model.layers.N.{attn_norm, mlp_norm, mlp.…}, model.norm, lm_head: a Llama's, without rotation
model.layers.N.attn.{q,k,v,o}_proj.weight, and what the kind of layer has of its own
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveFloat
from torch import nn
from transformers import AutoModelForCausalLM

from .. import hub
from ..errors import SurgeryError
from ..mixers.base import Config
from ..patchers.interface import converted_layers
from ..patchers.sites import find_sites
from ..recipe import load_recipe
from .contents import Exported, Imported
from .fla_layers import BY_MIXER, KINDS, NORMALIZER, Layers, refuse
from .tensors import Keys, bare, take_base

NAMES = {"embed_tokens": "embeddings", "self_attn": "attn", "input_layernorm": "attn_norm"}
NAMES["post_attention_layernorm"] = "mlp_norm"
FOREIGN = {"conv1d": "short convolutions", "g_proj": "an output gate"}
CLOSED = {
    "hgrn2": "its norm is one over all heads together",
    "gsa": "its slots' outputs pass through silu, and its norm is one over all heads together",
    "kda": "its heads are gated by the layer's input after their norm",
}
"""Kinds whose maths is not ours, and why."""


class Options(Config):
    """As in its config.json, which is read where it lies beside the tensors. gate_logit_normalizer: of its layers."""

    feature_map: str | None = None
    norm_eps: PositiveFloat = 1e-6
    gate_logit_normalizer: PositiveFloat = NORMALIZER
    allow_neg_eigval: bool = False


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The options that a config.json tells.

    Raises:
        SurgeryError: it tells of what our mixers do not compute.
    """
    if not config:
        return {}
    kind = config.get("model_type")
    if kind not in KINDS:
        why = f": {CLOSED[kind]}" if kind in CLOSED else ""
        raise SurgeryError(f"models of type {kind!r} are not imported from fla{why}; {', '.join(KINDS)} ones are")
    foreign = {
        "softmax layers (attn)": config.get("attn"),
        "an MLP without swish (hidden_act)": config.get("hidden_act", "swish") not in ("swish", "silu"),
        **KINDS[kind].foreign(config),
    }
    refuse([what for what, there in foreign.items() if there], KINDS[kind])
    return {name: config[name] for name in ("feature_map", "norm_eps", "allow_neg_eigval") if name in config}


def read(keys: Keys, model: nn.Module, options: Options) -> Imported:
    """See `import_checkpoint`. `model` is a Llama of the same sizes; all its weights are replaced."""
    layers = next((one for one in KINDS.values() if f"layers.0.attn.{one.mark}" in keys), KINDS["gla"])
    for key in sorted(keys.tensors):
        for part, what in FOREIGN.items():
            if ".attn." in key and part in key:
                raise SurgeryError(f"{key} tells of {what}, which our {layers.mixer} mixer does not compute")
    _check_llama(model)
    own: Any = model.config
    if own.rms_norm_eps != options.norm_eps:
        raise SurgeryError(
            f"the checkpoint has norm_eps {options.norm_eps:g} and this model rms_norm_eps {own.rms_norm_eps:g}: load "
            "it with that of the checkpoint"
        )
    base = take_base(keys, model, _theirs)
    sites, mixers = find_sites(model), {}
    if not base:
        raise SurgeryError("the checkpoint has no weights of an fla model (model.layers.N.attn.q_proj.weight)")
    for site in sites:
        shape, prefix = site.shape, f"layers.{site.shape.layer}.attn"
        mixers[shape.layer] = {**layers.take(keys, prefix, shape), "norm.gain": torch.ones(shape.heads)}
        gain, output = keys.take(f"{prefix}.{layers.norm}.weight", (shape.head_dim,)), f"{site.path}.o_proj.weight"
        if not torch.all(gain == 1):
            base[output] = base[output].float() * gain.float().repeat(shape.heads)
    # their queries are divided by √D, which the norm undoes but for its eps: our outputs are √D times theirs
    alike = {"normalize": "rms", "eps": options.norm_eps * sites[0].shape.head_dim, "rope": "raw"}
    mixer = {"kind": layers.mixer, **alike, "window": None, "mix": None, **layers.entry(options, mixers[0])}
    about = f"{layers.name}, as flash-linear-attention has it"
    recipe = load_recipe({"description": about, "mixer": mixer})
    return Imported(recipe, tuple(range(len(sites))), mixers, base)


@torch.no_grad()
def write(model: Any) -> Exported:
    """config.json and model.safetensors of the model that computes what a converted Llama does.

    Raises:
        SurgeryError: there is none.
    """
    _check_llama(model)
    layers, own, kind = converted_layers(model), model.config, model.surgery.recipe.mixer.kind
    if kind not in BY_MIXER:
        raise SurgeryError(
            f"fla has no layer that computes a {kind} mixer as ours does: only {', '.join(BY_MIXER)} are exported"
        )
    found = BY_MIXER[kind]
    found.check(model, len(layers) < own.num_hidden_layers)
    values = {bare(name): value for name, value in model.state_dict().items() if ".mixer." not in name}
    for module in layers.values():
        prefix = f"layers.{module.surgery_shape.layer}.self_attn"
        attention = {name: values[f"{prefix}.{name}_proj.weight"] for name in "qkvo"}
        for name, value in found.give(module, attention, own.rms_norm_eps).items():
            values[f"{prefix}.{name}"] = value
    tensors = {
        _theirs(name) if name.startswith("lm_head") else f"model.{_theirs(name)}": values[name] for name in values
    }
    if own.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return Exported(tensors, config=_config(model, found), twin=_twin if found.multi_head else hub.softmax_twin)


def _theirs(name: str) -> str:
    return ".".join(NAMES.get(part, part) for part in name.split("."))


def _check_llama(model: nn.Module) -> None:
    config: Any = model.config
    if (
        not config.model_type.endswith("llama")
        or config.attention_bias
        or config.mlp_bias
        or config.hidden_act != "silu"
    ):
        raise SurgeryError(
            f"fla's models have the shape of a Llama without biases and with silu, and this is a {config.model_type} "
            "model"
        )


def _twin(model: Any) -> Any:
    """A Llama of the same sizes whose query heads have keys and values of their own."""
    config = hub.softmax_config(model)
    config.num_key_value_heads = config.num_attention_heads
    return AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device)


def _config(model: Any, layers: Layers) -> dict[str, Any]:
    own = model.config
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "initializer_range")
    return {name: getattr(own, name) for name in (*same, *tokens)} | {
        "num_heads": own.num_attention_heads,
        "use_short_conv": False,
        "hidden_act": "swish",
        "norm_eps": own.rms_norm_eps,
        "dtype": str(model.dtype).removeprefix("torch."),
        **layers.config(model),
    }
