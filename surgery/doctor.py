"""What `surgery doctor` finds out: versions, hardware, and whether every kernel computes what its reference says."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("torch", "triton", "transformers", "peft", "lightning", "numpy")
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative error of outputs against the reference in fp64, by the dtype of the inputs; of gradients twice that."""

BAD_COMPILERS = (
    (
        "sm_90",
        ((3, 4), (3, 7)),
        "its assembler reuses registers of tensor-core operands that are still being read, in loops of one stage over "
        "narrow tiles: the kernels shipped here avoid these, others may compute nonsense",
    ),
)
"""GPU, versions of Triton from and before, and what is wrong with the pair."""


@dataclass(frozen=True)
class Check:
    """One op on one backend in one dtype.

    error: the largest difference over the largest output; None: it could not run, and `note` says why.
    gradient: the same of the gradients of a sum over the outputs, against chunked torch in fp64; None: there are none.
    speedup: on a GPU, how many times as fast as chunked torch, forward and backward, on a larger call.
    """

    op: str
    backend: str
    device: str
    dtype: str
    error: float | None
    allowed: float
    note: str = ""
    gradient: float | None = None
    speedup: float | None = None

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= self.allowed and (self.gradient or 0) <= 2 * self.allowed


def environment() -> dict[str, str]:
    """Name -> version of what this package stands on, and the GPUs."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["CUDA of torch"] = torch.version.cuda or "none (CPU build)"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        name = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        found[f"GPU {index}"] = name
    return found if torch.cuda.is_available() else {**found, "GPU": "none: kernels run as chunked torch on the CPU"}


def warnings() -> list[str]:
    """What is known to be wrong with compilers found here."""
    import importlib.util

    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return []
    numbers = version("triton").split(".")
    triton, sm = (int(numbers[0]), int(numbers[1])), "sm_{}{}".format(*torch.cuda.get_device_capability())
    return [
        f"Triton {version('triton')} on {sm}: {why}"
        for gpu, (since, before), why in BAD_COMPILERS
        if gpu == sm and since <= triton < before
    ]


def check_kernels(ops: Mapping[str, Any] | None = None) -> Iterator[Check]:
    """Run every backend of every op on its own small example and compare it with the reference.

    ops: name -> op; by default `surgery.kernels.OPS`.
    """
    if ops is None:
        from . import kernels

        ops = getattr(kernels, "OPS", {})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, op in ops.items():
        for backend in ("chunked", "triton"):
            run = getattr(op, backend, None)
            if run is None or (backend == "triton" and device == "cpu"):
                continue
            for dtype, allowed in ALLOWED.items():
                dtype_name = str(dtype).removeprefix("torch.")
                yield _check(Check(name, backend, device, dtype_name, None, allowed), op, run, device, dtype)


def _check(blank: Check, op: Any, run: Any, device: str, dtype: torch.dtype) -> Check:
    torch.manual_seed(0)
    inputs = op.example(device=device, dtype=dtype)
    try:
        found, gradients = _run(run, inputs)
        with torch.no_grad():
            error = relative_error(found, _tensors(op.reference(**_exact(inputs))))
        # backward through a loop over tokens would take minutes
        gradient = relative_error(gradients, _run(op.chunked, _exact(inputs))[1]) if gradients else None
        fast = blank.backend == "triton" and dtype.itemsize == 2
        speedup = _seconds(op.chunked, inputs) / _seconds(run, inputs) if fast else None
    except Exception as failure:  # a backend may fail in any way, and the others are still worth trying
        first_line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        return replace(blank, note=first_line)
    return replace(blank, error=error, gradient=gradient, speedup=speedup)


def _run(run: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the sum of the first with respect to its [B, T, H, D] inputs."""
    leaves = {n: x.detach().requires_grad_() if _sequence(x) else x for n, x in inputs.items()}
    with torch.enable_grad():
        outputs = _tensors(run(**leaves))
        wanted = [x for x in leaves.values() if _sequence(x)]
        if not wanted or not outputs[0].requires_grad:
            return outputs, []
        # the sum alone would be the same for all weights that add up to one
        weights = torch.linspace(-1, 1, outputs[0].numel(), device=outputs[0].device, dtype=torch.float64)
        total = (outputs[0].double() * weights.view(outputs[0].shape)).sum()
        return [x.detach() for x in outputs], list(torch.autograd.grad(total, wanted, materialize_grads=True))


def _sequence(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 4


def _seconds(run: Any, inputs: dict[str, Any], tokens: int = 4096) -> float:
    """Of one forward and backward over so many tokens, the example's repeated."""

    def longer(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim < 3 or x.shape[1] != inputs["q"].shape[1]:
            return x
        return x.repeat(1, tokens // x.shape[1] + 1, *[1] * (x.ndim - 2))[:, :tokens]

    call = {name: longer(x) for name, x in inputs.items()}
    _run(run, call)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(3):
        _run(run, call)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / 3


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over the largest expected value, over all outputs; infinite when anything is not finite.

    Raises:
        ValueError: the outputs differ in number.
    """
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.numel() == 0:
            continue
        if not bool(torch.isfinite(ours).all()):
            return float("inf")
        scale = theirs.abs().max().double().clamp_min(1e-12)
        worst = max(worst, float((ours.double() - theirs.double()).abs().max() / scale))
    return worst


def _exact(value: Any) -> Any:
    """The same arguments with every real number in fp64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _exact(part) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [_exact(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return [found for part in value or () for found in _tensors(part)]
