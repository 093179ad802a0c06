"""The states of the operations before any token."""

from __future__ import annotations

import torch

from .specs import State, Window


def linear_state(
    batch: int,
    heads: int,
    features: int,
    head_dim: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    normalized: bool = True,
) -> State:
    """S [B, H_s, F, D] and, for operations with a normaliser, z [B, H_s, F]; fp32 (fp64 when `dtype` is)."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    state = {"S": torch.zeros(batch, heads, features, head_dim, device=device, dtype=dtype)}
    if normalized:
        state["z"] = torch.zeros(batch, heads, features, device=device, dtype=dtype)
    return state


def slot_state(
    batch: int, heads: int, slots: int, head_dim: int, *, device: torch.device | str, dtype: torch.dtype
) -> State:
    """slot_k, slot_v [B, H_kv, M, D]; fp32 (fp64 when `dtype` is)."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: torch.zeros(batch, heads, slots, head_dim, device=device, dtype=dtype) for name in ("slot_k", "slot_v")
    }


def mesa_state(
    batch: int, heads: int, head_dim: int, value_dim: int, *, device: torch.device | str, dtype: torch.dtype
) -> State:
    """H [B, H_kv, D, D] and S [B, H_kv, D, D_v]; fp32 (fp64 when `dtype` is)."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = {"H": head_dim, "S": value_dim}
    return {name: torch.zeros(batch, heads, head_dim, n, device=device, dtype=dtype) for name, n in sizes.items()}


def window_state(
    batch: int,
    window: Window,
    heads: int,
    head_dim: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    linear_k: bool = False,
) -> State:
    """The ring and the sinks [B, R or s, H_kv, D] in `dtype`, and `seen` [B]."""
    sizes = {"ring_k": window.ring, "ring_v": window.ring}
    if linear_k:
        sizes["ring_linear_k"] = window.ring
    if window.sinks:
        sizes |= {"sink_k": window.sinks, "sink_v": window.sinks}
    state = {
        name: torch.zeros(batch, size, heads, head_dim, device=device, dtype=dtype) for name, size in sizes.items()
    }
    return state | {"seen": torch.zeros(batch, device=device, dtype=torch.int64)}


def split_state(state: State) -> tuple[State, State]:
    """What windows need to see exact keys, `seen` among it; and the history: everything else that is carried."""
    parts: tuple[State, State] = ({}, {})
    for name, tensor in state.items():
        parts[name != "seen" and not name.startswith(("ring_", "sink_"))][name] = tensor
    return parts
