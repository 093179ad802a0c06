"""The losses of healing, as functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .stages import TransferLoss

ROWS = 1024
"""Tokens whose logits are held in fp32 at a time."""


def transfer_loss(weights: TransferLoss) -> Callable[[Tensor, Tensor], Tensor]:
    """The terms between two attention outputs [tokens, H, D], student's and teacher's (LoLCATs, eq. 8).

    The term between attention weights is not among them: see `Mixer.cross_entropy`.
    """
    return partial(_transfer, weights.mse, weights.normalized_mse)


def _transfer(mse: float, normalized_mse: float, student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = student.float(), teacher.float()
    error = functional.mse_loss(student, teacher)
    loss = mse * error
    if normalized_mse:
        # layers whose output is small count as much as others
        loss = loss + normalized_mse * error / teacher.var().clamp(min=1e-12)
    return loss


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over the next tokens: logits [B, T, V], tokens [B, T]."""
    return _in_rows(_row_cross_entropy, logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) / tokens[:, 1:].numel()


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) per token: logits [B, T, V], twice -> mean over the tokens."""
    return _in_rows(_row_kl, student.flatten(0, 1), teacher.flatten(0, 1)) / student.shape[:2].numel()


def _row_cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), tokens, reduction="sum")


def _row_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _in_rows(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Tensor:
    """Σ loss over rows; the fp32 copies of one block are made again in the backward pass instead of kept."""
    blocks = zip(logits.split(ROWS), target.split(ROWS), strict=True)
    return torch.stack([checkpoint(loss, *block, use_reentrant=False) for block in blocks]).sum()
