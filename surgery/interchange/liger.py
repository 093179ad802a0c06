"""Liger-GLA (arXiv 2503.01496): the key projection is the gate too, so a checkpoint holds LoRA in peft's layout, or all
weights of the softmax model after training, and nothing else. What it pools keys by is the identity.

Their decoding gives the window one key alone; ours gives it what their training does.
"""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt
from torch import nn

from ..errors import SurgeryError
from ..mixers.base import Config
from ..patchers.sites import find_sites
from ..recipe import load_recipe
from .contents import Imported
from .tensors import Keys, take_base, take_lora


class Options(Config):
    """window: of the softmax. normalizer: of the gates. lora_alpha: of the adapter, if any. layers: those converted,
    while the others keep softmax, as in Liger-H; None: all.
    """

    window: PositiveInt = 64
    normalizer: PositiveFloat = 16.0
    lora_alpha: PositiveFloat = 8.0
    layers: list[int] | None = None


def read(keys: Keys, model: nn.Module, options: Options) -> Imported:
    """See `import_checkpoint`."""
    sites = find_sites(model)
    layers = range(len(sites)) if options.layers is None else sorted(options.layers)
    if absent := sorted(set(layers) - set(range(len(sites)))):
        raise SurgeryError(f"layers {absent} do not exist: the model has layers 0 to {len(sites) - 1}")
    changes = {"mixer.window.size": options.window, "mixer.gate.normalizer": options.normalizer}
    recipe = load_recipe("llama/liger-gla").override(changes)
    lora = take_lora(keys, model, options.lora_alpha)
    base = take_base(keys, model)
    if lora is None and not base:
        raise SurgeryError("the checkpoint has neither LoRA in peft's layout nor the weights of this model")
    return Imported(recipe, tuple(layers), base=base, lora=lora)
