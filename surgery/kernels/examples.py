"""Small calls of every operation, for checks on the user's machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .specs import Features, Joint, Window

BATCH, TOKENS, HEADS, KV_HEADS, DIM = 2, 150, 4, 2, 32
Arguments = dict[str, Any]


def _qkv(device: torch.device | str, dtype: torch.dtype) -> tuple[Arguments, Tensor, torch.Generator]:
    """q, k, v, a positive map weight, and the generator to draw more from; drawn on the CPU, hence equal everywhere."""
    generator = torch.Generator().manual_seed(0)
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    draws = {name: torch.randn(BATCH, TOKENS, n, DIM, generator=generator) for name, n in heads.items()}
    weight = torch.randn(HEADS, DIM, DIM, generator=generator) * DIM**-0.5
    common = {name: x.to(device, dtype) for name, x in draws.items()} | {"return_state": True}
    return common, weight.to(device), generator


def linear(device: torch.device | str, dtype: torch.dtype) -> Arguments:
    common, weight, _ = _qkv(device, dtype)
    maps = {"features_q": Features("hedgehog", weight), "features_k": Features("hedgehog", weight[:KV_HEADS])}
    return common | maps


def gated(device: torch.device | str, dtype: torch.dtype) -> Arguments:
    common, _, generator = _qkv(device, dtype)
    logits = torch.randn(BATCH, TOKENS, KV_HEADS, DIM, generator=generator).to(device, dtype)
    gate = torch.nn.functional.logsigmoid(logits) / 16
    return common | {"log_gate": gate, "features_q": Features("softmax"), "features_k": Features("softmax")}


def delta(device: torch.device | str, dtype: torch.dtype) -> Arguments:
    common, _, generator = _qkv(device, dtype)
    beta, logits = torch.randn(2, BATCH, TOKENS, KV_HEADS, generator=generator).to(device, dtype)
    gate = torch.nn.functional.logsigmoid(logits) / 16
    maps = {"features_q": Features("silu"), "features_k": Features("silu")}
    return common | maps | {"beta": beta.sigmoid(), "log_gate": gate}


def slots(device: torch.device | str, dtype: torch.dtype) -> Arguments:
    common = gated(device, dtype)
    return {name: x for name, x in common.items() if not name.startswith("features")} | {"scaling": DIM**-0.5}


def mesa(device: torch.device | str, dtype: torch.dtype) -> Arguments:
    common, _, generator = _qkv(device, dtype)
    gate = torch.nn.functional.logsigmoid(4 + torch.randn(BATCH, TOKENS, KV_HEADS, generator=generator)).to(device)
    return common | {"log_gate": gate, "ridge": torch.ones(KV_HEADS, DIM, device=device), "steps": DIM}


def window(device: torch.device | str, dtype: torch.dtype) -> Arguments:
    common, _, _ = _qkv(device, dtype)
    return common | {"window": Window(16), "scaling": DIM**-0.5}


def hybrid(device: torch.device | str, dtype: torch.dtype) -> Arguments:
    mix = {"mix": Joint(torch.full((HEADS,), 0.1, device=device)), "window": Window(16, "terraced")}
    return linear(device, dtype) | mix | {"scaling": DIM**-0.5}


def bidirectional(device: torch.device | str, dtype: torch.dtype) -> Arguments:
    return {name: x for name, x in linear(device, dtype).items() if name != "return_state"}


def bidirectional_transfer(device: torch.device | str, dtype: torch.dtype) -> Arguments:
    return {name: x for name, x in bidirectional(device, dtype).items() if name != "v"} | {"scaling": DIM**-0.5}


def transfer(device: torch.device | str, dtype: torch.dtype) -> Arguments:
    return {name: x for name, x in hybrid(device, dtype).items() if name not in ("v", "return_state")}


def heads(device: torch.device | str, dtype: torch.dtype) -> Arguments:
    common, _, generator = _qkv(device, dtype)
    return {"y": common["q"], "gain": torch.rand(HEADS, generator=generator).to(device), "eps": 1e-5}


def outputs(device: torch.device | str, dtype: torch.dtype) -> Arguments:
    common, _, _ = _qkv(device, dtype)
    return {"student": common["k"], "teacher": common["v"]}
