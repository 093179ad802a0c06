"""Closed forms for the start of a mixer: calls of one layer with what its softmax attention answered, and what parts of
mixers may ask of them. In fp32 and fp64, without a gradient, and without a random number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .base import AttentionContext, AttentionShape, Mixer
from .locality import beyond
from .windows import Windowed, narrowed

RIDGE = 1e-3
"""Of least squares, beside the largest entry of the diagonal."""
REACH = 16.0
"""How far a balance is looked for, in nats."""
STEPS = 20
"""Of Gauss-Newton; far more than it takes."""


class Call(NamedTuple):
    """One call of a layer. teacher: [n, H, D], the softmax output at its n real tokens, row by row."""

    context: AttentionContext
    teacher: Tensor


class Sample:
    """Calls of one layer, for `Mixer.calibrate`."""

    def __init__(self, shape: AttentionShape, calls: Sequence[Call]) -> None:
        self.shape, self.calls = shape, list(calls)

    def outputs(self, mixer: Mixer) -> Iterator[Tensor]:
        """[n, H, D] fp32 for every call: what the mixer makes of the real tokens."""
        for context, teacher in self.calls:
            # values of fewer channels than keys are padded on their way in
            yield real_tokens(context, mixer.forward(context)[0])[..., : teacher.shape[-1]].float()

    def errors(self, mixer: Mixer) -> Tensor:
        """[H] fp64: the squared error of each head, as a part of all heads' squared output."""
        found = zip(self.outputs(mixer), self.calls, strict=True)
        return _sum(_squares(y - call.teacher.float()) for y, call in found) / self.energy

    @property
    def energy(self) -> Tensor:
        """Scalar fp64: the square of the softmax output."""
        return _sum(_squares(call.teacher.float()) for call in self.calls).sum().clamp(min=1e-30)

    @property
    def size(self) -> Tensor:
        """[H] fp64: the root mean square of the softmax output."""
        count = sum(call.teacher[:, 0].numel() for call in self.calls)
        return (_sum(_squares(call.teacher.float()) for call in self.calls) / count).sqrt()

    def distance(self, mixer: Mixer, heads: int) -> Tensor:
        """[heads] fp64, where heads divides H: the mean distance in tokens at which softmax attention looks beyond the
        mixer's window, over neighbouring heads."""
        window = getattr(mixer, "window", None)
        found = [beyond(context, self.shape, window) for context, _ in self.calls]
        mass, moment = (_sum(x.double().sum((0, 1)) for x in both) for both in zip(*found, strict=True))
        return moment.view(heads, -1).sum(1) / mass.view(heads, -1).sum(1).clamp(min=1e-30)

    def improve(self, mixer: Mixer, change: Callable[[], None]) -> None:
        """Change the mixer's parameters; take that back for every head whose error does not fall.

        Heads are told apart by the first dimension of what changed: H, or a multiple of H_kv, whose query heads stand
        together then; anything else is kept or taken back as a whole.
        """
        old = {name: p.detach().clone() for name, p in mixer.named_parameters()}
        before = self.errors(mixer)
        change()
        changed = [(p, old[name]) for name, p in mixer.named_parameters() if not torch.equal(p, old[name])]
        if not changed:
            return
        sizes = {p.shape[0] if p.ndim else 1 for p, _ in changed}
        kv_heads = self.shape.kv_heads
        groups = self.shape.heads
        if sizes != {groups}:
            groups = 1 if any(size % kv_heads for size in sizes) else kv_heads
        falls = self._fall(mixer, before, groups)
        for p, was in changed:
            rows = falls.repeat_interleave((p.shape[0] if p.ndim else 1) // groups)
            p.copy_(torch.where(rows.view(-1, *[1] * (p.ndim - 1)), p, was).view_as(p))
        if not self._fall(mixer, before, 1):  # heads were not as independent as their parameters look
            for p, was in changed:
                p.copy_(was)

    def _fall(self, mixer: Mixer, before: Tensor, groups: int) -> Tensor:
        return self.errors(mixer).view(groups, -1).sum(1) < before.view(groups, -1).sum(1)

    def gain(self, mixer: Mixer, parameter: nn.Parameter) -> Tensor:
        """[H] fp64: for a parameter [H] that the output of each head depends on in a straight line, the value of least
        squares: y(g) = y(0) + g (y(1) - y(0)) next to the softmax output."""
        with _set(parameter, 0.0):
            without = list(self.outputs(mixer))
        with _set(parameter, 1.0):
            slopes = [y - zero for y, zero in zip(self.outputs(mixer), without, strict=True)]
        wanted = [call.teacher.float() - zero for call, zero in zip(self.calls, without, strict=True)]
        above = _sum(_squares(a, b) for a, b in zip(slopes, wanted, strict=True))
        below = _sum(map(_squares, slopes))
        return (above + RIDGE * below * parameter) / ((1 + RIDGE) * below).clamp(min=1e-30)

    def balance(
        self,
        mixer: Windowed,
        parameter: nn.Parameter,
        *,
        far: float,
        inputs: Callable[[AttentionContext], Tensor] | None = None,
    ) -> Tensor:
        """What to add to the log-odds of the linear branch, so that window and linear branch together come closest to
        the softmax output: [H, P + 1] fp64, a factor of each of P inputs and a constant.

        parameter: [H], with which window or linear branch win over the other; far: its value at which the linear branch
        has all the weight, wherever there are keys beyond the window. inputs: gives [B, T, H, P] of a call; None: none.

        With the window alone y = w, with the linear branch alone y = l, and y = w + λ(l - w) in between, the squared
        error of a token is λ²|l - w|² - 2λ (l - w)·(t - w) and what does not depend on λ = σ(logit λ0 + x·θ). θ starts
        with the best of a grid of constants and goes on by damped Gauss-Newton steps, each a ridge regression.
        """
        with narrowed(mixer, linear=False):
            near = list(self.outputs(mixer))
        with _set(parameter, far):
            apart = [y - w for y, w in zip(self.outputs(mixer), near, strict=True)]
        now = [y - w for y, w in zip(self.outputs(mixer), near, strict=True)]
        wanted = [call.teacher.float() - w for call, w in zip(self.calls, near, strict=True)]
        size = torch.cat([_dot(d, d) for d in apart])
        pull = torch.cat([_dot(d, t) for d, t in zip(apart, wanted, strict=True)])
        part = torch.cat([_dot(d, y) for d, y in zip(apart, now, strict=True)]) / size.clamp(min=1e-30)
        odds = torch.logit(part, eps=1e-6)
        x = torch.ones_like(size).unsqueeze(-1)
        if inputs is not None:
            seen = torch.cat([real_tokens(context, inputs(context)) for context, _ in self.calls])
            x = torch.cat([seen.double(), x], -1)
        return _fit_odds(size, pull, odds, x)


def _fit_odds(size: Tensor, pull: Tensor, odds: Tensor, x: Tensor) -> Tensor:
    """θ [H, P] for size, pull, odds [N, H] and x [N, H, P], whose last input is constant: see `Sample.balance`."""

    def share(theta: Tensor) -> Tensor:
        return torch.sigmoid(odds + torch.einsum("nhp,hp->nh", x, theta))

    def error(part: Tensor) -> Tensor:
        return (part.square() * size - 2 * part * pull).sum(0)

    grid = torch.linspace(-REACH, REACH, 129, dtype=x.dtype, device=x.device)
    errors = torch.stack([error(torch.sigmoid(odds + constant)) for constant in grid])
    theta = x.new_zeros(x.shape[1:])
    theta[:, -1] = grid[errors.argmin(0)]
    best, damping = errors.amin(0), x.new_full((x.shape[1],), RIDGE)
    for _ in range(STEPS):
        part = share(theta)
        slope = part * (1 - part)
        normal = torch.einsum("nhp,nhq->hpq", x * (slope.square() * size).unsqueeze(-1), x)
        right = torch.einsum("nhp,nh->hp", x, slope * (pull - part * size))
        diagonal = normal.diagonal(dim1=1, dim2=2)
        ridge = damping[:, None] * diagonal + RIDGE * RIDGE * diagonal.amax(1, True) + 1e-30
        step = torch.linalg.solve(normal + torch.diag_embed(ridge), right)
        tried = (theta + step).clamp(-REACH, REACH)
        found = error(share(tried))
        falls = found < best
        theta, best = torch.where(falls[:, None], tried, theta), torch.where(falls, found, best)
        damping = torch.where(falls, damping / 10, damping * 10)
    return theta


def real_tokens(context: AttentionContext, x: Tensor) -> Tensor:
    """[B, T, ...] -> [n, ...]."""
    return x.flatten(0, 1) if context.valid is None else x[context.valid]


@contextmanager
def _set(parameter: Tensor, value: float) -> Iterator[None]:
    old = parameter.detach().clone()
    parameter.fill_(value)
    try:
        yield
    finally:
        parameter.copy_(old)


def _squares(x: Tensor, y: Tensor | None = None) -> Tensor:
    """[n, H, D] -> [H] fp64: sums of products."""
    return _dot(x, x if y is None else y).sum(0)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """[n, H, D], twice -> [n, H] fp64."""
    return (x.double() * y.double()).sum(-1)


def _sum(parts: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)
