"""What our kernels are measured against: flash-linear-attention, torch's attentions, and compositions of these.

Every peer computes what our operation computes, from the same tensors; `benchmarks.kernels` asserts so before it times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def flash(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Full causal softmax attention, [B, T, H, D]: what a converted layer replaces."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def flash_both(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """The same of an encoder: every token sees every other."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def repeated(q: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Heads repeated to those of q: flash-linear-attention has no grouped queries."""
    return [x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in tensors]


def linear(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(q, *repeated(q, k, v), scale=1.0, normalize=False)[0]


def normalised(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(q, *repeated(q, k, v), scale=1.0, normalize=True)[0]


def lightning(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **_: Any) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, *repeated(q, k, v), g_gamma=gate, scale=1.0)[0]


def scalar(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **_: Any) -> Tensor:
    """Its chunked form refuses to train on Hopper with Triton 3.4 to 3.6, hence the fused one."""
    from fla.ops.simple_gla import fused_chunk_simple_gla

    k, v = repeated(q, k, v)
    gate = gate.repeat_interleave(q.shape[2] // gate.shape[2], 2)
    return fused_chunk_simple_gla(q, k, v, g=gate, scale=1.0)[0]


def channel(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **_: Any) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, *repeated(q, k, v, gate), scale=1.0)[0]


def written(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - α, what a moving average takes in."""
    return -torch.expm1(gate.float()).to(dtype)


def slots(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **_: Any) -> Tensor:
    from fla.ops.gsa import chunk_gsa

    return chunk_gsa(q, k, v, written(gate, v.dtype), gate, scale=1.0)[0]


def averages(q: Tensor, v: Tensor, gate: Tensor, **_: Any) -> Tensor:
    return channel(q, written(gate, v.dtype), v, gate)


def delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **_: Any) -> Tensor:
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(q, *repeated(q, k, v, beta), scale=1.0)[0]


def gated_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, **_: Any) -> Tensor:
    """Without tilelang it refuses to train on Hopper with Triton 3.4 to 3.6."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    k, v, beta, gate = repeated(q, k, v, beta, gate)
    return chunk_gated_delta_rule(q, k, v, gate, beta, scale=1.0)[0]


def kda(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, **_: Any) -> Tensor:
    from fla.ops.kda import chunk_kda

    k, v, beta, gate = repeated(q, k, v, beta, gate)
    return chunk_kda(q, k, v, gate, beta, scale=1.0)[0]


def sums(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Linear attention without causality as one writes it down."""
    k, v = repeated(q, k, v)
    norm = torch.einsum("bthf,bhf->bth", q, k.sum(1))
    return torch.einsum("bthf,bhfd->bthd", q, torch.einsum("bthf,bthd->bhfd", k, v)) / norm.unsqueeze(-1)


class Window:
    """A sliding softmax window by FlexAttention, compiled once, with the log of each row's sum."""

    def __init__(self, size: int, tokens: int, device: str = "cuda") -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def near(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i - j < size)

        self.mask = create_block_mask(near, None, None, tokens, tokens, device=device)
        self.attention = torch.compile(flex_attention, dynamic=False)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, T, H, D] and the log-sum-exp [B, T, H]."""
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y, log = self.attention(q, k, v, block_mask=self.mask, enable_gqa=grouped, return_lse=True)
        return y.transpose(1, 2), log.transpose(1, 2)


def window(size: int, tokens: int) -> Any:
    """Its output alone."""
    attention = Window(size, tokens)
    return lambda q, k, v: attention(q, k, v)[0]


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """As LoLCATs' code has it: an einsum per head, two softmaxes, concatenated; [B, T, H, D] -> [B, T, H_f, F]."""
    x = x.repeat_interleave(weight.shape[0] // x.shape[2], 2)
    z = torch.einsum("bthd,hdf->bthf", x, weight.to(x.dtype)).float()
    return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1).clamp(min=1e-12).to(x.dtype)


def delayed(x: Tensor, by: int) -> Tensor:
    """[B, T, ...], every token's value `by` tokens later: what has left a window of that size."""
    return functional.pad(x, (0, 0, 0, 0, by, 0))[:, : x.shape[1]]


class Hybrid:
    """A log-mass hybrid of parts one can have today: eager features, flash-linear-attention over what has left the
    window, a FlexAttention window, and one normaliser over both. compiled: all around the attentions by inductor."""

    def __init__(self, size: int, tokens: int, compiled: bool) -> None:
        self.size = size
        self.window = Window(size, tokens)
        self.before = torch.compile(self._before) if compiled else self._before
        self.after = torch.compile(self._after) if compiled else self._after

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, map_q: Tensor, map_k: Tensor, mass: tuple[Tensor, ...]
    ) -> Tensor:
        from fla.ops.linear_attn import chunk_linear_attn

        phi_q, phi_k, values, far, a = self.before(q, k, v, map_q, map_k, *mass)
        numerator = chunk_linear_attn(phi_q, phi_k, values, scale=1.0, normalize=False)[0]
        return self.after(*self.window(q, k, v), numerator, far, a)

    def _before(
        self, q: Tensor, k: Tensor, v: Tensor, map_q: Tensor, map_k: Tensor, *mass: Tensor
    ) -> tuple[Tensor, ...]:
        q_weight, q_bias, k_weight, k_bias = mass
        a = torch.einsum("bthd,hd->bth", q.float(), q_weight) + q_bias
        b = 15 * torch.tanh((torch.einsum("bthd,hd->bth", k.float(), k_weight) + k_bias) / 15)
        phi_q, phi_k = hedgehog(q, map_q), hedgehog(k, map_k)
        phi_k, values = repeated(q, (phi_k * b.exp().unsqueeze(-1)).to(q.dtype), v)
        phi_k, values = delayed(phi_k, self.size), delayed(values, self.size)
        far = (phi_q * phi_k.float().cumsum(1)).sum(-1)
        return phi_q, phi_k, values, far, a

    @staticmethod
    def _after(y: Tensor, log: Tensor, numerator: Tensor, far: Tensor, a: Tensor) -> Tensor:
        unit = torch.maximum(log, a + far.clamp(min=1e-30).log()).detach()
        near, factor = (log - unit).exp(), (a - unit).clamp(max=60).exp()
        sums = near.unsqueeze(-1) * y + factor.unsqueeze(-1) * numerator
        return (sums / (near + factor * far).unsqueeze(-1)).to(y.dtype)


class Liger:
    """Gates from keys, features by softmax, flash-linear-attention with repeated heads, a FlexAttention window, half of
    each."""

    def __init__(self, size: int, tokens: int) -> None:
        self.window = Window(size, tokens)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        from fla.ops.gla import chunk_gla

        gate = functional.logsigmoid(k.float()) / 16
        phi_q, phi_k = q.float().softmax(-1).to(q.dtype), k.float().softmax(-1).to(q.dtype)
        far = chunk_gla(phi_q, *repeated(q, phi_k, v, gate), scale=1.0)[0]
        return 0.5 * self.window(q, k, v)[0] + 0.5 * far
