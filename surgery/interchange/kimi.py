"""Kimi Linear (arXiv 2510.26692) as transformers and servers run it: its delta layers compute what our delta mixers do.

    all but self_attn: a Llama's
    model.layers.N.self_attn.{q,k,v,o,b}_proj.weight, o_norm.weight [D]
    …conv1d.weight [3·H·D, 1, 4]: the last tap is one, the others are zero
    …forget_gate.{f_a_proj.weight [D, C], f_b_proj.weight [H·D, D], dt_bias [H·D], A_log [1, 1, H, 1]}
    …g_a_proj.weight [D, C], g_b_proj.weight [H·D, D]: zero, so that the output gate is one half; o_proj is doubled

transformers runs it without its cache, which counts tokens in layers of softmax.
Decays are log α = -exp(A_log) softplus(f_b f_a x + dt_bias) per channel; channels repeat those of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import SurgeryError
from ..mixers.decays import NoDecay
from ..mixers.gates import ConstantGate, LowRankGate
from ..patchers.interface import converted_layers
from . import delta
from .contents import Exported
from .tensors import bare

KINDS, TAPS, CLOSED = ("delta", "gated_delta", "kda"), 4, -100.0


@torch.no_grad()
def write(model: Any) -> Exported:
    """config.json and model.safetensors of the Kimi Linear that computes what a converted Llama does.

    Raises:
        SurgeryError: there is none.
    """
    own, layers = model.config, converted_layers(model)
    if not own.model_type.endswith("llama") or own.attention_bias or own.mlp_bias or own.hidden_act != "silu":
        raise SurgeryError(
            f"Kimi Linear has the shape of a Llama without biases and with silu, and this is a {own.model_type} model"
        )
    mixer = model.surgery.recipe.mixer
    if mixer.kind not in KINDS:
        raise SurgeryError(
            f"Kimi Linear has no layer that computes a {mixer.kind} mixer: only {', '.join(KINDS)} are exported to it"
        )
    gate, rank = mixer.gate.kind, getattr(mixer.gate, "rank", 0)
    heads = own.num_attention_heads if mixer.kind == "gated_delta" else 0
    more = {
        "β up to 2": mixer.beta.maximum == 2,
        f"gate {gate}": gate == "key",
        f"gate of rank over {own.head_dim}": max(rank, heads) > own.head_dim,
    }
    delta.check_exported(model, len(layers) < own.num_hidden_layers, "Kimi Linear", more)
    values = {bare(name): value for name, value in model.state_dict().items() if ".mixer." not in name}
    for module in layers.values():
        prefix = f"layers.{module.surgery_shape.layer}.self_attn"
        attention = {name: values[f"{prefix}.{name}_proj.weight"] for name in "qkvo"}
        for name, value in _layer(module, attention, own.rms_norm_eps).items():
            values[f"{prefix}.{name}"] = value
    tensors = {name if name.startswith("lm_head") else f"model.{name}": value for name, value in values.items()}
    if own.tie_word_embeddings:
        tensors["lm_head.weight"] = values["embed_tokens.weight"].clone()
    return Exported(tensors, config=_config(model))


def _layer(module: Any, attention: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
    shape, weight = module.surgery_shape, attention["k"]
    width = shape.heads * shape.head_dim
    found = delta.projections(module, attention, eps)
    found["o_proj.weight"] = 2 * found["o_proj.weight"]
    found["conv1d.weight"] = functional.pad(weight.new_ones(3 * width, 1, 1), (TAPS - 1, 0))
    found["g_a_proj.weight"] = weight.new_zeros(shape.head_dim, shape.hidden_size)
    found["g_b_proj.weight"] = weight.new_zeros(width, shape.head_dim)
    a, b, bias, power = _decay(module, weight)
    found["forget_gate.f_a_proj.weight"] = functional.pad(a, (0, 0, 0, shape.head_dim - len(a))).to(weight.dtype)
    found["forget_gate.f_b_proj.weight"] = functional.pad(b, (0, shape.head_dim - b.shape[1])).to(weight.dtype)
    return found | {"forget_gate.dt_bias": bias, "forget_gate.A_log": power.view(1, 1, -1, 1)}


def _decay(module: Any, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f_a [r, C], f_b [H·D, r], dt_bias [H·D], A_log [H]. key: the weight of k_proj."""
    shape, gate = module.surgery_shape, module.mixer.gate
    zero = key.new_zeros(shape.heads, dtype=torch.float32)
    none = key.new_zeros(0, shape.hidden_size), key.new_zeros(shape.heads * shape.head_dim, 0)
    if isinstance(gate, NoDecay):
        return *none, zero.repeat_interleave(shape.head_dim) + CLOSED, zero
    if isinstance(gate, ConstantGate):
        bias = gate.rate.exp().expm1().log().flatten()
        return *none, delta.spread(bias, shape.kv_heads, shape.heads), zero
    if isinstance(gate, LowRankGate):
        down, up = gate.down.float(), delta.spread(gate.up.T, shape.kv_heads, shape.heads)
        a = (key.float().T @ down if gate.config.source == "key" else down).T
        bias = delta.spread(gate.bias, shape.kv_heads, shape.heads)
        return a, -up, -bias, zero - torch.tensor(gate.config.normalizer).log()
    a, power, bias = delta.head_decay(module, key)
    b = torch.eye(shape.heads, device=key.device).repeat_interleave(shape.head_dim, 0)
    return a, b, bias.repeat_interleave(shape.head_dim), power


def _config(model: Any) -> dict[str, Any]:
    own, count = model.config, model.config.num_hidden_layers
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")
    return {name: getattr(own, name) for name in (*same, *tokens, "num_attention_heads", "rms_norm_eps")} | {
        "model_type": "kimi_linear",
        "architectures": ["KimiLinearForCausalLM"],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_cache": False,
        "linear_head_dim": own.head_dim,
        "linear_num_heads": own.num_attention_heads,
        "linear_conv_kernel_dim": TAPS,
        "layer_types": ["linear_attention"] * count,
        "mlp_layer_types": ["dense"] * count,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
