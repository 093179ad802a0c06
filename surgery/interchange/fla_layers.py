"""The layers of flash-linear-attention that compute what our mixers do: a class a kind, and a line in `KINDS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import SurgeryError
from ..mixers.base import AttentionShape
from . import delta
from .tensors import Keys

MAPS = {None: "identity", "swish": "silu", "silu": "silu"}
RANK, NORMALIZER = 16, 16.0
"""What the GLA models of its library have, whatever their config says."""


class Layers(ABC):
    """name, architecture: theirs. mixer: ours. mark: a tensor that no other kind has. norm: of the outputs, [D], shared
    by heads, which goes into the columns of o_proj. multi_head: whether every query head has its own keys and values.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    mixer: ClassVar[str]
    mark: ClassVar[str]
    norm: ClassVar[str] = "o_norm"
    multi_head: ClassVar[bool] = True

    @abstractmethod
    def foreign(self, config: dict[str, Any]) -> dict[str, Any]:
        """What our mixer does not compute -> whether a config has it."""

    @abstractmethod
    def take(self, keys: Keys, prefix: str, shape: AttentionShape) -> dict[str, Tensor]:
        """The values of a layer's mixer by name, without the norm's."""

    @abstractmethod
    def entry(self, options: Any, values: dict[str, Tensor]) -> dict[str, Any]:
        """What the recipe says of the mixer beside what all kinds share. values: those of a layer."""

    @abstractmethod
    def check(self, model: Any, softmax: bool) -> None:
        """Raises: SurgeryError: they do not compute this converted model. softmax: it has softmax layers."""

    @abstractmethod
    def give(self, module: Any, attention: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
        """Tensors of a converted layer by their names in theirs. attention: its projections. eps: of the norm."""

    @abstractmethod
    def config(self, model: Any) -> dict[str, Any]:
        """What config.json says of the layers of a converted model."""


class GLA(Layers):
    """arXiv 2312.06635.

    gk_proj.0.weight [rank, C], gk_proj.1.weight [H_kv·D, rank], gk_proj.1.bias [H_kv·D], g_norm.weight [D]
    """

    name, architecture, mixer, mark = "GLA", "GLAForCausalLM", "gla", "gk_proj.0.weight"
    norm, multi_head = "g_norm", False

    def foreign(self, config: dict[str, Any]) -> dict[str, Any]:
        return {
            "an output gate (use_output_gate)": config.get("use_output_gate", True),
            "short convolutions (use_short_conv)": config.get("use_short_conv", False),
            "clamped gates (clamp_min)": config.get("clamp_min") is not None,
            f"feature map {config.get('feature_map')!r}": config.get("feature_map") not in MAPS,
            "a norm without weights (elementwise_affine)": not config.get("elementwise_affine", True),
        }

    def take(self, keys: Keys, prefix: str, shape: AttentionShape) -> dict[str, Tensor]:
        width = shape.kv_heads * shape.head_dim
        down = keys.take(f"{prefix}.gk_proj.0.weight", (None, shape.hidden_size))
        return {
            "gate.down": down.T,
            "gate.up": keys.take(f"{prefix}.gk_proj.1.weight", (width, len(down))).T,
            "gate.bias": keys.take(f"{prefix}.gk_proj.1.bias", (width,)),
        }

    def entry(self, options: Any, values: dict[str, Tensor]) -> dict[str, Any]:
        if options.feature_map not in MAPS:
            raise SurgeryError(f"feature map {options.feature_map!r} is not imported from fla: swish and none are")
        rank, normalizer = values["gate.up"].shape[0], options.gate_logit_normalizer
        gate = {"kind": "low_rank", "source": "hidden", "rank": rank, "normalizer": normalizer}
        return {"feature_map": {"kind": MAPS[options.feature_map]}, "gate": gate}

    def check(self, model: Any, softmax: bool) -> None:
        mixer = model.surgery.recipe.mixer
        gate, feature_map = mixer.gate, mixer.feature_map
        differences = {
            "softmax layers": softmax,
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

    def give(self, module: Any, attention: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
        """A gain per head goes into o_proj, what their eps is off into v_proj, and a gate of the keys becomes one of
        the layer's input through k_proj."""
        mixer, shape = module.mixer, module.surgery_shape
        gate = mixer.gate
        down, pad = gate.down.float(), RANK - gate.down.shape[1]
        if gate.config.source == "key":
            down = attention["k"].float().T @ down
        larger = torch.tensor((eps * shape.head_dim / mixer.norm.eps) ** 0.5, device=down.device)
        factors = {"v": larger, "o": mixer.norm.gain.repeat_interleave(shape.head_dim)}
        scaled = {
            f"{name}_proj.weight": (attention[name].float() * factor).to(attention[name].dtype)
            for name, factor in factors.items()
            if not torch.all(factor == 1)
        }
        return scaled | {
            "gk_proj.0.weight": nn.functional.pad(down, (0, pad)).T,
            "gk_proj.1.weight": nn.functional.pad(gate.up, (0, 0, 0, pad)).T,
            "gk_proj.1.bias": gate.bias,
            "g_norm.weight": torch.ones(shape.head_dim),
        }

    def config(self, model: Any) -> dict[str, Any]:
        own, identity = model.config, model.surgery.recipe.mixer.feature_map.kind == "identity"
        return {
            "model_type": "gla",
            "architectures": [self.architecture],
            "num_kv_heads": own.num_key_value_heads,
            "expand_k": own.num_attention_heads * own.head_dim / own.hidden_size,
            "expand_v": own.num_attention_heads * own.head_dim / own.hidden_size,
            "feature_map": None if identity else "swish",
            "use_output_gate": False,
        }


class DeltaNet(Layers):
    """arXiv 2406.06484, without convolutions and output gate.

    b_proj.weight [H, C], o_norm.weight [D]
    """

    name, architecture, mixer, mark = "DeltaNet", "DeltaNetForCausalLM", "delta", "b_proj.weight"
    model_type: ClassVar[str] = "delta_net"

    def foreign(self, config: dict[str, Any]) -> dict[str, Any]:
        return {
            "an output gate (use_gate)": config.get("use_gate", False),
            "short convolutions (use_short_conv)": config.get("use_short_conv", True),
            "no β (use_beta)": not config.get("use_beta", True),
            "other queries and keys than silu's (qk_activation)": config.get("qk_activation", "silu") != "silu",
            "queries and keys of another length than one (qk_norm)": config.get("qk_norm", "l2") != "l2",
        }

    def take(self, keys: Keys, prefix: str, shape: AttentionShape) -> dict[str, Tensor]:
        return {"beta.weight": keys.take(f"{prefix}.b_proj.weight", (shape.heads, shape.hidden_size)).T}

    def entry(self, options: Any, values: dict[str, Tensor]) -> dict[str, Any]:
        maximum = 2 if options.allow_neg_eigval else 1
        beta = {"source": "hidden", "bias": False, "initial": maximum / 2, "maximum": maximum}
        return {"feature_map": {"kind": "silu"}, "beta": beta, "values": "silu"}

    def check(self, model: Any, softmax: bool) -> None:
        delta.check_exported(model, softmax, f"fla's {self.name}", {})

    def give(self, module: Any, attention: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
        return delta.projections(module, attention, eps)

    def config(self, model: Any) -> dict[str, Any]:
        own = model.config
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "expand_k": own.num_attention_heads * own.head_dim / own.hidden_size,
            "expand_v": own.num_attention_heads * own.head_dim / own.hidden_size,
            "use_gate": False,
            "allow_neg_eigval": model.surgery.recipe.mixer.beta.maximum == 2,
        }


class GatedDeltaNet(DeltaNet):
    """arXiv 2412.06464, without convolutions and output gate: log α = -exp(A_log) softplus(a_proj x + dt_bias).

    a_proj.weight [H, C], A_log [H], dt_bias [H], beside what DeltaNet has
    """

    name, architecture, mixer, mark = "Gated DeltaNet", "GatedDeltaNetForCausalLM", "gated_delta", "a_proj.weight"
    model_type = "gated_deltanet"

    def foreign(self, config: dict[str, Any]) -> dict[str, Any]:
        return super().foreign(config) | {
            "an output gate (use_gate)": config.get("use_gate", True),
            "larger values than keys (expand_v)": config.get("expand_v", 2) != 1,
        }

    def take(self, keys: Keys, prefix: str, shape: AttentionShape) -> dict[str, Tensor]:
        return super().take(keys, prefix, shape) | {
            "gate.weight": -keys.take(f"{prefix}.a_proj.weight", (shape.heads, shape.hidden_size)).T,
            "gate.bias": -keys.take(f"{prefix}.dt_bias", (shape.heads,)),
            "gate.log_power": keys.take(f"{prefix}.A_log", (shape.heads,)),
        }

    def entry(self, options: Any, values: dict[str, Tensor]) -> dict[str, Any]:
        return super().entry(options, values) | {"gate": {"kind": "mamba2"}}

    def give(self, module: Any, attention: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
        a, power, bias = delta.head_decay(module, attention["k"])
        return super().give(module, attention, eps) | {"a_proj.weight": a, "A_log": power, "dt_bias": bias}

    def config(self, model: Any) -> dict[str, Any]:
        return super().config(model) | {"head_dim": model.config.head_dim, "expand_v": 1.0}


KINDS: dict[str, Layers] = {"gla": GLA(), "gated_deltanet": GatedDeltaNet(), "delta_net": DeltaNet()}
BY_MIXER = {layers.mixer: layers for layers in KINDS.values()}


def refuse(found: list[str], layers: Layers) -> None:
    """Raises: SurgeryError: something was found that our mixer does not compute."""
    if found:
        raise SurgeryError(f"this fla model has {' and '.join(found)}, which our {layers.mixer} mixer does not compute")
