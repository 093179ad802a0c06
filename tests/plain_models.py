"""Causal transformers as people write them in plain PyTorch, weighted so that attention matters to the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB, WIDTH, HEADS = 53, 32, 4


class CausalSelfAttention(nn.Module):
    """One fused projection, learned positions elsewhere: nanoGPT's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.dropout = HEADS, 0.0
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, HEADS, C // HEADS).transpose(1, 2) for part in self.c_attn(x).split(C, -1))
        return self.c_proj(self.attend(q, k, v, mask).transpose(1, 2).contiguous().view(B, T, C))


class RotaryAttention(nn.Module):
    """Keys and values shared among heads, a norm and a rotation of their own: LitGPT's and Llama's kind."""

    repeats = True

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.settings = {"heads": HEADS, "groups": 2}
        self.norm = nn.RMSNorm(size)
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * size), nn.Linear(WIDTH, 2 * size)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        angle = torch.arange(x.shape[1])[:, None] / 100 ** torch.linspace(0, 1, q.shape[-1] // 2)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (
            torch.view_as_real(torch.view_as_complex(self.norm(y).unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(
                -2
            )
            for y in (q, k)
        )
        if self.repeats:
            k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        y = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=0.5, enable_gqa=not self.repeats
        )
        return self.o(y.transpose(1, 2).flatten(2))


class SharingAttention(RotaryAttention):
    repeats = False


class GPT(nn.Module):
    """[B, T] tokens to [B, T, VOCAB] logits."""

    def __init__(self, attention: type[nn.Module] = CausalSelfAttention, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(attention() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB)
        for block in self.blocks:
            for linear in [each for each in block.modules() if isinstance(each, nn.Linear)]:
                nn.init.normal_(linear.weight, std=0.3)

    def forward(self, tokens: Tensor, *args: Any) -> Tensor:
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = x + block(x, *args)
        return self.head(x)


class Encoder(nn.Module):
    """A stack of torch's own layers under a causal mask: [B, T] tokens to [B, T, VOCAB] logits."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=batch_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for each in self.layers.layers:
            nn.init.normal_(each.self_attn.in_proj_weight, std=0.4)
        self.batch_first = batch_first

    def forward(self, tokens: Tensor, padding: Tensor | None = None, mask: Any = "causal") -> Tensor:
        x = self.embed(tokens)
        if isinstance(mask, str):
            mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.layers(x, mask=mask, src_key_padding_mask=padding)
        return self.head(x if self.batch_first else x.transpose(0, 1))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
