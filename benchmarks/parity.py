"""Whether a converted model gives one answer however its tokens are fed, and its softmax model's where they must agree.

Every check raises `Wrong` with what differs and by how much.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import surgery
from surgery.cache import RecurrentLayer
from surgery.hub import auto_class
from surgery.patchers.sites import find_family

from .tiny import VOCAB

WINDOW, LENGTH = 8, 40
"""Five windows long, and longer than the windows that tiny models have of their own."""
SHORT = 20
"""Within the windows that tiny models have of their own."""
FAR = 1e-3
"""More than rounding."""
CARRIED = ("S", "z")


class Wrong(Exception):
    """A converted model that is not what it should be; `error` is by how much."""

    def __init__(self, what: str, error: float = float("inf")):
        super().__init__(what if error == float("inf") else f"{what} differs by {error:.0e}")
        self.error = error


@dataclass
class Checker:
    """Checks one softmax model, which is left as it was. tolerance: relative to the largest logit.

    skipped: what cannot be asked of the converted model, as the softmax model fails it too. own: by how much the
    softmax model fails each check. positions: whether padded rows are given positions.
    """

    model: PreTrainedModel
    tolerance: float = 1e-5
    skipped: tuple[str, ...] = ()
    own: dict[str, float] = field(default_factory=dict)
    positions: bool = True

    def run(self) -> None:
        """All checks.

        Raises:
            SurgeryError: the model cannot be converted.
            Wrong: it can, and the result is not right.
        """
        model, ids = self.model, tokens(2, LENGTH)
        surgery.inspect(model, "llama/lolcats")
        before = logits(model, ids)
        if not torch.isfinite(before).all():
            raise Wrong("the softmax model is not finite")
        self._baseline()
        if not find_family(model.config).lacks:
            convert(model, "control/window-lora", LENGTH)
            self._same("a window over all tokens", logits(model, ids[:, :SHORT]), before[:, :SHORT])
            surgery.revert(model)
        convert(model, "llama/lolcats", WINDOW)
        for name, check in self._feeds().items():
            if name not in self.skipped:
                check()
        self._state(ids)
        with tempfile.TemporaryDirectory() as folder:
            whole = logits(model, ids)
            model.save_pretrained(folder)
            options = {"dtype": model.dtype, "experts_implementation": "eager"}
            again = auto_class(model.config).from_pretrained(folder, **options)
            self._same("a saved and loaded model", logits(again.eval(), ids), whole)
        with surgery.mode(model, "teacher"):
            equal("teacher mode", logits(model, ids), before)
        surgery.revert(model)
        equal("reverting", logits(model, ids), before)

    def _baseline(self) -> None:
        """What the softmax model itself does: padding goes with or without positions, some cannot be fed in pieces."""
        for self.positions in (True, False):
            self.own = {}
            self.own = {name: _error(check) for name, check in self._feeds().items()}
            if max(self.own["left padding"], self.own["right padding"]) <= FAR:
                break
        self.skipped = tuple(name for name, error in self.own.items() if not error <= FAR)

    def _feeds(self) -> dict[str, Callable[[], None]]:
        return {
            "decoding": lambda: self._pieces("decoding", [1] * LENGTH),
            "prefill and decoding": lambda: self._pieces("prefill and decoding", [29, *[1] * 11]),
            "chunked prefill": lambda: self._pieces("chunked prefill", [17, 12, *[1] * 11]),
            "left padding": lambda: self._padding("left"),
            "right padding": lambda: self._padding("right"),
        }

    def _pieces(self, name: str, sizes: list[int]) -> None:
        ids = tokens(2, LENGTH)
        self._same(name, feed(self.model, ids, sizes)[0], logits(self.model, ids))

    def _padding(self, side: str) -> None:
        rows = [tokens(1, length, seed=length) for length in (LENGTH, 29, 11)]
        ids, mask = pad(rows, side)
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if self.positions else {}
        batch = logits(self.model, ids, attention_mask=mask, **positions)
        for index, row in enumerate(rows):
            self._same(f"{side} padding", batch[index][mask[index].bool()], logits(self.model, row)[0])

    def _state(self, ids: Tensor) -> None:
        """A state that carries nothing must be felt."""
        _, cache = feed(self.model, ids[:, :30], [30])
        for layer in cache.layers:
            for name in CARRIED if isinstance(layer, RecurrentLayer) else ():
                layer.state[name].zero_()
        rest, _ = feed(self.model, ids[:, 30:], [1] * 10, cache)
        if relative(rest, logits(self.model, ids)[:, 30:]) <= 1e-3:
            raise Wrong("emptying the states changes nothing: attention hardly matters to this model's logits")

    def _same(self, what: str, actual: Tensor, expected: Tensor) -> None:
        error = relative(actual, expected)
        if not error <= max(self.tolerance, 4 * self.own.get(what, 0.0)):
            raise Wrong(what, error)


def _error(check: Callable[[], None]) -> float:
    """By how much a check fails."""
    try:
        check()
    except Wrong as wrong:
        return wrong.error
    except Exception:
        return float("inf")
    return 0.0


def convert(model: PreTrainedModel, recipe: str, window: int) -> None:
    """Apply a shipped recipe with another window."""
    torch.manual_seed(0)
    surgery.apply(model, surgery.load_recipe(recipe).override({"mixer.window.size": window}))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """[batch, length] ids that are not special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """[B, T, V] in one forward, without a cache."""
    return model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def feed(model: PreTrainedModel, ids: Tensor, sizes: list[int], cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of `ids` fed in chunks of `sizes` tokens, and the cache after them."""
    name = "cache" if takes(model, "cache") else "past_key_values"
    parts = []
    for chunk in ids.split(sizes, dim=1):
        output = model(chunk, **{name: cache}, use_cache=True)
        cache = output[name]
        parts.append(output.logits)
    return torch.cat(parts, 1), cache


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the forward of a model has an argument of that name."""
    return argument in inspect.signature(type(model).forward).parameters


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows [1, t] to one batch [B, T] and its mask."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(longest - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
        ids[index, where], mask[index, where] = row[0], 1
    return ids, mask


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest magnitude."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-9)).item()


def equal(what: str, actual: Tensor, expected: Tensor) -> None:
    """Raises: `Wrong`, unless two tensors are the same to the bit."""
    if not torch.equal(actual, expected):
        raise Wrong(f"{what} does not give the softmax model back, bit for bit")
