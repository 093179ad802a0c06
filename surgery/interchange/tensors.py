"""The tensors of a checkpoint of another project: read without executing anything, and taken one by one."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import SurgeryError

Source = str | os.PathLike | Mapping[str, Tensor]

WRAPPERS = re.compile(r"^(base_model\.model\.|module\.|model\.)+")
LORA = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.[^.]+)?\.weight")
ENVELOPES = ("model_state_dict", "state_dict")


def bare(key: str) -> str:
    """A key without the names of what wraps the layers: `layers.0.…` for `base_model.model.model.layers.0.…`."""
    return WRAPPERS.sub("", key)


def read_tensors(source: Source) -> dict[str, Tensor]:
    """Keys and tensors of a mapping, of a .safetensors file or of a file of torch.save, on the CPU. A folder: of all
    .safetensors in it, or else of its one .pt, .pth or .bin.

    Raises:
        SurgeryError: there is nothing to read, or something other than named tensors.
    """
    if isinstance(source, Mapping):
        return _named(source, "the state dict")
    path = Path(source)
    if not path.is_dir():
        return _read_file(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        files = sorted(file for file in path.iterdir() if file.suffix in (".pt", ".pth", ".bin"))
        if len(files) != 1:
            raise SurgeryError(
                f"{path} has no .safetensors and {len(files)} files of torch.save: name the file to read"
            )
    return {key: tensor for file in files for key, tensor in _read_file(file).items()}


def read_config(source: Source, name: str) -> dict[str, Any]:
    """The JSON object `name` of a folder; empty where there is none.

    Raises:
        SurgeryError: it cannot be read.
    """
    file = None if isinstance(source, Mapping) else Path(source) / name
    if file is None or not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise SurgeryError(f"{file} cannot be read as JSON: {error}") from None


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise SurgeryError(
            f"{path} holds more than tensors, or no checkpoint at all: save its state dict alone, as .safetensors"
        ) from None
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise SurgeryError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from None
    return _named(found, str(path))


def _named(found: Any, where: str) -> dict[str, Tensor]:
    for envelope in ENVELOPES:
        if isinstance(found, Mapping) and isinstance(found.get(envelope), Mapping):
            found = found[envelope]
    if not isinstance(found, Mapping) or not found or not all(isinstance(x, Tensor) for x in found.values()):
        raise SurgeryError(f"{where} does not map names to tensors: expected a state dict, also in `{ENVELOPES[0]}`")
    return dict(found)


class Keys:
    """Bare keys and tensors; what is taken is checked, and `finish` complains of what is left."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {bare(key): tensor for key, tensor in tensors.items()}
        if len(self.tensors) < len(tensors):
            twice = Counter(map(bare, tensors)).most_common(1)[0][0]
            raise SurgeryError(f"the checkpoint has {twice} twice, under different prefixes: keep one")
        self.left = set(self.tensors)

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def take(self, key: str, shape: Iterable[int | None]) -> Tensor:
        """The tensor of a key. shape: None where any length will do.

        Raises:
            SurgeryError: it is missing, or has another shape.
        """
        shape = tuple(shape)
        if key not in self.tensors:
            raise SurgeryError(f"the checkpoint lacks {key}: it is not whole, or of another format or model")
        found = self.tensors[key]
        same = len(shape) == found.dim() and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
        if not same:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise SurgeryError(
                f"{key} has shape {list(found.shape)} in the checkpoint and would need [{wanted}] in this model: "
                "is it for another one?"
            )
        self.left.discard(key)
        return found

    def finish(self, format: str) -> None:
        """Raises: SurgeryError: some keys were not taken."""
        if self.left:
            first = sorted(self.left)[:3]
            raise SurgeryError(
                f"the checkpoint has {len(self.left)} keys that format {format} does not know ({', '.join(first)}"
                f"{', …' if len(self.left) > 3 else ''}): importing without them would change the model"
            )


@dataclass(frozen=True)
class LoRA:
    """halves: path of a projection in our model -> A [rank, in], B [out, rank]."""

    halves: dict[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float


def take_lora(keys: Keys, model: nn.Module, alpha: float) -> LoRA | None:
    """The adapter in `keys`, in peft's layout; None: there is none.

    Raises:
        SurgeryError: it is not on linear projections of `model`, not whole, or its ranks differ.
    """
    halves: dict[str, dict[str, str]] = {}
    for key in sorted(keys.left):
        match = LORA.fullmatch(key)
        if match:
            halves.setdefault(match["module"], {})[match["half"]] = key
    modules = {bare(path): (path, module) for path, module in model.named_modules()}
    found = {}
    for name, pair in halves.items():
        path, module = modules.get(name, (name, None))
        if not isinstance(module, nn.Linear):
            raise SurgeryError(f"the checkpoint adapts {name}, which is no linear layer of this {type(model).__name__}")
        a = keys.take(pair.get("A", f"{name}.lora_A.weight"), (None, module.in_features))
        found[path] = a, keys.take(pair.get("B", f"{name}.lora_B.weight"), (module.out_features, len(a)))
    ranks = {len(a) for a, _ in found.values()}
    if len(ranks) > 1:
        raise SurgeryError(f"the adapter has ranks {sorted(ranks)} on different projections: one rank can be imported")
    return LoRA(found, ranks.pop(), alpha) if found else None


def take_base(keys: Keys, model: nn.Module, rename: Callable[[str], str] = str) -> dict[str, Tensor]:
    """New values of all of the model's parameters, by their names in it; empty: `keys` has none. rename: from our bare
    names to theirs.

    Raises:
        SurgeryError: `keys` has some but not all of them.
    """
    named = dict(model.named_parameters())
    if not any(rename(bare(name)) in keys for name in named):
        return {}
    found = {name: keys.take(rename(bare(name)), parameter.shape) for name, parameter in named.items()}
    if "lm_head.weight" in keys.left and "lm_head.weight" not in named:
        embedding = next(name for name in named if name.endswith("embed_tokens.weight"))
        if torch.equal(keys.take("lm_head.weight", named[embedding].shape), found[embedding]):
            return found
        raise SurgeryError("lm_head.weight differs from the embedding in the checkpoint, and this model ties the two")
    return found


def adapter_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The options that peft's adapter_config.json tells of the adapter beside it.

    Raises:
        SurgeryError: the adapter is more than LoRA of one rank.
    """
    for name in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern"):
        if config.get(name):
            raise SurgeryError(f"the adapter has {name}, which is not imported: merge it into its weights with peft")
    return {"lora_alpha": config["lora_alpha"]} if "lora_alpha" in config else {}
