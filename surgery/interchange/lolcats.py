"""LoLCATs (arXiv 2410.10254): learned maps of queries and keys per head, window factors, and LoRA.

    layers.N.self_attn.feature_map_q.mlp.layer   [H, D, F]      layers.N.self_attn.window_factors   [1, H, 1, 1]
    layers.N.self_attn.feature_map_k.mlp.layer   [H, D, F]      layers.N.self_attn.q_proj.lora_A.default.weight …

Keys cannot tell windows, activations and LoRA's alpha apart: the options say them, as the authors' published models
have them by default.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ..errors import SurgeryError
from ..mixers.base import Config
from ..mixers.linear import LinearConfig, LinearMixer
from ..operate import base_is_original
from ..patchers.interface import converted_layers
from ..patchers.sites import find_sites
from ..recipe import load_recipe
from .contents import Exported, Imported
from .tensors import Keys, take_lora

LAYER = re.compile(r"layers\.(\d+)\.self_attn\.(feature_map_[qk]\.mlp\.layer|window_factors)")


class Options(Config):
    """window, layout: of the softmax; terraced is called tk there, sliding sw. feature_map: hedgehog is their
    softmax_dim, exp their exp_dim. lora_alpha: of the adapter, if any. layers: those converted; None: all.
    """

    window: PositiveInt = 64
    layout: Literal["terraced", "sliding"] = "terraced"
    feature_map: Literal["hedgehog", "exp"] = "hedgehog"
    lora_alpha: PositiveFloat = 16.0
    layers: list[int] | None = None


def read(keys: Keys, model: nn.Module, options: Options) -> Imported:
    """See `import_checkpoint`. Without any window_factors the checkpoint is of linear attention alone."""
    sites = find_sites(model)
    found = {int(match[1]) for match in map(LAYER.fullmatch, keys.tensors) if match}
    layers = tuple(range(len(sites))) if options.layers is None else tuple(sorted(options.layers))
    if not found:
        raise SurgeryError(
            "the checkpoint has no feature maps (layers.N.self_attn.feature_map_q.mlp.layer): pass that of the "
            "attention transfer, too, or name its format"
        )
    if absent := sorted(set(layers) - (found & set(range(len(sites))))):
        raise SurgeryError(
            f"the checkpoint has no feature maps for layers {absent} of the model's {len(sites)}: if they keep softmax "
            "attention, name the others in the option layers"
        )
    hybrid = any(key.endswith("window_factors") for key in keys.tensors)
    mixers: dict[int, dict[str, Tensor]] = {}
    width: int | None = None
    for index in layers:
        shape, prefix = sites[index].shape, f"layers.{index}.self_attn"
        mixers[index] = {}
        for name in ("feature_map_q", "feature_map_k"):
            weight = keys.take(f"{prefix}.{name}.mlp.layer", (shape.heads, shape.head_dim, width))
            width = weight.shape[2]
            mixers[index][f"{name}.weight"] = weight
        if hybrid:
            factors = keys.take(f"{prefix}.window_factors", (1, shape.heads, 1, 1))
            mixers[index]["mix.window_factor"] = factors.flatten()
    window = {"window": {"size": options.window, "layout": options.layout}} if hybrid else {"window": None, "mix": None}
    feature_map = {"kind": options.feature_map, "features": width, "init": "identity"}
    recipe = load_recipe("llama/lolcats").to_dict()
    recipe["mixer"] |= {"feature_map": feature_map, **window}
    return Imported(load_recipe(recipe), layers, mixers, lora=take_lora(keys, model, options.lora_alpha))


def write(model: Any) -> Exported:
    """The attention transfer of a converted model, in fp32, as `read` takes it; its base weights stay where they are.

    Raises:
        SurgeryError: the recipe is not LoLCATs', or the base weights are no longer those of the softmax model.
    """
    if not base_is_original(model):
        raise SurgeryError(
            "a LoLCATs checkpoint holds no base weights, and those of this model changed since surgery.apply, by "
            "training, or by merging or adding an adapter: export before that"
        )
    tensors: dict[str, Tensor] = {}
    for module in converted_layers(model).values():
        mixer: Any = module.mixer
        _check(mixer)
        prefix = f"model.layers.{module.surgery_shape.layer}.self_attn"
        for name in ("feature_map_q", "feature_map_k"):
            tensors[f"{prefix}.{name}.mlp.layer"] = _weight(getattr(mixer, name))
        if mixer.mix is not None:
            tensors[f"{prefix}.window_factors"] = mixer.mix.window_factor.detach().view(1, -1, 1, 1)
    config = model.surgery.recipe.mixer
    options = {"feature_map": config.feature_map.kind, "layers": list(model.surgery.layers)}
    if config.window is not None:
        options |= {"window": config.window.size, "layout": config.window.layout}
    return Exported(tensors, options=options)


def _weight(feature_map: Any) -> Tensor:
    # a temperature divides what the weights give
    weight: Tensor = feature_map.weight.detach() / feature_map.temperature
    return weight


def _check(mixer: nn.Module) -> None:
    config = getattr(mixer, "config", None)
    if not isinstance(mixer, LinearMixer) or not isinstance(config, LinearConfig):
        raise SurgeryError(f"LoLCATs has no {getattr(config, 'kind', 'such')} mixer: it has linear attention alone")
    differences = {
        "state: kv_head": config.state != "head",
        "rope: raw": config.rope != "rotated",
        f"feature map {config.feature_map.kind}": config.feature_map.kind not in ("hedgehog", "exp"),
        f"mix {config.mix and config.mix.kind}": config.mix is not None and config.mix.kind != "joint",
        "attention sinks": config.window is not None and config.window.sinks > 0,
        "block window": config.window is not None and config.window.layout == "block",
        "capped softmax": mixer.shape.softcap is not None,
    }
    if found := [what for what, there in differences.items() if there]:
        raise SurgeryError(f"this recipe cannot be exported to LoLCATs, which has no {', no '.join(found)}")
