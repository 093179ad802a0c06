"""Losses of a model on token ids, one a token, and what surrounds a measurement."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SurgeryError

CHUNK = 2**26
"""Logits turned to fp32 at a time (256 MiB): the vocabulary of one token may be 128k."""


def token_nll(model: nn.Module, ids: Tensor, cache: Any = None) -> Tensor:
    """Losses [B, T - 1] in fp64 on the CPU of tokens 2..T of ids [B, T], after what `cache` holds, which moves on."""
    logits = forward(model, ids, cache)[:, :-1]
    return torch.cat([_nll(part, target) for part, target in _chunks(logits, ids[:, 1:])], 1).double().cpu()


def token_scores(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and [B, T - 1] booleans on the CPU: whether the token is the likeliest. The last is only predicted."""
    target = ids[:, 1:]
    found = [(_nll(part, at), part.argmax(-1) == at) for part, at in _chunks(forward(model, ids[:, :-1]), target)]
    nll, right = (torch.cat(parts, 1).cpu() for parts in zip(*found, strict=True))
    return nll.double(), right


def forward(model: nn.Module, ids: Tensor, cache: Any = None) -> Tensor:
    """Logits [B, T, V], after what `cache` holds, which moves on."""
    arguments = {"use_cache": False} if cache is None else {"use_cache": True, cache_argument(model): cache}
    return model(input_ids=ids, **arguments).logits


def _chunks(logits: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [B, t, V] in fp32 and the tokens [B, t] they are for, some positions at a time."""
    step = max(1, CHUNK // (logits.shape[0] * logits.shape[2]))
    for part, at in zip(logits.split(step, 1), target.split(step, 1), strict=True):
        yield part.float(), at


def _nll(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)


def cache_argument(model: nn.Module) -> str:
    """Under which name this version of transformers takes the cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def new_cache(model: nn.Module) -> Any:
    """An empty cache that grows."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def real_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, T] bool: tokens that are no padding."""
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    return torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.dim() != 2 else mask.bool()


def compare(logits: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """[2] fp64: sums over real tokens of the KL divergence from the teacher, and of the loss of the next token."""
    real = real_tokens(inputs)
    labels = nn.functional.pad(inputs["input_ids"].masked_fill(~real, -100)[:, 1:], (0, 1), value=-100)
    found = torch.zeros(2, dtype=torch.float64, device=logits.device)
    rows = max(1, CHUNK // logits.shape[-1])
    parts = zip(logits[real].split(rows), teacher[real].split(rows), labels[real].split(rows), strict=True)
    for student, wanted, label in parts:
        log_p, log_q = student.float().log_softmax(-1), wanted.float().log_softmax(-1)
        found[0] += (log_q.exp() * (log_q - log_p)).sum(dtype=torch.float64)
        found[1] += nn.functional.nll_loss(log_p, label, reduction="sum").double()
    return found


@contextmanager
def measuring(model: nn.Module) -> Iterator[torch.device]:
    """No gradients, every module in eval mode until the end; gives the model's device."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module in training:
            module.training = True


def check_length(model: nn.Module, length: int, copy_tokens: int) -> None:
    """Refuse more tokens than the model has learned positions for.

    Raises:
        SurgeryError: see above, or a window of fewer than 2 tokens.
    """
    if length < 2:
        raise SurgeryError(f"a window of {length} tokens has nothing to predict: give a length of at least 2")
    longest, what = max((length, f"a length of {length}"), (1 + 2 * copy_tokens, f"two copies of {copy_tokens} tokens"))
    for path, module in model.named_modules():
        learned = isinstance(module, nn.Embedding) and path.rpartition(".")[2] in ("wpe", "embed_positions")
        if learned and longest > module.num_embeddings:
            raise SurgeryError(f"the model has learned {module.num_embeddings} positions: {what} is too much for it")
