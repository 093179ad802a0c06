"""Which parameters of a converted model learn: the groups a recipe names, and switching everything else off."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import SurgeryError
from .stages import Part

PREFIXES: dict[str, str] = {"mixer": "", "feature_map": "feature_map", "gate": "gate", "mix": "mix."}
"""Where a part's parameters are inside a mixer, by the beginning of their names."""


def new_parameters(model: nn.Module, parts: Iterable[Part]) -> dict[str, nn.Parameter]:
    """Name -> parameter of the named parts of all mixers.

    Raises:
        SurgeryError: a part without any parameter.
    """
    mixers = {name: p for name, p in model.named_parameters() if ".mixer." in name}
    found: dict[str, nn.Parameter] = {}
    for part in parts:
        chosen = {name: p for name, p in mixers.items() if name.split(".mixer.")[1].startswith(PREFIXES[part])}
        if not chosen:
            raise SurgeryError(
                f"the recipe trains {part!r}, but the mixers of this model have no such parameters: take it out of "
                "`trains`, or leave the stage out"
            )
        found |= chosen
    return found


def train_only(model: nn.Module, chosen: Iterable[nn.Parameter]) -> None:
    """Let these parameters learn and freeze all others."""
    wanted = {id(parameter) for parameter in chosen}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
