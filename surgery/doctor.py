"""What `surgery doctor` finds out: versions, hardware, and whether every kernel computes what its reference says."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("torch", "triton", "transformers", "peft", "lightning", "numpy")
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative error against the reference in fp64, by the dtype of the inputs."""


@dataclass(frozen=True)
class Check:
    """One op on one backend in one dtype.

    error: the largest difference over the largest output; None: it could not run, and `note` says why.
    """

    op: str
    backend: str
    device: str
    dtype: str
    error: float | None
    allowed: float
    note: str = ""

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= self.allowed


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
        with torch.no_grad():
            error = relative_error(_tensors(run(**inputs)), _tensors(op.reference(**_exact(inputs))))
    except Exception as failure:  # a backend may fail in any way, and the others are still worth trying
        first_line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        return Check(**{**vars(blank), "note": first_line})
    return Check(**{**vars(blank), "error": error})


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
