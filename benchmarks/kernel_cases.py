"""What `benchmarks.kernels` measures: for every operation its inputs, ours by backend, its peers and shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import peers
from surgery import kernels
from surgery.kernels import Features, LogMass, Window

SIZE = 64
"""Tokens of a window."""
Inputs = dict[str, Any]
Function = Callable[..., Tensor]
IDENTITY = {"features_q": Features("identity"), "features_k": Features("identity")}


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.tokens} H{self.heads}/{self.kv_heads} D{self.dim}"


MAIN = [Shape(4, 8192, 32, 32, d) for d in (64, 128)]
GROUPED = [Shape(4, 8192, 32, 8, d) for d in (64, 128)]
OTHERS = [Shape(16, 2048, 32, 32, 128), Shape(1, 32768, 32, 32, 128), Shape(4, 32768, 32, 8, 128)]
ENCODERS = [Shape(b, t, h, h, 64) for b, h in ((1, 8), (4, 16)) for t in (4096, 8192, 16384)]
# self-attention of Stable Diffusion at 1024² and 2048² pixels
IMAGES = [Shape(1, t, h, h, d) for t in (16384, 65536) for h, d in ((8, 40), (8, 64), (10, 64), (20, 64))]
HARD = [Shape(1, 1024, 8, 8, 64), Shape(2, 4096, 16, 16, 256)]


def qkv(s: Shape, dtype: torch.dtype) -> Inputs:
    heads = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
    return {n: torch.randn(s.batch, s.tokens, h, s.dim, device="cuda", dtype=dtype) for n, h in heads.items()}


def positive_inputs(s: Shape, dtype: torch.dtype) -> Inputs:
    inputs = qkv(s, dtype)
    return inputs | {"q": inputs["q"].sigmoid(), "k": inputs["k"].sigmoid()}


def linear_inputs(s: Shape, dtype: torch.dtype) -> Inputs:
    inputs = qkv(s, dtype)
    return inputs | {"q": inputs["q"] * s.dim**-0.5}


def with_gate(kind: str) -> Callable[[Shape, torch.dtype], Inputs]:
    def build(s: Shape, dtype: torch.dtype) -> Inputs:
        sizes = {"fixed": (s.kv_heads,), "scalar": (s.batch, s.tokens, s.kv_heads)}
        sizes["slots"] = (s.batch, s.tokens, s.kv_heads, SIZE)
        size = sizes.get(kind, (s.batch, s.tokens, s.kv_heads, s.dim))
        gate = functional.logsigmoid(torch.randn(size, device="cuda") + 2) / 16
        return linear_inputs(s, dtype) | {"gate": gate.to(dtype) if gate.ndim == 4 else gate}

    return build


def average_inputs(s: Shape, dtype: torch.dtype) -> Inputs:
    return {name: x for name, x in with_gate("channel")(s, dtype).items() if name != "k"}


def delta_inputs(kind: str = "none") -> Callable[[Shape, torch.dtype], Inputs]:
    def build(s: Shape, dtype: torch.dtype) -> Inputs:
        inputs = qkv(s, dtype)
        unit = {n: functional.normalize(inputs[n].float(), dim=-1).to(dtype) for n in "qk"}
        beta = torch.randn(s.batch, s.tokens, s.kv_heads, device="cuda").sigmoid()
        gate = {} if kind == "none" else {"gate": with_gate(kind)(s, torch.float32)["gate"]}
        return inputs | unit | {"beta": beta} | gate

    return build


def hybrid_inputs(s: Shape, dtype: torch.dtype) -> Inputs:
    maps = [torch.randn(h, s.dim, s.dim // 2, device="cuda") * s.dim**-0.5 for h in (s.heads, s.kv_heads)]
    sizes = ((s.heads, s.dim), (s.heads,), (s.kv_heads, s.dim), (s.kv_heads,))
    mass = tuple(torch.randn(size, device="cuda") * 0.1 for size in sizes)
    return qkv(s, dtype) | {"map_q": maps[0], "map_k": maps[1], "mass": mass}


def decayed(backend: str, normalize: bool = False) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
        if backend == "triton":
            from surgery.kernels.triton import channel_attention, decay_attention

            if gate is not None and gate.ndim == 4:
                return channel_attention(q, k, v, log_gate=gate, normalize=normalize)[0]
            return decay_attention(q, k, v, log_decay=gate, normalize=normalize)[0]
        if gate is None:
            gate = torch.zeros(k.shape[:3], device=k.device, dtype=q.dtype)
        gate = gate.expand(*k.shape[:2], -1) if gate.ndim == 1 else gate
        op = getattr(kernels.gated_linear_attention, backend)
        return op(q, k, v, gate, normalize=normalize, **IDENTITY)[0]

    return run


def averaged(backend: str) -> Function:
    run = decayed(backend)
    return lambda q, v, gate: run(q, -torch.expm1(gate).to(v.dtype), v, gate)


def slotted(backend: str) -> Function:
    return lambda q, k, v, gate: getattr(kernels.gated_slot_attention, backend)(q, k, v, gate, scaling=1.0)[0]


def both_directions(backend: str) -> Function:
    return lambda q, k, v: getattr(kernels.bidirectional_attention, backend)(q, k, v, **IDENTITY)


def delta(backend: str) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None = None) -> Tensor:
        if backend == "triton":
            from surgery.kernels.triton import channel_delta_rule, delta_rule

            if gate is not None and gate.ndim == 4:
                return channel_delta_rule(q, k, v, beta, log_gate=gate)[0]
            return delta_rule(q, k, v, beta, log_decay=gate)[0]
        return getattr(kernels.delta_attention, backend)(q, k, v, beta, gate, unit=False, **IDENTITY)[0]

    return run


def windowed(backend: str) -> Function:
    return lambda q, k, v: getattr(kernels.window_attention, backend)(
        q, k, v, window=Window(SIZE), scaling=q.shape[-1] ** -0.5
    )[0]


def hybrid(backend: str) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, map_q: Tensor, map_k: Tensor, mass: tuple[Tensor, ...]) -> Tensor:
        return getattr(kernels.hybrid_attention, backend)(
            q, k, v, features_q=Features("hedgehog", map_q), features_k=Features("hedgehog", map_k), mix=LogMass(*mass),
            window=Window(SIZE), scaling=q.shape[-1] ** -0.5,
        )[0]  # fmt: skip

    return run


def liger(backend: str) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gate, softmax = functional.logsigmoid(k) / 16, Features("softmax")
        op = getattr(kernels.gated_linear_attention, backend)
        far = op(q, k, v, gate, features_q=softmax, features_k=softmax)[0]
        return torch.lerp(far, windowed(backend)(q, k, v), 0.5)

    return run


@dataclass(frozen=True)
class Case:
    """One operation: its inputs, ours by backend, and its peers by name, made for a shape."""

    inputs: Callable[[Shape, torch.dtype], Inputs]
    ours: Callable[[str], Function]
    peers: dict[str, Callable[[Shape], Function]]
    shapes: list[Shape]


SDPA = "SDPA flash, full attention"
FULL = {SDPA: lambda s: peers.flash}
SUMS = {"composition": lambda s: peers.sums, "compiled composition": lambda s: torch.compile(peers.sums)}
CASES = {
    "linear": Case(
        linear_inputs, decayed, {"fla chunk_linear_attn": lambda s: peers.linear} | FULL, MAIN + OTHERS + HARD
    ),
    "linear normalised": Case(
        positive_inputs,
        partial(decayed, normalize=True),
        {"fla chunk_linear_attn, normalised": lambda s: peers.normalised},
        MAIN,
    ),
    "lightning": Case(
        with_gate("fixed"), decayed, {"fla chunk_simple_gla(g_gamma)": lambda s: peers.lightning}, MAIN + GROUPED
    ),
    "scalar decay": Case(
        with_gate("scalar"), decayed, {"fla fused_chunk_simple_gla": lambda s: peers.scalar}, MAIN + GROUPED
    ),
    "gla": Case(with_gate("channel"), decayed, {"fla chunk_gla": lambda s: peers.channel}, MAIN + GROUPED),
    "hgrn2": Case(average_inputs, averaged, {"fla chunk_gla": lambda s: peers.averages}, MAIN + GROUPED),
    "gsa": Case(with_gate("slots"), slotted, {"fla chunk_gsa": lambda s: peers.slots}, MAIN + GROUPED),
    "delta": Case(delta_inputs(), delta, {"fla chunk_delta_rule": lambda s: peers.delta}, MAIN + GROUPED),
    "gated delta": Case(
        delta_inputs("scalar"), delta, {"fla chunk_gated_delta_rule": lambda s: peers.gated_delta}, MAIN + GROUPED
    ),
    "kda": Case(delta_inputs("channel"), delta, {"fla chunk_kda": lambda s: peers.kda}, MAIN + GROUPED),
    "window": Case(qkv, windowed, {"FlexAttention": lambda s: peers.window(SIZE, s.tokens)} | FULL, MAIN + GROUPED),
    "hybrid": Case(
        hybrid_inputs,
        hybrid,
        {
            "eager composition": lambda s: peers.Hybrid(SIZE, s.tokens, False),
            "compiled composition": lambda s: peers.Hybrid(SIZE, s.tokens, True),
        }
        | FULL,
        MAIN + GROUPED + OTHERS,
    ),
    "bidirectional": Case(
        positive_inputs, both_directions, SUMS | {SDPA: lambda s: peers.flash_both}, ENCODERS + IMAGES
    ),
    "liger": Case(qkv, liger, {"composition": lambda s: peers.Liger(SIZE, s.tokens)}, GROUPED),
}
