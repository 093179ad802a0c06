"""From the masks and positions that a model hands its attention to what a mixer understands: which tokens are real, and
to which document each belongs.

A converted attention never needs the [T, T] mask: causality is its own. What remains is one bit a token (padding) and
the document boundaries, both O(T).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SurgeryError
from ..mixers.base import AttentionContext

BEYOND_PADDING = (
    "other than padding and documents, which linear attention in both directions cannot follow: pass the usual "
    "[batch, tokens] attention_mask, or use surgery.mode(model, 'teacher') for this call"
)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a fully converted model: [B, 1, 1, T] bool over the current tokens, None when all are real.

    Registered in transformers' AttentionMaskInterface, so it is called once a forward with the user's [B, seen + T]
    mask. Four dimensions mark it as ready made for whoever sees it next.
    """
    custom = kwargs.get("use_vmap") or getattr(mask_function, "__name__", "") == "or_mask"
    if custom or "allow_is_bidirectional_skip" in kwargs:
        raise SurgeryError(
            "this forward asks for an attention pattern that is not causal (bidirectional or image blocks), which a "
            "recurrence cannot follow: use plain causal inputs, or surgery.mode(model, 'teacher') for this call"
        )
    if attention_mask is None:
        return None
    if isinstance(q_offset, Tensor):
        index = q_offset + torch.arange(q_length, device=attention_mask.device)
        current = attention_mask.index_select(1, index.clamp(max=attention_mask.shape[1] - 1))
    else:
        current = attention_mask[:, q_offset : q_offset + q_length]
    if not torch.compiler.is_compiling() and bool(current.all()):
        return None
    return current[:, None, None, :]


def both_sides_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """`padding_mask` of encoders: [B, 1, 1, T] bool, None when all tokens are real."""
    if kwargs.get("use_vmap") or "allow_is_bidirectional_skip" not in kwargs:
        raise SurgeryError(f"this forward asks for an attention pattern {BEYOND_PADDING}")
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return None
    return attention_mask[:, None, None, :].bool()


class _OncePerForward:
    """Remembers the answer for the tensor seen last: all layers of a forward share one mask and one position tensor."""

    def __init__(self, function: Callable):
        self.function = function
        self.key: tuple | None = None
        self.tensor: Callable[[], Tensor | None] = lambda: None
        self.answer: Any = None

    def __call__(self, tensor: Tensor, *rest: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.function(tensor, *rest)
        key = (tensor._version if not tensor.is_inference() else 0, *rest)
        if self.tensor() is not tensor or self.key != key:
            self.answer = self.function(tensor, *rest)
            self.key, self.tensor = key, weakref.ref(tensor)
        return self.answer


def _real_tokens(mask: Tensor, length: int, seen: int, window: int | None) -> Tensor | None:
    """[B, T] bool from any mask a layer can receive; None when every token is real."""
    if mask.dim() == 2:
        real = mask[:, -length:].bool()
    elif mask.dim() == 4 and mask.shape[-2] == 1 and length > 1:
        real = mask[:, 0, 0, -length:].bool()
    elif mask.dim() == 4:
        keep = mask if mask.dtype == torch.bool else mask >= 0
        keep = keep[:, 0]
        start = min(seen, keep.shape[-1] - length)
        keep = keep[..., start : start + length]
        real = keep.diagonal(dim1=-2, dim2=-1)
        if length > 1 and not torch.compiler.is_compiling():
            _check_causal(keep, real, window)
    else:
        raise SurgeryError(
            f"a converted attention was given a mask of type {type(mask).__name__} and {mask.dim()} dimensions, which "
            "it cannot read: pass the usual [batch, tokens] attention_mask"
        )
    if not torch.compiler.is_compiling() and bool(real.all()):
        return None
    return real


def _is_causal(keep: Tensor, real: Tensor, document: Tensor, window: int | None) -> bool:
    length = keep.shape[-1]
    row = torch.arange(length, device=keep.device)
    causal = row[:, None] >= row
    if window is not None:
        causal &= row[:, None] - row < window
    block = document[:, :, None] == document[:, None, :]
    return bool((keep == (causal & real[:, None, :] & block))[real].all())


def _check_causal(keep: Tensor, real: Tensor, window: int | None) -> None:
    if not _is_causal(keep, real, _document_index(keep, real), window):
        raise SurgeryError(
            "a converted attention was given a 4-dimensional mask that is not causal over real tokens, which a "
            "recurrence cannot follow: pass the usual [batch, tokens] attention_mask, with position_ids for packed "
            "documents"
        )


def _document_index(keep: Tensor, real: Tensor) -> Tensor:
    """[B, T] int64, a new document wherever a real token does not see the real one before it."""
    joined = keep.diagonal(offset=-1, dim1=-2, dim2=-1)
    starts = torch.nn.functional.pad(~joined & real[:, 1:] & real[:, :-1], (1, 0))
    return starts.cumsum(-1)


def _documents(position_ids: Tensor, batch: int) -> Tensor | None:
    """[B, T] int64 document of each token, from positions that do not count up by one; None when all do."""
    starts = torch.nn.functional.pad(position_ids[:, 1:] - position_ids[:, :-1] != 1, (1, 0))
    if not torch.compiler.is_compiling() and not bool(starts.any()):
        return None
    return starts.cumsum(-1).expand(batch, -1)


def _both_sides(mask: Tensor, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Real tokens and documents, [B, T] bool and int64, from any mask an encoder's layer can receive."""
    if mask.dim() == 2 or (mask.dim() == 4 and mask.shape[-2] == 1):
        real = mask.reshape(mask.shape[0], mask.shape[-1])
        return real >= 0 if mask.is_floating_point() else real.bool(), None
    keep = (mask >= 0 if mask.is_floating_point() else mask.bool())[:, 0]
    real = keep.diagonal(dim1=-2, dim2=-1)
    if torch.compiler.is_compiling():
        return real, None
    documents = _document_index(keep, real)
    block = documents[:, :, None] == documents[:, None, :]
    if not bool((keep == (real[:, None, :] & block))[real].all()):
        raise SurgeryError(f"a converted attention was given a 4-dimensional mask {BEYOND_PADDING}")
    return None if bool(real.all()) else real, documents if bool(documents.any()) else None


_both_sides_once = _OncePerForward(_both_sides)
_real_tokens_once = _OncePerForward(_real_tokens)
_documents_once = _OncePerForward(_documents)


def read_padding(mask: Any, length: int, seen: int | Tensor, window: int | None) -> Tensor | None:
    """[B, T] bool, True at real tokens, from the mask a layer received; None: no padding.

    Raises:
        SurgeryError: a mask that is not causal, or of a kind that cannot be read (flex attention's BlockMask).
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise SurgeryError(
            f"a converted attention cannot read a {type(mask).__name__}: load the model with attn_implementation='sdpa'"
        )
    if isinstance(seen, Tensor):
        # a static cache masks all its columns; where the current ones are is known on the device only
        if mask.dim() == 4 and mask.shape[-2] == length and mask.shape[-1] != length:
            keep = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0]
            column = (seen + torch.arange(length, device=mask.device)).clamp(max=keep.shape[-1] - 1)
            return keep.gather(-1, column.expand(keep.shape[0], -1)[..., None])[..., 0]
        seen = 0
    return _real_tokens_once(mask, length, seen, window)


def read_both_sides(mask: Any, length: int) -> tuple[Tensor | None, Tensor | None]:
    """[B, T], twice, from the mask an encoder's layer received: True at real tokens, and the document of each.

    None: all are real; one document a row.

    Raises:
        SurgeryError: a mask of any other pattern, or of a kind that cannot be read.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] != length:
        raise SurgeryError(
            f"a converted attention cannot read this {type(mask).__name__} as a mask: load the model with "
            "attn_implementation='sdpa' and pass the usual [batch, tokens] attention_mask"
        )
    return _both_sides_once(mask, length)


def read_documents(position_ids: Tensor | None, cu_seqlens: Tensor | None, batch: int, length: int) -> Tensor | None:
    """[B, T] int64, the document of each token of a packed row; None: one document a row."""
    if length == 1:
        return None
    if cu_seqlens is not None:
        starts = torch.zeros(length + 1, dtype=torch.int64, device=cu_seqlens.device)
        starts = starts.index_add(0, cu_seqlens[1:-1].long(), torch.ones_like(cu_seqlens[1:-1], dtype=torch.int64))
        return starts[:length].cumsum(0).expand(batch, -1)
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != length:
        return None
    return _documents_once(position_ids, batch)


def read_causal(mask: Tensor | None, batch: int, name: str) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens are real, [B, T] bool, and their documents, [B, T] int64; None: all are, and there is one a row.

    mask: of `scaled_dot_product_attention`, [..., T, T], True or 0 where attention goes. name: of the module it is for.

    Raises:
        SurgeryError: it is not causal over real tokens, differs by head, or adds a bias to scores.
    """
    if mask is None:
        return None, None
    real, documents, problem = _read_causal_once(mask)
    if problem:
        raise SurgeryError(f"{name} {problem}")
    return None if real is None else real.expand(batch, -1), None if documents is None else documents.expand(batch, -1)


@torch.compiler.disable
def _read_causal(mask: Tensor) -> tuple[Tensor | None, Tensor | None, str]:
    if mask.dtype != torch.bool:
        # half of the smallest number is still none that a bias would have
        if not bool(((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            return None, None, "adds a bias to its scores by a mask, which mixers do not have"
        mask = mask == 0
    heads = mask.reshape(-1, *mask.shape[-3:]) if mask.dim() > 2 else mask[None, None]
    keep = heads[:, 0]
    real = keep.diagonal(dim1=-2, dim2=-1)
    square = keep.shape[-1] == keep.shape[-2]
    documents = _document_index(keep, real) if square else real
    if not square or not bool((heads == heads[:, :1]).all()) or not _is_causal(keep, real, documents, None):
        problem = (
            "was given a mask that is not causal over real tokens in all heads, which a recurrence cannot follow: pass "
            "a causal one, with whole columns blocked for padding, or leave this layer out (layers=...)"
        )
        return None, None, problem
    return None if bool(real.all()) else real, documents if bool(documents.any()) else None, ""


_read_causal_once = _OncePerForward(_read_causal)


def compact(context: AttentionContext, real: Tensor | None) -> tuple[AttentionContext, Callable[[Tensor], Tensor]]:
    """Move the real tokens of each row to its front, where padding cannot touch them; and the way back.

    A left-padded row then runs through the very same chunks as the row alone.
    """
    if real is None:
        return context, lambda output: output
    lengths = real.sum(-1)
    if real.shape[1] == 1:
        return replace(context, lengths=lengths), lambda output: output
    order = torch.argsort((~real).to(torch.uint8), dim=-1, stable=True)
    back = torch.argsort(order, dim=-1)

    def take(tensor: Tensor, index: Tensor) -> Tensor:
        return tensor.gather(1, index.view(*index.shape, *[1] * (tensor.dim() - 2)).expand_as(tensor))

    compacted = replace(context.map(lambda tensor: take(tensor, order)), lengths=lengths)
    return compacted, lambda output: take(output, back)
