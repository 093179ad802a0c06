"""One decode step of linear attention, plain or gated or by the delta rule, in one launch and in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specs import Features, State
from .configs import padded
from .decay import WIDEST, require_gpu
from .mixed_tiles import power
from .step_tiles import features, load_floats, logits, query_features, step_recall, step_state, step_sum, unit_rows

HALVES = {"hedgehog": 2, "exp": 2, "softmax": 1, "relu": 1, "silu": 1, "elu1": 1, "identity": 1}
"""The maps that kernels compute, and into how many halves of equal width their features fall."""
FEW = 256
"""Programs that leave much of a GPU idle."""
TILE = 16384
"""Elements of a state that a program holds at a time."""


class Map(NamedTuple):
    """A feature map as an operation takes it."""

    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    name: str

    @classmethod
    def of(cls, features: Features) -> Map:
        return cls(features.weight, features.bias, features.scale, features.name)

    def sizes(self, x: Tensor) -> tuple[int, int]:
        """Features of one half of the map of x, and halves."""
        return x.shape[-1] if self.weight is None else self.weight.shape[-1], HALVES[self.name]

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.contiguous() for x in self[:3])

    @property
    def given(self) -> Given:
        return Given(self.name, self.weight is not None, self.bias is not None, self.scale is not None)


class Given(NamedTuple):
    """A feature map, and which tensors it has."""

    name: str
    weight: bool
    bias: bool
    scale: bool

    def told(self, kind: str) -> dict[str, Any]:
        """What a kernel is told of the map of its queries (kind Q) or keys (K)."""
        return {f"{name}_{kind}": x for name, x in zip(("MAP", "WEIGHT", "BIAS", "SCALE"), self, strict=True)}


def covered(*tensors: Tensor | None) -> bool:
    """Whether kernels run these here: on a GPU or in the interpreter, in at most 32 bits."""
    present = [x for x in tensors if x is not None]
    if any(x.dtype.itemsize > 4 or x.shape[-1] > WIDEST for x in present):
        return False
    require_gpu(present[0])
    return True


def writable(*tensors: Tensor | None) -> bool:
    """Whether kernels can write into these."""
    return all(x is None or x.is_contiguous() for x in tensors)


def mapped(features_q: Features, features_k: Features, q: Tensor, k: Tensor, heads: int) -> bool:
    """Whether kernels map queries and keys [B, 1, H, D], these to `heads` heads, by these features."""
    for wanted, x, h in ((features_q, q, q.shape[2]), (features_k, k, heads)):
        given = [w for w in (wanted.weight, wanted.bias) if w is not None]
        if wanted.name not in HALVES:
            return False
        if not given and h != x.shape[2]:
            return False
        if any(w.shape[0] != h or w.shape[-1] > WIDEST or w.dtype.itemsize > 4 for w in given):
            return False
    return Map.of(features_q).sizes(q) == Map.of(features_k).sizes(k)


def single(x: Tensor) -> tuple[Tensor, int]:
    """[B, 1, H, D] whose rows are contiguous, and their stride."""
    x = x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()
    return x, x.stride(0)


def rows(dim: int, features: int) -> int:
    """Rows of a map's weights that a program holds at a time."""
    return max(1, min(padded(dim), TILE // features))


def warps(elements: int) -> int:
    """Of a program whose largest tile has so many elements."""
    return 8 if elements > 4096 else 4


class InPlace:
    """A launch that writes into some of its arguments, and returns what has the shape of its first with the width of
    its third: an operation to torch.compile, which must know what is written. Otherwise a plain call, as dispatching an
    operation of so many arguments takes longer than most kernels of a step."""

    def __init__(self, name: str, launch: Callable[..., Tensor], changes: Sequence[str]) -> None:
        self.launch = launch
        self.op = torch.library.custom_op(f"surgery::{name}", launch, mutates_args=changes)
        self.op.register_fake(lambda q, k, v, *rest: q.new_empty(*q.shape[:3], v.shape[3]))

    def __call__(self, changed: Iterable[Tensor | None], *args: Any) -> Tensor:
        """changed: what it writes into, among the arguments."""
        if torch.compiler.is_compiling():
            return self.op(*args)
        y = self.launch(*args)
        torch.autograd.graph.increment_version([x for x in changed if x is not None])
        return y


@triton.jit
def linear_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, beta_ptr, wq_ptr, bq_ptr, sq_ptr, wk_ptr, bk_ptr, sk_ptr, lengths_ptr, S_ptr,
    z_ptr, y_ptr, q_row, k_row, v_row, gate_row, beta_row, scale, eps,
    H: tl.constexpr, H_KV: tl.constexpr, H_S: tl.constexpr, H_GATE: tl.constexpr, H_BETA: tl.constexpr,
    D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, WIDTH: tl.constexpr, GATE_WIDTH: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, N: tl.constexpr, X: tl.constexpr, HALVES: tl.constexpr, GATE: tl.constexpr,
    DELTA: tl.constexpr, UNIT: tl.constexpr, NORMALIZE: tl.constexpr, LENGTHS: tl.constexpr,
    MAP_Q: tl.constexpr, WEIGHT_Q: tl.constexpr, BIAS_Q: tl.constexpr, SCALE_Q: tl.constexpr, MAP_K: tl.constexpr,
    WEIGHT_K: tl.constexpr, BIAS_K: tl.constexpr, SCALE_K: tl.constexpr,
):  # fmt: skip
    """X columns of one state and the G queries that read it. Programs share nothing that any of them writes: z, which
    every column needs, exists only where one program has all columns."""
    cut, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    G: tl.constexpr = H // H_S
    kv, first = head // (H_S // H_KV), cut * X
    g, x = tl.arange(0, ROWS)[:, None], first + tl.arange(0, X)[None, :]
    y_ptr += (b * H + head * G) * V_WIDTH + g * V_WIDTH + x
    inside = (g < G) & (x < V_WIDTH)
    live = tl.load(lengths_ptr + b) if LENGTHS else 1
    if live == 0:
        tl.store(y_ptr, tl.zeros([ROWS, X], y_ptr.dtype.element_ty), mask=inside)
        return
    scale_q = tl.load(sq_ptr).to(tl.float32) if SCALE_Q else 1.0
    scale_k = tl.load(sk_ptr).to(tl.float32) if SCALE_K else 1.0
    up, down = query_features(
        q_ptr + b * q_row, wq_ptr, bq_ptr, scale_q, head * G, G, D_WIDTH, WIDTH, ROWS, D, F, MAP_Q, WEIGHT_Q, BIAS_Q
    )
    k_ptr += b * k_row + kv * D_WIDTH
    key = logits(k_ptr, wk_ptr, bk_ptr, scale_k, head, D_WIDTH, WIDTH, D, F, WEIGHT_K, BIAS_K)
    key_up, key_down = features(key[None, :], WIDTH, F, MAP_K)
    if UNIT:
        up, down = unit_rows(up, down, HALVES)
        key_up, key_down = unit_rows(key_up, key_down, HALVES)
    up, down = up * scale, down * scale
    gate_up, gate_down = key_up, key_down
    if GATE:
        gate_ptr += b * gate_row + head // (H_S // H_GATE) * GATE_WIDTH
        if GATE_WIDTH == 1:
            gate_up = tl.zeros([1, F], tl.float32) + power(tl.load(gate_ptr).to(tl.float32))
            gate_down = gate_up
        else:
            gate_up = power(load_floats(gate_ptr, 0, WIDTH, F))[None, :]
            if HALVES == 2:
                gate_down = power(load_floats(gate_ptr + WIDTH, 0, WIDTH, F))[None, :]
    at = (b * H_S + head) * (HALVES * WIDTH)
    v = load_floats(v_ptr + b * v_row + kv * V_WIDTH, first, V_WIDTH, X)
    S_ptr += at * V_WIDTH
    if DELTA:
        recall = step_recall(S_ptr, key_up, gate_up, first, WIDTH, V_WIDTH, F, N, X, GATE)
        if HALVES == 2:
            other_ptr = S_ptr + WIDTH * V_WIDTH
            recall += step_recall(other_ptr, key_down, gate_down, first, WIDTH, V_WIDTH, F, N, X, GATE)
        v = (v - recall) * tl.load(beta_ptr + b * beta_row + head // (H_S // H_BETA)).to(tl.float32)
        # nothing is written before every thread has read
        tl.debug_barrier()
    y = step_state(S_ptr, key_up, gate_up, v, up, first, G, WIDTH, V_WIDTH, ROWS, F, N, X, GATE)
    if HALVES == 2:
        S_ptr += WIDTH * V_WIDTH
        y += step_state(S_ptr, key_down, gate_down, v, down, first, G, WIDTH, V_WIDTH, ROWS, F, N, X, GATE)
    if NORMALIZE:
        z_ptr += at
        total = step_sum(z_ptr, key_up, gate_up, up, WIDTH, F, GATE)
        if HALVES == 2:
            total += step_sum(z_ptr + WIDTH, key_down, gate_down, down, WIDTH, F, GATE)
        y /= (total + eps)[:, None]
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    beta: Tensor | None,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    scale_q: Tensor | None,
    weight_k: Tensor | None,
    bias_k: Tensor | None,
    scale_k: Tensor | None,
    lengths: Tensor | None,
    S: Tensor,
    z: Tensor | None,
    map_q: str,
    map_k: str,
    unit: bool,
    scale: float,
    eps: float,
) -> Tensor:
    (q, q_row), (k, k_row), (v, v_row) = map(single, (q, k, v))
    gate, gate_row = (None, 0) if log_gate is None else single(log_gate)
    beta, beta_row = (None, 0) if beta is None else single(beta)
    maps_q, maps_k = Map(weight_q, bias_q, scale_q, map_q), Map(weight_k, bias_k, scale_k, map_k)
    batch, _, heads, dim = q.shape
    state_heads, columns = S.shape[1], v.shape[3]
    y = q.new_empty(batch, 1, heads, columns)
    options = _options(
        batch, (heads, v.shape[2], state_heads), (dim, columns, maps_k.sizes(k)),
        None if gate is None else gate.shape[2:], None if beta is None else beta.shape[2], maps_q.given, maps_k.given,
        UNIT=unit, NORMALIZE=z is not None, LENGTHS=lengths is not None,
    )  # fmt: skip
    linear_kernel[-(-columns // options["X"]), state_heads, batch](
        q, k, v, gate, beta, *maps_q.pointers, *maps_k.pointers, lengths, S, z, y, q_row, k_row, v_row, gate_row,
        beta_row, scale, eps, **options,
    )  # fmt: skip
    return y


@functools.cache
def _options(
    batch: int,
    heads: tuple[int, int, int],
    widths: tuple[int, int, tuple[int, int]],
    gate: tuple[int, int] | None,
    beta: int | None,
    map_q: Given,
    map_k: Given,
    **flags: bool,
) -> dict[str, Any]:
    """Constants of a launch.

    heads: of queries, values and the state. widths: of keys, of values, and of one half of their features, and halves.
    gate: its heads and width. beta: its heads.
    """
    (h, h_kv, h_s), (dim, columns, (width, halves)) = heads, widths
    f, x = padded(width), padded(columns)
    # few programs share the columns of a state, unless each column needs all of z
    while not flags["NORMALIZE"] and x > 16 and batch * h_s * -(-columns // x) < FEW:
        x //= 2
    gate_heads, gate_width = gate or (1, 1)
    return dict(
        H=h, H_KV=h_kv, H_S=h_s, H_GATE=gate_heads, H_BETA=beta or 1, D_WIDTH=dim, V_WIDTH=columns, WIDTH=width,
        GATE_WIDTH=gate_width, ROWS=padded(h // h_s, 1), D=rows(dim, f), F=f, N=min(f, TILE // x), X=x, HALVES=halves,
        GATE=gate is not None, DELTA=beta is not None, **flags, **map_q.told("Q"), **map_k.told("K"),
        num_warps=warps(f * x),
    )  # fmt: skip


_step = InPlace("linear_step", _launch, ("S", "z"))


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    eps: float = 1e-12,
    state: State,
    lengths: Tensor | None = None,
) -> Tensor | None:
    """A step of `linear_attention` (see its reference) that writes into `state`; None if no kernel covers it."""
    return _linear(q, k, v, None, None, features_q, features_k, False, 1.0, True, eps, state, lengths)


def gated_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-12,
    state: State,
    lengths: Tensor | None = None,
) -> Tensor | None:
    """A step of `gated_linear_attention` (see its reference) that writes into `state`; None if no kernel covers it."""
    gate = log_gate if log_gate.ndim == 4 else log_gate.unsqueeze(-1)
    return _linear(q, k, v, gate, None, features_q, features_k, False, scale, normalize, eps, state, lengths)


def delta_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gate: Tensor | None = None,
    *,
    features_q: Features,
    features_k: Features,
    unit: bool = True,
    scale: float = 1.0,
    state: State,
    lengths: Tensor | None = None,
) -> Tensor | None:
    """A step of `delta_attention` (see its reference) that writes into `state`; None if no kernel covers it."""
    gate = log_gate.unsqueeze(-1) if log_gate is not None and log_gate.ndim == 3 else log_gate
    return _linear(q, k, v, gate, beta.unsqueeze(-1), features_q, features_k, unit, scale, False, 0.0, state, lengths)


def _linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    beta: Tensor | None,
    features_q: Features,
    features_k: Features,
    unit: bool,
    scale: float,
    normalize: bool,
    eps: float,
    state: State,
    lengths: Tensor | None,
) -> Tensor | None:
    S, z = state["S"], state["z"] if normalize else None
    fits = mapped(features_q, features_k, q, k, S.shape[1]) and covered(q, k, v, gate, beta, S)
    if not fits or not writable(S, z):
        return None
    (*map_q, name_q), (*map_k, name_k) = Map.of(features_q), Map.of(features_k)
    return _step(
        (S, z),
        q,
        k,
        v,
        gate,
        beta,
        *map_q,
        *map_k,
        lengths,
        S,
        z,
        name_q,
        name_k,
        unit,
        float(scale),
        float(eps),
    )
