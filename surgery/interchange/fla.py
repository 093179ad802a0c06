"""GLA models of flash-linear-attention (arXiv 2312.06635), in its Hugging Face layout.

    model.embeddings, model.layers.N.{attn_norm, mlp_norm, mlp.…}, model.norm, lm_head: a Llama's, without rotation
    model.layers.N.attn.{q,k,v,o}_proj.weight
    model.layers.N.attn.gk_proj.0.weight [rank, C], gk_proj.1.weight [H_kv·D, rank], gk_proj.1.bias [H_kv·D]
    model.layers.N.attn.g_norm.weight    [D], shared by heads: it goes into the columns of o_proj

Its queries are divided by √D, which the norm of the outputs undoes but for its eps: ours is D times theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveFloat
from torch import nn

from ..errors import SurgeryError
from ..mixers.base import Config
from ..patchers.interface import converted_layers
from ..patchers.sites import find_sites
from ..recipe import load_recipe
from .contents import Exported, Imported
from .tensors import Keys, bare, take_base

NAMES = {"embed_tokens": "embeddings", "self_attn": "attn", "input_layernorm": "attn_norm"}
NAMES["post_attention_layernorm"] = "mlp_norm"
MAPS = {None: "identity", "swish": "silu", "silu": "silu"}
RANK, NORMALIZER = 16, 16.0
"""What the models of its library have, whatever their config says."""
FOREIGN = {
    "q_conv1d": "short convolutions of queries, keys and values",
    "g_proj": "an output gate",
    "b_proj": "a delta rule whose values pass through silu",
    "A_log": "a delta rule whose values pass through silu",
}


class Options(Config):
    """As in its config.json, which is read where it lies beside the tensors. gate_logit_normalizer: of its layers."""

    feature_map: str | None = None
    norm_eps: PositiveFloat = 1e-6
    gate_logit_normalizer: PositiveFloat = NORMALIZER


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The options that a config.json tells.

    Raises:
        SurgeryError: it tells of what our mixers do not compute.
    """
    if not config:
        return {}
    kind = config.get("model_type")
    if kind != "gla":
        why = ": its values pass through silu before they enter the state" if "delta" in str(kind) else ""
        raise SurgeryError(f"models of type {kind!r} are not imported from fla{why}; gla ones are")
    foreign = {
        "an output gate (use_output_gate)": config.get("use_output_gate", True),
        "short convolutions (use_short_conv)": config.get("use_short_conv", False),
        "softmax layers (attn)": config.get("attn"),
        "clamped gates (clamp_min)": config.get("clamp_min") is not None,
        "a norm without weights (elementwise_affine)": not config.get("elementwise_affine", True),
        "an MLP without swish (hidden_act)": config.get("hidden_act", "swish") not in ("swish", "silu"),
    }
    if found := [what for what, there in foreign.items() if there]:
        raise SurgeryError(f"this fla model has {' and '.join(found)}, which our gla mixer does not compute")
    return {name: config[name] for name in ("feature_map", "norm_eps") if name in config}


def read(keys: Keys, model: nn.Module, options: Options) -> Imported:
    """See `import_checkpoint`. `model` is a Llama of the same sizes; all its weights are replaced."""
    for key in sorted(keys.tensors):
        for part, what in FOREIGN.items():
            if f".attn.{part}" in key:
                raise SurgeryError(f"{key} tells of {what}, which our gla mixer does not compute")
    _check_llama(model)
    if options.feature_map not in MAPS:
        raise SurgeryError(f"feature map {options.feature_map!r} is not imported from fla: swish and none are")
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
    rank = None
    for site in sites:
        shape, prefix = site.shape, f"layers.{site.shape.layer}.attn"
        width = shape.kv_heads * shape.head_dim
        down = keys.take(f"{prefix}.gk_proj.0.weight", (rank, shape.hidden_size))
        rank = len(down)
        mixers[shape.layer] = {
            "gate.down": down.T,
            "gate.up": keys.take(f"{prefix}.gk_proj.1.weight", (width, rank)).T,
            "gate.bias": keys.take(f"{prefix}.gk_proj.1.bias", (width,)),
            "norm.gain": torch.ones(shape.heads),
        }
        gain, output = keys.take(f"{prefix}.g_norm.weight", (shape.head_dim,)), f"{site.path}.o_proj.weight"
        if not torch.all(gain == 1):
            base[output] = base[output].float() * gain.float().repeat(shape.heads)
    gate = {"kind": "low_rank", "source": "hidden", "rank": rank, "normalizer": options.gate_logit_normalizer}
    mixer = {
        "kind": "gla",
        "feature_map": {"kind": MAPS[options.feature_map]},
        "gate": gate,
        "normalize": "rms",
        "eps": options.norm_eps * sites[0].shape.head_dim,
        "rope": "raw",
        "window": None,
        "mix": None,
    }
    recipe = load_recipe({"description": "GLA, as flash-linear-attention has it", "mixer": mixer})
    return Imported(recipe, tuple(range(len(sites))), mixers, base)


@torch.no_grad()
def write(model: Any) -> Exported:
    """config.json and model.safetensors of the GLA model that computes what a converted Llama does.

    A gain per head goes into o_proj, what their eps is off into v_proj, and a gate of the keys becomes one of the
    layer's input through k_proj.

    Raises:
        SurgeryError: there is none.
    """
    _check_llama(model)
    layers, own = converted_layers(model), model.config
    _check_recipe(model, len(layers))
    values = {bare(name): value for name, value in model.state_dict().items() if ".mixer." not in name}
    for module in layers.values():
        mixer, prefix = module.mixer, f"layers.{module.surgery_shape.layer}.self_attn"
        gate, shape = mixer.gate, mixer.shape
        down, pad = gate.down.float(), RANK - gate.down.shape[1]
        if gate.config.source == "key":
            down = values[f"{prefix}.k_proj.weight"].float().T @ down
        values[f"{prefix}.gk_proj.0.weight"] = nn.functional.pad(down, (0, pad)).T
        values[f"{prefix}.gk_proj.1.weight"] = nn.functional.pad(gate.up, (0, 0, 0, pad)).T
        values[f"{prefix}.gk_proj.1.bias"] = gate.bias
        values[f"{prefix}.g_norm.weight"] = torch.ones(shape.head_dim)
        larger = (own.rms_norm_eps * shape.head_dim / mixer.norm.eps) ** 0.5
        for name, factor in {
            "v_proj": torch.tensor(larger),
            "o_proj": mixer.norm.gain.repeat_interleave(shape.head_dim),
        }.items():
            weight = values[f"{prefix}.{name}.weight"]
            if not torch.all(factor == 1):
                values[f"{prefix}.{name}.weight"] = (weight.float() * factor).to(weight.dtype)
    tensors = {
        _theirs(name) if name.startswith("lm_head") else f"model.{_theirs(name)}": values[name] for name in values
    }
    if own.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return Exported(tensors, config=_config(model))


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
            f"fla's GLA has the shape of a Llama without biases and with silu, and this is a {config.model_type} model"
        )


def _check_recipe(model: Any, converted: int) -> None:
    """Raises: SurgeryError: fla's GLA does not compute this mixer."""
    mixer = model.surgery.recipe.mixer
    if mixer.kind != "gla":
        raise SurgeryError(f"fla has no layer that computes a {mixer.kind} mixer as ours does: only gla is exported")
    gate, feature_map = mixer.gate, mixer.feature_map
    differences = {
        "softmax layers": converted < model.config.num_hidden_layers,
        "softmax window": mixer.window is not None,
        "rotated queries and keys": mixer.rope != "raw",
        f"outputs with normalize: {mixer.normalize}": mixer.normalize != "rms",
        f"feature map {feature_map.kind}": feature_map.kind not in ("identity", "silu"),
        "temperature": feature_map.temperature != 1,
        f"gate {gate.kind}": gate.kind != "low_rank",
        f"gate of rank over {RANK}": getattr(gate, "rank", 0) > RANK,
        f"gate normalizer but {NORMALIZER:g}": getattr(gate, "normalizer", NORMALIZER) != NORMALIZER,
    }
    if found := [what for what, there in differences.items() if there]:
        raise SurgeryError(f"this recipe cannot be exported to fla, whose GLA has no {', no '.join(found)}")


def _config(model: Any) -> dict[str, Any]:
    own, feature_map = model.config, model.surgery.recipe.mixer.feature_map.kind
    width = own.num_attention_heads * own.head_dim
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "initializer_range")
    return {name: getattr(own, name) for name in (*same, *tokens)} | {
        "model_type": "gla",
        "architectures": ["GLAForCausalLM"],
        "num_heads": own.num_attention_heads,
        "num_kv_heads": own.num_key_value_heads,
        "expand_k": width / own.hidden_size,
        "expand_v": width / own.hidden_size,
        "feature_map": None if feature_map == "identity" else "swish",
        "use_output_gate": False,
        "use_short_conv": False,
        "hidden_act": "swish",
        "norm_eps": own.rms_norm_eps,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
