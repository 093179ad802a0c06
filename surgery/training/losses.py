"""The losses of healing, as functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..kernels import output_error
from .stages import TransferLoss

ROWS = 1024
"""Tokens whose logits are held in fp32 at a time."""


def transfer_loss(weights: TransferLoss) -> Callable[[Tensor, Tensor], Tensor]:
    """The terms between two attention outputs [tokens, H, D], student's and teacher's (LoLCATs, eq. 8).

    The term between attention weights is not among them: see `Mixer.cross_entropy`.
    """
    return partial(_transfer, weights.mse, weights.normalized_mse)


def _transfer(mse: float, normalized_mse: float, student: Tensor, teacher: Tensor) -> Tensor:
    # by name: autocast is not to round them
    error, variance = output_error(student=student, teacher=teacher)
    loss = mse * error
    if normalized_mse:
        # layers whose output is small count as much as others
        loss = loss + normalized_mse * error / variance.clamp(min=1e-12)
    return loss


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the next tokens: logits [B, T, V], labels [B, T], where -100 does not count."""
    targets = labels[:, 1:].flatten()
    blocks = zip(logits[:, :-1].flatten(0, 1).split(ROWS), targets.split(ROWS), strict=True)
    # the fp32 copies of one block are made again in the backward pass instead of kept
    sums = [checkpoint(_summed_cross_entropy, *block, use_reentrant=False) for block in blocks]
    return torch.stack(sums).sum() / (targets != -100).sum().clamp(min=1)


def _summed_cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), tokens, reduction="sum")
