"""Test-time regression by chunks: all tokens' systems are solved at once by conjugate gradients, whose product with
H_t is a pass of linear attention with the keys as values.

Gradients do not go through the iterations. With x = A⁻¹ q, those of q are A⁻¹ g for g those of x, one more solve, and
those of A follow from the residual q - A x, taken at the solution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import features as maps
from ..specs import State
from .gated import chunk, chunk_rows, within
from .linear import own
from .scan import scan
from .tiles import real


class Systems(NamedTuple):
    """A = H + diag(ridge) of every token of M chunks.

    keys: [M, rows, D]. decay: [M, rows, rows], from key j to token i, zero for i < j. kept: [M, rows, 1], from the
    chunk's start to token i. before: [M, D, D], H at the chunk's start. ridge: [M, 1, D].
    """

    keys: Tensor
    decay: Tensor
    kept: Tensor
    before: Tensor
    ridge: Tensor

    def read(self, x: Tensor, values: Tensor, before: Tensor) -> Tensor:
        """Σ_j decay_ij (x_i·k_j) values_j and what was before: [M, rows, G, D], [M, rows, D_v], [M, D, D_v]."""
        scores = (x.flatten(1, 2) @ self.keys.mT).unflatten(1, x.shape[1:3]) * self.decay.unsqueeze(2)
        old = (x * self.kept.unsqueeze(2)).flatten(1, 2) @ before
        return (scores.flatten(1, 2) @ values + old).unflatten(1, x.shape[1:3])

    def product(self, x: Tensor) -> Tensor:
        """A x: [M, rows, G, D] -> the same."""
        return self.read(x, self.keys, self.before) + x * self.ridge.unsqueeze(2)


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """x after so many steps towards product(x) = b, from zero; systems along all but the last dimension.

    Nothing is added to denominators, which would leave a residual: a system that is solved to the bit stands still.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    size = b.square().sum(-1, keepdim=True)
    for _ in range(steps):
        image = product(direction)
        length = _ratio(size, (direction * image).sum(-1, keepdim=True))
        x, residual = x + length * direction, residual - length * image
        before, size = size, residual.square().sum(-1, keepdim=True)
        direction = residual + _ratio(size, before) * direction
    return x


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b.where(b > 0, 1), 0)


Solver = Callable[[Systems, Tensor, int], Tensor]
"""A⁻¹ b after so many steps: [M, rows, G, D] -> the same."""


def iterated(systems: Systems, b: Tensor, steps: int) -> Tensor:
    return conjugate_gradients(systems.product, b, steps)


class Solved(torch.autograd.Function):
    """A⁻¹ of a residual that is zero but for rounding; A is symmetric, so its gradient is one more solve."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, solver: Solver, steps: int, *systems: Tensor) -> Tensor:
        ctx.solver, ctx.steps = solver, steps
        ctx.save_for_backward(*systems)
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        systems = Systems(*ctx.saved_tensors)
        return ctx.solver(systems, gradient, ctx.steps), None, None, *[None] * len(systems)


def solve(solver: Solver, systems: Systems, b: Tensor, steps: int) -> Tensor:
    """A⁻¹ b, differentiable in all tensors: [M, rows, G, D] -> the same."""
    fixed = Systems(*(x.detach() for x in systems))
    with torch.no_grad():
        x = solver(fixed, b, steps)
    return x + Solved.apply(b - systems.product(x), solver, steps, *fixed)


def mesa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    ridge: Tensor,
    steps: int = 16,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """See the reference."""
    return attend(iterated, q, k, v, log_gate, ridge, steps, state, lengths, segments, return_state)


def attend(
    solver: Solver,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    ridge: Tensor,
    steps: int,
    state: State | None,
    lengths: Tensor | None,
    segments: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, State | None]:
    """The operation, whatever solves its systems."""
    batch, tokens, heads, dim = *q.shape[:2], *k.shape[2:]
    q, k, v, log_gate = real(lengths, q, k, v, log_gate)
    queries, keys, values, gates = maps.unit(q), maps.unit(k), maps.precise(v), log_gate.to(maps.precise(k).dtype)
    if segments is not None:
        opens = functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
        (gates,) = real(lengths, gates.masked_fill(opens.unsqueeze(-1), float("-inf")))

    rows = chunk_rows(tokens)
    queries = chunk(queries.unflatten(2, (heads, -1)), rows)
    keys, values, gates = (chunk(x, rows) for x in (keys, values, gates.unsqueeze(-1)))
    ones = torch.ones_like(gates)
    # what decays from where to where: values that say which key they belong to
    places = torch.eye(rows, dtype=keys.dtype, device=keys.device).expand(keys.shape[0], -1, -1)
    decay, since, until = within(ones.unsqueeze(2), ones, places, gates)

    split = (-1, batch, heads)
    increments = ((keys * until.exp()).mT @ torch.cat([keys, values], -1)).unflatten(0, split)
    before = torch.zeros_like(increments[:1])
    if state is not None:
        before = torch.cat([state["H"], state["S"]], -1).to(increments.dtype).unsqueeze(0)
    kept = functional.pad(since[:, -1].exp().unflatten(0, split), (0, 0, 0, 0, 0, 0, 1, 0)).unsqueeze(-1)
    states = scan(torch.cat([before, increments]), kept)
    H, S = states[:-1].flatten(0, 2).split([dim, v.shape[-1]], -1)

    penalty = ridge.to(keys.dtype).repeat(keys.shape[0] // heads, 1).unsqueeze(1)
    systems = Systems(keys, decay.squeeze(2), since.exp(), H, penalty)
    y = systems.read(solve(solver, systems, queries, steps), values, S)
    # [N·B·H, rows, G, D_v] -> [B, T, H·G, D_v]
    y = y.unflatten(0, split).movedim((0, 2), (1, 3)).flatten(1, 2)[:, :tokens].flatten(2, 3)
    if not return_state:
        return y.to(q.dtype), None
    last = states[-1]
    return y.to(q.dtype), {"H": own(last[..., :dim]), "S": own(last[..., dim:])}
