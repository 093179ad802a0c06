"""Every mixer in its main configurations, and calls for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import TypeAdapter
from torch import Tensor

from surgery.mixers import AttentionContext, AttentionShape, Mixer, MixerConfig

WINDOW = {"size": 6}
TERRACED = {"size": 4, "layout": "terraced", "sinks": 2}
KAIMING = {"kind": "hedgehog", "features": 5, "init": "kaiming"}

CONFIGS: dict[str, dict] = {
    "hedgehog": {"kind": "linear"},
    "t2r": {"kind": "linear", "feature_map": {"kind": "relu", "features": 9}, "rope": "raw"},
    "taylor2": {"kind": "linear", "feature_map": {"kind": "taylor2"}},
    "lolcats": {
        "kind": "linear",
        "feature_map": KAIMING,
        "state": "head",
        "window": WINDOW,
        "mix": {"kind": "joint"},
    },
    "lolcats-terraced": {"kind": "linear", "feature_map": KAIMING, "window": TERRACED, "mix": {"kind": "joint"}},
    "lolcats-raw": {
        "kind": "linear",
        "rope": "raw",
        "window": {"size": 6, "sinks": 3},
        "mix": {"kind": "joint", "learned": False},
    },
    "logmass": {"kind": "linear", "window": WINDOW, "mix": {"kind": "logmass"}},
    "logmass-head": {
        "kind": "linear",
        "feature_map": {"kind": "exp", "features": 5},
        "state": "head",
        "window": TERRACED,
        "mix": {"kind": "logmass"},
    },
    "linear-average": {
        "kind": "linear",
        "feature_map": {"kind": "elu1"},
        "rope": "raw",
        "window": {"size": 6, "sinks": 1},
        "mix": {"kind": "average", "weight": 0.3},
    },
    "liger": {"kind": "gla", "window": WINDOW},
    "gla": {"kind": "gla", "window": None, "mix": None, "gate": {"kind": "key", "normalizer": 2}},
    "gla-constant": {"kind": "gla", "window": WINDOW, "gate": {"kind": "constant", "shortest": 2, "longest": 64}},
    "gla-low-rank": {
        "kind": "gla",
        "window": WINDOW,
        "gate": {"kind": "low_rank", "rank": 3, "normalizer": 2, "shortest": 2, "longest": 64},
    },
    "gla-hidden": {
        "kind": "gla",
        "window": None,
        "mix": None,
        "normalize": "rms",
        "eps": 1e-3,
        "gate": {"kind": "low_rank", "source": "hidden", "rank": 3, "normalizer": 2, "shortest": 2, "longest": 64},
    },
    "gla-rotated": {
        "kind": "gla",
        "rope": "rotated",
        "state": "head",
        "feature_map": {"kind": "hedgehog", "features": 4},
        "window": TERRACED,
    },
    "lightning": {"kind": "lightning", "window": WINDOW},
    "lightning-z": {
        "kind": "lightning",
        "feature_map": {"kind": "softmax"},
        "gate": {"kind": "retention"},
        "normalize": "z",
        "state": "head",
        "rope": "raw",
        "window": None,
        "mix": None,
    },
    "lightning-learned": {
        "kind": "lightning",
        "feature_map": KAIMING,
        "gate": {"kind": "spread", "shortest": 2, "longest": 64},
        "state": "head",
        "window": TERRACED,
    },
    "lizard": {"kind": "gated_scalar", "window": {"size": 6, "sinks": 2}, "gate": {"kind": "sigmoid", "shortest": 4}},
    "mamba2": {
        "kind": "gated_scalar",
        "feature_map": {"kind": "identity"},
        "gate": {"kind": "mamba2", "shortest": 2},
        "normalize": "none",
        "state": "head",
        "rope": "rotated",
        "window": None,
        "mix": None,
    },
    "mlstm": {
        "kind": "gated_scalar",
        "feature_map": {"kind": "softmax"},
        "gate": {"kind": "sigmoid", "shortest": 2},
        "input_gate": "exp",
        "window": TERRACED,
    },
    "norm": {"kind": "norm"},
    "norm-window": {
        "kind": "norm",
        "feature_map": {"kind": "relu"},
        "gate": {"kind": "slopes", "by_layer": False},
        "window": {"size": 6, "layout": "block"},
        "mix": {"kind": "average"},
    },
    "mlstm-head": {
        "kind": "gated_scalar",
        "feature_map": KAIMING,
        "state": "head",
        "input_gate": "exp",
        "normalize": "rms",
        "window": WINDOW,
    },
    "mesa": {"kind": "mesa", "window": WINDOW, "gate": {"kind": "sigmoid", "shortest": 4}},
    "mesa-rotated": {
        "kind": "mesa",
        "gate": {"kind": "spread", "shortest": 2, "longest": 64},
        "steps": 12,
        "rope": "rotated",
        "window": None,
        "mix": None,
    },
    "delta": {"kind": "delta", "window": WINDOW},
    "delta-key": {
        "kind": "delta",
        "feature_map": {"kind": "hedgehog", "features": 4},
        "beta": {"source": "key", "maximum": 2},
        "normalize": "rms",
        "state": "head",
        "rope": "rotated",
        "window": None,
        "mix": None,
    },
    "gated-delta": {"kind": "gated_delta", "window": WINDOW, "gate": {"kind": "mamba2", "shortest": 2}},
    "gated-delta-learned": {
        "kind": "gated_delta",
        "gate": {"kind": "spread", "shortest": 2, "longest": 64},
        "window": TERRACED,
    },
    "kda": {
        "kind": "kda",
        "window": WINDOW,
        "gate": {"kind": "low_rank", "rank": 3, "normalizer": 2, "shortest": 2, "longest": 64},
    },
    "kda-key": {
        "kind": "kda",
        "feature_map": {"kind": "softmax"},
        "gate": {"kind": "key", "normalizer": 2},
        "beta": {"source": "key"},
        "rope": "rotated",
        "window": None,
        "mix": None,
    },
    "gsa": {"kind": "gsa", "window": WINDOW},
    "gsa-pooled": {
        "kind": "gsa",
        "slots": 4,
        "gate": {"kind": "key", "normalizer": 2},
        "scale": 1,
        "rope": "rotated",
        "window": None,
        "mix": None,
    },
    "hgrn2": {"kind": "hgrn2", "window": WINDOW},
    "hgrn2-low-rank": {
        "kind": "hgrn2",
        "feature_map": {"kind": "relu"},
        "gate": {"kind": "low_rank", "rank": 3, "normalizer": 2, "shortest": 2, "longest": 64},
        "rope": "rotated",
        "window": None,
        "mix": None,
    },
}

WITHOUT_HISTORY: dict[str, dict] = {
    "window": {"kind": "window", "window": WINDOW},
    "diag": {"kind": "diag", "window": {"size": 8, "layout": "block"}},
    "window-sinks": {"kind": "window", "window": TERRACED},
}
CONFIGS |= WITHOUT_HISTORY

SHAPE = AttentionShape(heads=4, kv_heads=2, head_dim=8, hidden_size=32, layer=1, layers=3)


def build(name: str, dtype: torch.dtype = torch.float64, shape: AttentionShape = SHAPE, **changes) -> Mixer:
    """The mixer with parameters away from their initial values, so that each of them matters."""
    mixer = TypeAdapter(MixerConfig).validate_python(CONFIGS[name] | changes).build(shape).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.5
    return mixer


def context(
    tokens: int, batch: int = 2, dtype: torch.dtype = torch.float64, shape: AttentionShape = SHAPE, seed: int = 0
) -> AttentionContext:
    """A call with everything that a mixer may need."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        size = (batch, tokens, heads, shape.head_dim)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v, raw_q, raw_k = (draw(n) for n in (shape.heads, *[shape.kv_heads] * 2, shape.heads, shape.kv_heads))
    hidden_states = torch.randn(batch, tokens, shape.hidden_size, generator=generator, dtype=torch.float64).to(dtype)
    return AttentionContext(q, k, v, shape.head_dim**-0.5, raw_q=raw_q, raw_k=raw_k, hidden_states=hidden_states)


def span(full: AttentionContext, start: int, stop: int) -> AttentionContext:
    return full.map(lambda x: x[:, start:stop])


def row(full: AttentionContext, index: int) -> AttentionContext:
    lengths = None if full.lengths is None else full.lengths[index : index + 1]
    return replace(full.map(lambda x: x[index : index + 1]), lengths=lengths)


def close(found, expected, tolerance: float = 1e-10) -> bool:
    """Whether outputs, or outputs and states, agree relative to their largest values."""
    if isinstance(found, dict):
        return list(found) == list(expected) and all(close(found[name], expected[name], tolerance) for name in found)
    if isinstance(found, tuple):
        return all(close(x, y, tolerance) for x, y in zip(found, expected, strict=True))
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    assert found.isfinite().all()
    return float((found - expected).abs().max()) <= tolerance * max(float(expected.abs().max()), 1e-3)
