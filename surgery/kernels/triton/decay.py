"""Causal linear attention with at most one decay per token and head, as operations torch knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .configs import GATE_GRADIENT, NORMALIZED, PLAIN, cdiv, config, padded
from .operation import operation
from .sweeps import excess_rows, key_sweep, output_sweep, query_sweep

INTERPRET = bool(triton.knobs.runtime.interpret)
WIDEST = 256
"""Most features, and most columns of v, that fit the registers of a program."""


def require_gpu(x: Tensor) -> None:
    """
    Raises:
        RuntimeError: no kernel can run on the device of x.
    """
    if x.device.type == "cpu" and not INTERPRET:
        raise RuntimeError(
            "The backend 'triton' needs tensors on a GPU, or TRITON_INTERPRET=1 before triton is imported."
        )


class Call(NamedTuple):
    """What every sweep of one call is told."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    documents: Tensor | None
    scale: float

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "H": self.q.shape[2],
            "H_S": self.k.shape[2],
            "F_WIDTH": self.q.shape[3],
            "D_WIDTH": self.v.shape[3],
        }

    @property
    def flags(self) -> dict[str, Any]:
        gate = 0 if self.log_decay is None else 1 if self.log_decay.ndim == 1 else 2
        return {
            "GATE": gate,
            "DOCUMENTS": self.documents is not None,
            "PRECISION": "ieee",
            "INTERPRET": INTERPRET,
        }

    def launch(self, kind: str, score: int, output: int) -> tuple[tuple[int, int, int], dict[str, int], int, int]:
        """The grid, launch options, tile widths and chunk of a sweep whose scores sum over `score` columns."""
        chunk, columns, warps, stages = config(kind, score, output, self.q.element_size() * 8)
        grid = cdiv(output, columns), self.k.shape[2], self.q.shape[0]
        return grid, {"C": chunk, "num_warps": warps, "num_stages": stages}, padded(score), columns


@operation("decay_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    S: Tensor | None,
    z: Tensor | None,
    documents: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the state after the call, the denominators [B, T, H] and, for training, what rounding took from y; empty where
    there is no normaliser."""
    q, k, v, log_decay, S, z, documents = contiguous(q, k, v, log_decay, S, z, documents)
    call = Call(q, k, v, log_decay, documents, scale)
    y, S_after, z_after, mass, rest = outputs(q, k, v, normalize, training)
    grid, options, f, d = call.launch(NORMALIZED if normalize else PLAIN, q.shape[3], v.shape[3])
    output_sweep[grid](
        q, k, v, log_decay, documents, S, z, y, rest, mass, S_after, z_after, q.shape[1], scale, eps,
        H_KV=v.shape[2], F=f, D=d, NORMALIZE=normalize, REST=rest.numel() > 0, CARRIED=S is not None, **call.sizes,
        **call.flags, **options,
    )  # fmt: skip
    return y, S_after, z_after, mass, rest


@_forward.register_fake
def _(q, k, v, log_decay, S, z, documents, scale, normalize, eps, training):
    return outputs(q, k, v, normalize, training)


def outputs(q: Tensor, k: Tensor, v: Tensor, normalize: bool, training: bool) -> tuple[Tensor, ...]:
    batch, tokens, heads, features = q.shape
    y = v.new_empty(batch, tokens, heads, v.shape[3])
    sizes: list[tuple[int, ...]] = [(batch, k.shape[2], features, v.shape[3])]
    sizes += [(batch, k.shape[2], features), (batch, tokens, heads)] if normalize else [(0,), (0,)]
    S, z, mass = (q.new_empty(size, dtype=torch.float32) for size in sizes)
    # nothing is lost of an fp32 output
    kept = normalize and training and y.dtype.itemsize < 4
    return y, S, z, mass, torch.empty_like(y) if kept else q.new_empty(0)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


@operation("decay_attention_backward")
def _backward(
    dy: Tensor,
    dS_after: Tensor | None,
    dz_after: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    S: Tensor | None,
    z: Tensor | None,
    documents: Tensor | None,
    y: Tensor,
    mass: Tensor,
    rest: Tensor,
    scale: float,
    normalize: bool,
    gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, S and z; empty where there is nothing to take one of."""
    dy, dS_after, dz_after, q, k, v, log_decay, S, z, documents = contiguous(
        dy, dS_after, dz_after, q, k, v, log_decay, S, z, documents
    )
    call = Call(q, k, v, log_decay, documents, scale)
    batch, tokens, _, features = q.shape
    state_heads, columns = k.shape[2], v.shape[3]
    dq, dk, dv, dlog_decay, dS, dz = gradients(q, k, v, log_decay, S, z, gate_gradient)
    common = {**call.sizes, **call.flags, "NORMALIZE": normalize}

    grid, options, d, f = call.launch(GATE_GRADIENT if gate_gradient else PLAIN, columns, features)
    chunks = cdiv(tokens, options["C"])
    kept = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    states = q.new_empty((batch, state_heads, chunks, columns, features) if gate_gradient else 0, dtype=kept)
    zs = mass.new_empty((batch, state_heads, chunks, features) if gate_gradient and normalize else 0)
    dgate = mass.new_empty((grid[0], batch, tokens, state_heads) if gate_gradient else 0)
    excess, factors = torch.empty_like(mass), scale / mass
    if normalize:
        rows = excess.numel()
        excess_rows[(cdiv(rows, 32),)](
            dy, y, rest, excess, rows, WIDTH=columns, R=32, X=padded(columns), REST=rest.numel() > 0
        )
    query_sweep[grid](
        dy, v, k, q, log_decay, documents, S, z, factors, excess, dq, dgate, states, zs, tokens, scale,
        H_KV=v.shape[2], D=d, F=f, CARRIED=S is not None, GATE_GRADIENT=gate_gradient, **common, **options,
    )  # fmt: skip
    common |= {"DS_AFTER": dS_after is not None}
    del common["F_WIDTH"], common["D_WIDTH"]
    key_sweep[grid](
        v, dy, q, k, log_decay, documents, factors, excess, states, zs, dS_after, dz_after, dk, dS, dz, dgate,
        tokens, scale, 1, columns, H_A=v.shape[2], A_WIDTH=columns, X_WIDTH=features, A=d, X=f, EXCESS=normalize,
        DZ_AFTER=normalize and dz_after is not None, DS=False, DZ=z is not None, GATE_GRADIENT=gate_gradient,
        **common, **options,
    )  # fmt: skip
    # one per head of the state: several may share a head of v
    shared = dv if v.shape[2] == state_heads else mass.new_empty(batch, tokens, state_heads, columns)
    grid, options, f, d = call.launch(PLAIN, features, columns)
    key_sweep[grid](
        k, q, dy, k, log_decay, documents, factors, excess, states, zs, dS_after, dz_after, shared, dS, dz, dgate,
        tokens, scale, columns, 1, H_A=state_heads, A_WIDTH=features, X_WIDTH=columns, A=f, X=d, EXCESS=False,
        DZ_AFTER=False, DS=S is not None, DZ=False, GATE_GRADIENT=False, **common, **options,
    )  # fmt: skip
    if shared is not dv:
        dv.copy_(shared.unflatten(2, (v.shape[2], -1)).sum(3))
    if gate_gradient and log_decay is not None:
        dlog_decay.copy_(dgate.sum((0, 1, 2) if log_decay.ndim == 1 else 0))
    return dq, dk, dv, dlog_decay, dS, dz


@_backward.register_fake
def _(dy, dS_after, dz_after, q, k, v, log_decay, S, z, documents, y, mass, rest, scale, normalize, gate_gradient):
    return gradients(q, k, v, log_decay, S, z, gate_gradient)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, S: Tensor | None, z: Tensor | None, gate: bool
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v), like(log_decay if gate else None), like(S), like(z)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.normalize, _, _ = inputs
    ctx.save_for_backward(*tensors, output[0], output[3], output[4])
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, dy: Tensor | None, dS: Tensor | None, dz: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_decay, S, z, documents, y, mass, rest = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dz = dz if ctx.normalize else None
    found = _backward(
        dy,
        dS,
        dz,
        q,
        k,
        v,
        log_decay,
        S,
        z,
        documents,
        y,
        mass,
        rest,
        ctx.scale,
        ctx.normalize,
        ctx.needs_input_grad[3],
    )
    present = (x is not None for x in (q, k, v, log_decay, S, z))
    gradients = (x if wanted and there else None for x, wanted, there in zip(
        found, ctx.needs_input_grad, present, strict=False))  # fmt: skip
    return *gradients, None, None, None, None, None


_forward.register_autograd(_chain, setup_context=_setup)


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-12,
    S: Tensor | None = None,
    z: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Causal linear attention over features, by chunks with the state on chip (Lightning Attention-2, arXiv
    2401.04658; for gates, Mamba-2, arXiv 2405.21060):

        S_t = e^(g_t) S_(t-1) + k_tᵀ v_t,   y_t = scale q_t S_t,

    and, when `normalize`, z_t = e^(g_t) z_(t-1) + k_t and y_t divided by (scale q_t·z_t + eps).

    q: [B, T, H, F]; k: [B, T, H_s, F]; v: [B, T, H_kv, D_v]; fp32, fp16 or bf16, all the same. H is a multiple of H_s,
    H_s of H_kv; a head serves consecutive heads of the larger number. F and D_v up to 256.
    log_decay: g, None for zero, [H_s], or [B, T, H_s]; never positive, -inf allowed.
    S: [B, H_s, F, D_v] and z: [B, H_s, F], the state before the first token. documents: integers [B, T], which change
    where a document begins; nothing before it counts, and the state is of the first token's.
    Returns y [B, T, H, D_v] in q's dtype and S, z after the last token in fp32; z is None unless `normalize`.
    """
    if normalize and S is not None and z is None:
        raise ValueError("A normalised call that starts from a state S needs its z.")
    single = [None if x is None else x.float() for x in (log_decay, S, z if normalize else None)]
    documents = None if documents is None else documents.to(torch.int32)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, *single))
    y, S_after, z_after, *_ = _forward(q, k, v, *single, documents, float(scale), normalize, float(eps), training)
    return y, S_after, z_after if normalize else None
