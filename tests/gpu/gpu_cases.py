"""How kernels on a GPU are compared: with fp64, and with what plain torch makes of the same inputs in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Function = Callable[..., tuple[Tensor | None, ...]]


def everything(function: Function, tensors: Tensors, **options: Any) -> list[Tensor]:
    """Outputs, and the gradients of a random functional of them with respect to all floating tensors."""
    leaves = {n: x.detach().clone().requires_grad_(x.is_floating_point()) for n, x in tensors.items()}
    outputs = [x for x in function(**leaves, **options) if x is not None and x.is_floating_point()]
    generator = torch.Generator(outputs[0].device).manual_seed(99)
    # rounded as the coarsest dtype has it, since what comes back is an input too
    weights = (torch.randn(x.shape, generator=generator, device=x.device).bfloat16() for x in outputs)
    total = sum((x * w.to(x.dtype)).sum(dtype=torch.float64) for x, w in zip(outputs, weights, strict=True))
    wanted = [x for x in leaves.values() if x.requires_grad]
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [x.detach() for x in outputs] + [
        torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)
    ]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """|found - truth| / |truth| of each tensor; what is nearly zero throughout counts as if of size 0.01."""
    sizes = [max(float(t.norm()), 1e-2 * t.numel() ** 0.5) for t in truth]
    return [float((f.double() - t).norm()) / n for f, t, n in zip(found, truth, sizes, strict=True)]


def check(ours: Function, torch_path: Function, tensors: Tensors, dtype: torch.dtype, **options: Any) -> None:
    """No tensor of `ours` is further from fp64 than twice what plain torch in fp32 is, both fed the same numbers.

    What plain torch returns in fp32 was never rounded to `dtype`. There ours, sums of terms that were, some of which
    cancel, may be off by three times its machine epsilon.
    """
    truth = everything(
        torch_path, {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}, **options
    )
    found = everything(ours, tensors, **options)
    mine, theirs = errors(found, truth), errors(everything(torch_path, tensors, **options), truth)
    least = [2e-5 if x.dtype == dtype else 3 * torch.finfo(dtype).eps for x in found]
    bounds = [max(2 * e, floor) for e, floor in zip(theirs, least, strict=True)]
    wrong = {i: (m, t) for i, (m, t, b) in enumerate(zip(mine, theirs, bounds, strict=True)) if not m <= b}
    assert not wrong, f"tensor: (error, that of plain torch): {wrong}"


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [x.contiguous().flatten().view(torch.uint8) for x in tensors]


def same(function: Function, tensors: Tensors, **options: Any) -> bool:
    """Whether two runs give the same bits."""
    first, second = (bits(everything(function, tensors, **options)) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
