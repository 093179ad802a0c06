"""Initial values of mixers by closed forms, from what the teacher's attention does on some of the user's data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import SurgeryError
from .evaluation.losses import compare, measuring
from .mixers.base import AttentionContext, Calibrated
from .mixers.calibration import Call, Sample
from .operate import mode
from .patchers.interface import converted_layers
from .patchers.sites import find_model
from .sharding import units
from .training.branches import inputs_of

if TYPE_CHECKING:
    from rich.table import Table

TOKENS = 4096
MEMORY = 2**30
"""Bytes of activations that are kept at a time, but those of one layer in any case."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class LayerCalibration:
    """One converted layer. parts: what could be calibrated. before, after: squared error of the mixer's output, as a
    part of the square of the softmax output, on the same queries, keys and values. kept: False: taken back, as the
    model as a whole was better off without."""

    layer: int
    path: str
    mixer: str
    parts: tuple[str, ...]
    before: float
    after: float
    kept: bool = True


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did. tokens: of the sample. before, after: the KL divergence of the model's predictions from
    those of its softmax self, in nats per token; None: it predicts no tokens, or nothing was calibrated."""

    tokens: int
    layers: tuple[LayerCalibration, ...]
    before: float | None = None
    after: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}

    def table(self) -> Table:
        """A rich table, one row a layer."""
        from rich.table import Table

        table = Table(title=f"calibrated on {self.tokens:,} tokens")
        for name in ("layer", "mixer", "calibrated"):
            table.add_column(name)
        for name in ("error before", "after"):
            table.add_column(name, justify="right")
        for row in self.layers:
            parts = ", ".join(row.parts) or "–"
            after = f"{row.after:.4f}" if row.kept else "taken back"
            table.add_row(row.path, row.mixer, parts, f"{row.before:.4f}", after)
        return table


def calibrate(model: nn.Module, batches: Iterable[Any], *, tokens: int = TOKENS) -> Calibration:
    """Set what mixers can set of themselves by closed forms, without a gradient, so that every layer comes closer to
    its softmax attention: half-lives of gates from the mean distance at which that looks beyond the window, the balance
    of window and linear branch and the gains of norms by least squares (after Taylor-Calibrate).

    batches: of token ids [B, T], or mappings with input_ids and maybe attention_mask and position_ids; or one of these.
    tokens: how many of them are looked at, in whole rows; rows as long as in later use say most.

    Each head keeps its old values wherever new ones would not lower its error, and nothing but mixers changes. Layers
    that come closer on the softmax model's inputs may still take a model further away that has little of it left: if
    its predictions do, layers keep their new values one by one, in order, where these bring them closer. The same data
    give the same values. Before any training: what mixers have learned is replaced. Returns what it did, by layer.

    Raises:
        SurgeryError: the model is not converted, its weights are sharded, or there is no batch.
    """
    inner = find_model(model)
    if units(inner):
        raise SurgeryError("the weights are sharded over processes already: call surgery.calibrate before that")
    rows = []
    with measuring(inner) as device:
        inputs = some(batches, tokens, device)
        old = {path: _values(module.mixer) for path, module in converted_layers(inner).items()}
        for path, module, sample in samples(inner, inputs):
            before = sample.errors(module.mixer).sum()
            module.mixer.calibrate(sample)
            rows.append(
                LayerCalibration(
                    layer=module.surgery_shape.layer,
                    path=path,
                    mixer=module.mixer.describe(),
                    parts=tuple(name for name, part in module.mixer.named_children() if isinstance(part, Calibrated)),
                    before=before.item(),
                    after=sample.errors(module.mixer).sum().item(),
                )
            )
        started, reached, back = _settle(inner, inputs, old)
    rows = [replace(row, after=row.before, kept=False) if row.path in back else row for row in rows]
    return Calibration(sum(map(count, inputs)), tuple(rows), started, reached)


def _settle(
    model: PreTrainedModel, inputs: list[Inputs], old: dict[str, Inputs]
) -> tuple[float | None, float | None, set[str]]:
    """Take back new values where they keep predictions away from the softmax model's. Returns how far away these were
    with the old values and are now, and the paths of the layers that have theirs back."""
    mixers = {path: module.mixer for path, module in converted_layers(model).items()}
    new = {path: _values(mixer) for path, mixer in mixers.items()}
    changed = [path for path in new if any(not torch.equal(x, old[path][name]) for name, x in new[path].items())]
    reached = _divergence(model, inputs) if changed else None
    if reached is None:
        return None, None, set()
    for path in changed:
        _set(mixers[path], old[path])
    started = _divergence(model, inputs)
    assert started is not None
    if reached < started:
        for path in changed:
            _set(mixers[path], new[path])
        return started, reached, set()
    best, back = started, set()
    for path in changed:
        _set(mixers[path], new[path])
        now = _divergence(model, inputs)
        assert now is not None
        if now < best:
            best = now
        else:
            _set(mixers[path], old[path])
            back.add(path)
    return started, best, back


def _set(mixer: nn.Module, values: Inputs) -> None:
    for name, p in mixer.named_parameters():
        p.copy_(values[name])


def _values(mixer: nn.Module) -> Inputs:
    return {name: p.detach().clone() for name, p in mixer.named_parameters()}


def _divergence(model: PreTrainedModel, batches: list[Inputs]) -> float | None:
    """The KL divergence of predictions from the softmax model's, in nats per token; None: there are none."""
    total = 0.0
    for batch in batches:
        with mode(model, "teacher"):
            teacher = getattr(model(**batch, use_cache=False), "logits", None)
        if teacher is None or teacher.dim() != 3:
            return None
        total += compare(model(**batch, use_cache=False).logits, teacher, batch)[0].item()
    return total / sum(map(count, batches))


def some(batches: Iterable[Any], tokens: int, device: torch.device) -> list[Inputs]:
    """What models take of batches, or of one, until there are so many tokens, in whole rows.

    Raises:
        SurgeryError: there is none.
    """
    found: list[Inputs] = []
    for batch in [batches] if isinstance(batches, Tensor | Mapping) else batches:
        inputs = {name: x for name, x in inputs_of(batch).items() if name != "labels"}
        rows = -(-tokens // inputs["input_ids"].shape[1])
        found.append({name: x[:rows].to(device) for name, x in inputs.items()})
        tokens -= count(found[-1])
        if tokens <= 0:
            break
    if not found:
        raise SurgeryError("there is no batch to measure on: give at least some hundred tokens")
    return found


def count(inputs: Inputs) -> int:
    """Tokens that are no padding."""
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None or mask.dim() != 2 else int(mask.sum())


def samples(model: PreTrainedModel, batches: list[Inputs]) -> Iterator[tuple[str, Any, Sample]]:
    """Path and module of the converted layers, with what the softmax model does in them: as many layers in one pass as
    `MEMORY` holds."""
    layers, together = list(converted_layers(model).items()), 1
    if not layers:
        with mode(model, "transfer"):
            return  # which says that the model is not converted
    while layers:
        now, layers = layers[:together], layers[together:]
        found = _collect(model, [module for _, module in now], batches)
        for (path, module), sample in zip(now, found, strict=True):
            yield path, module, sample
        together = max(1, MEMORY // max(1, _bytes(found[0])))


def _collect(model: PreTrainedModel, modules: list[Any], batches: list[Inputs]) -> list[Sample]:
    calls: list[list[Call]] = [[] for _ in modules]
    running: list[tuple[int, AttentionContext]] = []

    def begins(index: int) -> Any:
        return lambda mixer, args: running.append((index, args[0].map(lambda x: x.detach().clone())))

    def ends(student: Tensor, teacher: Tensor) -> Tensor:
        if running:
            index, context = running.pop()
            real = teacher if context.lengths is not None else teacher.flatten(0, 1)
            calls[index].append(Call(context, real.detach().clone()))
        return student.new_zeros(())

    handles = [module.mixer.register_forward_pre_hook(begins(index)) for index, module in enumerate(modules)]
    try:
        with mode(model, "transfer", loss=ends):
            for batch in batches:
                model.base_model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [Sample(module.mixer.shape, own) for module, own in zip(modules, calls, strict=True)]


def _bytes(sample: Sample) -> int:
    fields_of = [(getattr(call.context, field.name) for field in fields(call.context)) for call in sample.calls]
    tensors = [x for values in fields_of for x in values if isinstance(x, Tensor)]
    return sum(x.nbytes for x in [*tensors, *(call.teacher for call in sample.calls)])
