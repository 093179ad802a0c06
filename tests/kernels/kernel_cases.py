"""Calls of every operation in every form, of any shape, and ways to compare what they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from surgery import kernels
from surgery.kernels import Features, Joint, LogMass, Window, linear_state, mesa_state, slot_state, window_state

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a call."""

    tokens: int
    heads: int = 2
    kv_heads: int = 1
    dim: int = 8
    batch: int = 2

    def __str__(self) -> str:
        return f"T{self.tokens}-H{self.heads}:{self.kv_heads}-D{self.dim}"


class Draw:
    """Random tensors of one shape, dtype and seed."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        self.shape, self.dtype = shape, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)

    def parameter(self, *size: int) -> Tensor:
        return self(*size, dtype=torch.promote_types(self.dtype, torch.float32))

    def tokens(self, heads: int) -> Tensor:
        s = self.shape
        return self(s.batch, s.tokens, heads, s.dim)

    def qkv(self) -> Arguments:
        s = self.shape
        return {"q": self.tokens(s.heads), "k": self.tokens(s.kv_heads), "v": self.tokens(s.kv_heads)}

    def maps(self, per_head: bool = False, features: int | None = None) -> Arguments:
        s = self.shape
        size = s.dim, features or s.dim
        k_heads = s.heads if per_head else s.kv_heads
        return {
            "features_q": Features("hedgehog", self.parameter(s.heads, *size)),
            "features_k": Features("hedgehog", self.parameter(k_heads, *size)),
        }

    def joint(self) -> Joint:
        return Joint(self.parameter(self.shape.heads).sigmoid())

    def log_mass(self, per_head: bool = False) -> LogMass:
        s = self.shape
        k_heads = s.heads if per_head else s.kv_heads
        sizes = (s.heads, s.dim), (s.heads,), (k_heads, s.dim), (k_heads,)
        return LogMass(*(self.parameter(*size) for size in sizes))


def linear(draw: Draw, per_head: bool = False) -> Arguments:
    return draw.qkv() | draw.maps(per_head)


def fixed(draw: Draw, name: str) -> Arguments:
    return draw.qkv() | {"features_q": Features(name), "features_k": Features(name)}


def gated(draw: Draw, scalar: bool = False, normalize: bool = False, per_head: bool = False) -> Arguments:
    s = draw.shape
    maps = draw.maps(True) if per_head else {"features_q": Features("softmax"), "features_k": Features("softmax")}
    size = (s.batch, s.tokens, s.kv_heads) if scalar else (s.batch, s.tokens, s.kv_heads, s.dim * (1 + per_head))
    gate = torch.nn.functional.logsigmoid(3 * draw.parameter(*size))
    return draw.qkv() | maps | {"log_gate": gate, "normalize": normalize, "scale": 0.7}


def delta(draw: Draw, gate: str | None = None, per_head: bool = False, unit: bool = True) -> Arguments:
    s = draw.shape
    names = ("silu", "silu") if unit else ("softmax", "softmax")
    maps = draw.maps(True) if per_head else dict(zip(("features_q", "features_k"), map(Features, names), strict=True))
    arguments = draw.qkv() | maps | {"unit": unit, "scale": 0.7}
    arguments["beta"] = draw.parameter(s.batch, s.tokens, s.kv_heads).sigmoid() * (1 + unit)
    if gate is not None:
        size = (s.batch, s.tokens, s.kv_heads, s.dim * (1 + per_head))[: 3 if gate == "scalar" else 4]
        arguments["log_gate"] = torch.nn.functional.logsigmoid(3 * draw.parameter(*size))
    return arguments


def slots(draw: Draw, count: int) -> Arguments:
    s = draw.shape
    gate = torch.nn.functional.logsigmoid(3 * draw.parameter(s.batch, s.tokens, s.kv_heads, count))
    return draw.qkv() | {"log_gate": gate, "scaling": s.dim**-0.5}


def mesa(draw: Draw) -> Arguments:
    s = draw.shape
    gate = torch.nn.functional.logsigmoid(2 + 2 * draw.parameter(s.batch, s.tokens, s.kv_heads))
    ridge = 0.25 + draw.parameter(s.kv_heads, s.dim).square()
    return draw.qkv() | {"log_gate": gate, "ridge": ridge, "steps": 2 * s.dim}


def window(draw: Draw, form: Window, softcap: float | None = None) -> Arguments:
    return draw.qkv() | {"window": form, "scaling": draw.shape.dim**-0.5, "softcap": softcap}


def hybrid(
    draw: Draw,
    form: Window,
    mix: str = "joint",
    per_head: bool = False,
    raw: bool = False,
    softcap: float | None = None,
) -> Arguments:
    s = draw.shape
    arguments = window(draw, form, softcap) | draw.maps(per_head, features=s.dim - 2)
    arguments["mix"] = draw.joint() if mix == "joint" else draw.log_mass(per_head)
    if raw:
        arguments |= {"linear_q": draw.tokens(s.heads), "linear_k": draw.tokens(s.kv_heads)}
    return arguments


SLIDING, TERRACED = Window(7), Window(6, "terraced")
SINKS, TERRACED_SINKS = Window(5, sinks=3), Window(4, "terraced", sinks=2)

FORMS: dict[str, tuple[str, Callable[[Draw], Arguments]]] = {
    "linear": ("linear_attention", linear),
    "linear-per-head": ("linear_attention", lambda d: linear(d, True)),
    "linear-taylor2": ("linear_attention", lambda d: fixed(d, "taylor2")),
    "gated-channel": ("gated_linear_attention", gated),
    "gated-scalar": ("gated_linear_attention", lambda d: gated(d, scalar=True)),
    "gated-normalized": ("gated_linear_attention", lambda d: gated(d, normalize=True)),
    "gated-per-head": ("gated_linear_attention", lambda d: gated(d, per_head=True)),
    "delta": ("delta_attention", delta),
    "delta-scalar": ("delta_attention", lambda d: delta(d, "scalar")),
    "delta-channel": ("delta_attention", lambda d: delta(d, "channel")),
    "delta-per-head": ("delta_attention", lambda d: delta(d, "channel", per_head=True)),
    "delta-plain": ("delta_attention", lambda d: delta(d, "scalar", unit=False)),
    "slots": ("gated_slot_attention", lambda d: slots(d, 5)),
    "mesa": ("mesa_attention", mesa),
    "window-sliding": ("window_attention", lambda d: window(d, SLIDING)),
    "window-one": ("window_attention", lambda d: window(d, Window(1))),
    "window-terraced": ("window_attention", lambda d: window(d, TERRACED)),
    "window-sinks": ("window_attention", lambda d: window(d, SINKS)),
    "window-many-sinks": ("window_attention", lambda d: window(d, Window(3, sinks=9))),
    "window-terraced-sinks": ("window_attention", lambda d: window(d, TERRACED_SINKS)),
    "window-block": ("window_attention", lambda d: window(d, Window(6, "block", sinks=2))),
    "window-softcap": ("window_attention", lambda d: window(d, SLIDING, softcap=0.8)),
    "joint-sliding": ("hybrid_attention", lambda d: hybrid(d, SLIDING)),
    "joint-wide": ("hybrid_attention", lambda d: hybrid(d, Window(70))),
    "joint-terraced": ("hybrid_attention", lambda d: hybrid(d, TERRACED)),
    "joint-block": ("hybrid_attention", lambda d: hybrid(d, Window(6, "block"))),
    "joint-terraced-wide": ("hybrid_attention", lambda d: hybrid(d, Window(40, "terraced"))),
    "joint-sinks": ("hybrid_attention", lambda d: hybrid(d, SINKS)),
    "joint-terraced-sinks": ("hybrid_attention", lambda d: hybrid(d, TERRACED_SINKS)),
    "joint-per-head": ("hybrid_attention", lambda d: hybrid(d, SINKS, per_head=True)),
    "joint-raw": ("hybrid_attention", lambda d: hybrid(d, SINKS, raw=True)),
    "joint-softcap": ("hybrid_attention", lambda d: hybrid(d, SLIDING, softcap=0.8)),
    "logmass-sliding": ("hybrid_attention", lambda d: hybrid(d, SLIDING, "logmass")),
    "logmass-terraced-sinks": ("hybrid_attention", lambda d: hybrid(d, TERRACED_SINKS, "logmass")),
    "logmass-per-head": ("hybrid_attention", lambda d: hybrid(d, SINKS, "logmass", per_head=True)),
    "logmass-raw": ("hybrid_attention", lambda d: hybrid(d, SINKS, "logmass", raw=True)),
}


@dataclass(frozen=True)
class Call:
    """One form at one shape. `rows` and `span` cut the same call into smaller ones."""

    op: kernels.Op
    arguments: Arguments

    @classmethod
    def of(cls, form: str, shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> Call:
        name, build = FORMS[form]
        return cls(kernels.OPS[name], build(Draw(shape, dtype, seed)))

    def run(self, backend: str = "chunked", **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return getattr(self.op, backend)(**{**self.arguments, "return_state": True, **changes})

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """`function` applied to every tensor that runs along rows and tokens."""
        names = ("q", "k", "v", "log_gate", "beta", "linear_q", "linear_k", "segments")
        found = {name: function(self.arguments[name]) for name in names if self.arguments.get(name) is not None}
        return replace(self, arguments={**self.arguments, **found})

    def span(self, start: int, stop: int) -> Call:
        return self.map(lambda x: x[:, start:stop])

    def row(self, row: int) -> Call:
        return self.map(lambda x: x[row : row + 1])

    def empty_state(self) -> dict[str, Tensor]:
        """What the operation starts from when no state is given."""
        a = self.arguments
        batch, _, kv_heads, dim = a["v"].shape
        options = {"device": "cpu", "dtype": a["v"].dtype}
        state: dict[str, Tensor] = {}
        if "features_k" in a:
            _, _, heads, features = kernels.features.apply(a["features_k"], a["k"]).shape
            normalized = a.get("normalize", "beta" not in a)
            state |= linear_state(batch, heads, features, dim, normalized=normalized, **options)
        if self.op is kernels.gated_slot_attention:
            state |= slot_state(batch, kv_heads, a["log_gate"].shape[-1], dim, **options)
        if self.op is kernels.mesa_attention:
            state |= mesa_state(batch, kv_heads, dim, dim, **options)
        if "window" in a:
            state |= window_state(batch, a["window"], kv_heads, dim, linear_k=a.get("linear_k") is not None, **options)
        return state


def difference(found: Any, expected: Any) -> float:
    """Largest relative difference over all tensors, relative to each one's largest value; structures must agree."""
    ours, structure = tree_flatten(found)
    theirs, wanted = tree_flatten(expected)
    assert structure == wanted, "names, their order or the nesting differ"
    worst = 0.0
    for x, y in zip(ours, theirs, strict=True):
        if not isinstance(x, Tensor):
            continue
        assert x.shape == y.shape
        x, y = x.double(), y.double()
        assert x.isfinite().all()
        if x.numel():
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp(min=1e-3)))
    return worst


def gradients(call: Call, backend: str, state: dict[str, Tensor] | None = None, **changes: Any) -> list[Tensor]:
    """Gradients of a random functional of output and state with respect to everything that has one."""
    leaves, structure = tree_flatten((call.arguments, state))
    leaves = [
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves
    ]
    arguments, state = tree_unflatten(leaves, structure)
    y, after = replace(call, arguments=arguments).run(backend, state=state, **changes)
    weigh = Draw(Shape(1), seed=99)
    outputs = [x for x in (y, *after.values()) if x.is_floating_point()]
    lengths = changes.get("lengths")
    if lengths is not None:
        real = torch.arange(y.shape[1]) < lengths[:, None]
        outputs[0] = y * real[:, :, None, None]
    total = sum((x * weigh(*x.shape, dtype=x.dtype)).sum() for x in outputs)
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


def everything(function, tensors: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Outputs, and all gradients of a random functional of them."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in tensors.items()}
    outputs = [x for x in function(**leaves, **options) if x is not None]
    generator = torch.Generator().manual_seed(99)
    total = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in outputs)
    return [x.detach() for x in outputs] + list(torch.autograd.grad(total, list(leaves.values())))
