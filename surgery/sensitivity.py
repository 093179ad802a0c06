"""Which layers should keep their softmax: what converting each of them does to the model on some of the user's data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from .calibration import TOKENS, Inputs, calibrate, count, samples, some
from .errors import SurgeryError
from .evaluation.losses import compare, measuring, real_tokens
from .kernels import Window
from .mixers.calibration import Sample
from .mixers.locality import beyond
from .operate import apply, mode, restored, revert
from .patchers.interface import converted_layers
from .patchers.sites import find_model
from .recipe import AutoLayers, load_recipe

if TYPE_CHECKING:
    from rich.table import Table

By = Literal["convert", "restore"]
NEAR = Window(64)
"""What counts as local for mixers without a window."""


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer.

    kl, nll: what its conversion adds to the divergence from the softmax model and to the loss, in nats per token.
    local: the part of its softmax weights that the mixer's window holds. softmax: whether it should keep it.
    """

    layer: int
    path: str
    kl: float
    nll: float
    local: float
    softmax: bool = False


@dataclass(frozen=True)
class LayerChoice:
    """What `choose_layers` found. Iterating gives the layers to convert: `surgery.apply(model, recipe, layers=choice)`.

    by, tokens: how it was measured. layers: a row each.
    """

    by: str
    tokens: int
    layers: tuple[LayerSensitivity, ...]

    def __iter__(self) -> Iterator[int]:
        return (row.layer for row in self.layers if not row.softmax)

    @property
    def softmax(self) -> tuple[int, ...]:
        """The layers that keep their softmax."""
        return tuple(row.layer for row in self.layers if row.softmax)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        rows = [asdict(row) for row in self.layers]
        return {"by": self.by, "tokens": self.tokens, "convert": list(self), "softmax": self.softmax, "layers": rows}

    def table(self) -> Table:
        """A rich table, one row a layer."""
        from rich.table import Table

        what = "converting it alone" if self.by == "convert" else "leaving it converted"
        table = Table(title=f"what {what} costs, on {self.tokens:,} tokens")
        table.add_column("layer")
        for name in ("KL to softmax", "loss", "attention in the window"):
            table.add_column(name, justify="right")
        table.add_column("proposal")
        for row in self.layers:
            numbers = f"{row.kl:.4f}", f"{row.nll:+.4f}", f"{row.local:.0%}"
            table.add_row(row.path, *numbers, "softmax" if row.softmax else "convert")
        return table


def choose_layers(
    model: nn.Module,
    recipe: Any,
    batches: Iterable[Any],
    *,
    keep: int | None = None,
    tokens: int | None = None,
    by: By | None = None,
) -> LayerChoice:
    """Which `keep` layers should keep their softmax when `model` is converted by `recipe`: those whose conversion takes
    the model furthest from what it was, by the KL divergence of its predictions; the first ones among equals.

    model: a softmax model, which is converted, calibrated and reverted meanwhile; or a converted one, as it has learned
        to be, with recipe None. batches, tokens: as for `calibrate`. keep, tokens, by: None: as the recipe's `layers`.
    by: "convert": one layer at a time is converted, the others are softmax (HALO, arXiv 2601.22156). "restore": one at
        a time is softmax, the others are converted (KL-guided selection); for models that have learned.

    The same data give the same choice. It takes a forward pass over the tokens for every layer.

    Raises:
        RecipeError, UnsupportedModelError, SurgeryError: as `apply` and `calibrate`; `keep` leaves nothing to convert.
    """
    inner = find_model(model)
    loaded = None if recipe is None else load_recipe(recipe)
    auto = loaded.layers if loaded is not None and isinstance(loaded.layers, AutoLayers) else None
    keep = keep if keep is not None else auto.auto if auto else 1
    tokens, by = tokens or (auto.tokens if auto else TOKENS), by or (auto.by if auto else "convert")
    if by not in ("convert", "restore"):
        raise SurgeryError(f"unknown way to measure {by!r}: choose convert or restore")
    device = next(inner.parameters()).device
    inputs = some(batches, tokens, device)
    if loaded is None:
        return _choice(_measured(inner, inputs, by), keep, by, inputs)
    apply(inner, loaded.model_copy(update={"layers": None}))
    try:
        calibrate(inner, inputs, tokens=tokens)
        return _choice(_measured(inner, inputs, by), keep, by, inputs)
    finally:
        revert(inner)


def _choice(rows: list[LayerSensitivity], keep: int, by: str, inputs: list[Inputs]) -> LayerChoice:
    if not 0 < keep < len(rows):
        raise SurgeryError(f"cannot keep {keep} of {len(rows)} layers: give a number from 1 to {len(rows) - 1}")
    chosen = {row.layer for row in sorted(rows, key=lambda row: (-row.kl, row.layer))[:keep]}
    marked = tuple(replace(row, softmax=row.layer in chosen) for row in rows)
    return LayerChoice(by, sum(map(count, inputs)), marked)


def _measured(model: PreTrainedModel, batches: list[Inputs], by: By) -> list[LayerSensitivity]:
    with measuring(model):
        local = [_locality(module.mixer, sample) for _, module, sample in samples(model, batches)]
        layers = {module.surgery_shape.layer: path for path, module in converted_layers(model).items()}
        # what each layer alone is converted or restored in, and what that is to be compared with
        variants = [[i for i in layers if (i != layer) == (by == "convert")] for layer in layers]
        whole = list(layers) if by == "convert" else []
        sums = torch.zeros(len(layers) + 1, 2, dtype=torch.float64)
        for batch in batches:
            with mode(model, "teacher"):
                teacher = model(**batch, use_cache=False).logits
            for index, softmax in enumerate([whole, *variants]):
                with restored(model, softmax):
                    sums[index] += compare(model(**batch, use_cache=False).logits, teacher, batch).cpu()
    targets = sum(int((real_tokens(batch)[:, 1:] & real_tokens(batch)[:, :-1]).sum()) for batch in batches)
    means = sums / torch.tensor([sum(map(count, batches)), max(targets, 1)])
    costs = (means[1:] - means[0]) * (1 if by == "convert" else -1)
    return [
        LayerSensitivity(layer, path, kl, nll, near)
        for (layer, path), (kl, nll), near in zip(layers.items(), costs.tolist(), local, strict=True)
    ]


def _locality(mixer: nn.Module, sample: Sample) -> float:
    window = getattr(mixer, "window", None) or NEAR
    masses = [beyond(context, sample.shape, window)[0].double().sum() for context, _ in sample.calls]
    weights = sum(call.teacher.shape[0] * call.teacher.shape[1] for call in sample.calls)
    return 1 - torch.stack(masses).sum().item() / weights
