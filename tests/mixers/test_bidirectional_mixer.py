"""`bidirectional`: how near it comes to softmax, with features that are rich enough and with features that learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mixer_cases import SHAPE, close, context
from pydantic import TypeAdapter

from surgery.mixers import Mixer, MixerConfig

ENCODER = replace(SHAPE, kv_heads=SHAPE.heads, causal=False)


def build(options: dict | None = None, **feature_map) -> Mixer:
    config = {"kind": "bidirectional", "feature_map": feature_map} | (options or {})
    return TypeAdapter(MixerConfig).validate_python(config).build(ENCODER).double()


def softmax(call) -> torch.Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", call.q, call.k) * call.scaling
    if call.lengths is not None:
        scores = scores.masked_fill(~call.valid[:, None, None], float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), call.v)


def test_wide_features_approximate_softmax():
    """All products of two channels are the exponential's series up to the square of a score."""
    call = replace(context(30, shape=ENCODER), lengths=torch.tensor([30, 17]))
    errors = []
    for size in (0.5, 0.25):
        small = replace(call, q=call.q * size, k=call.k * size)
        error = (build(kind="taylor2")(small)[0] - softmax(small))[call.valid]
        errors.append(float(error.norm() / softmax(small)[call.valid].norm()))
    # the first term left out is the cube of scores a quarter as large
    assert errors[0] < 0.1 and errors[1] < errors[0] / 10


def test_features_learn_the_softmax():
    call, mixer = context(24, shape=ENCODER), build(kind="hedgehog")
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.05)

    def error() -> float:
        with torch.no_grad():
            return float((mixer(call)[0] - softmax(call)).square().mean())

    before, losses = error(), []
    for _ in range(60):
        loss = mixer.cross_entropy(call).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] and error() < before / 2


@pytest.mark.parametrize("options", [{}, {"eps": 0.5, "residual": {"reduction": 2}}], ids=["plain", "residual"])
def test_order_padding_and_packing(options):
    mixer, call = build(options, kind="hedgehog"), context(20, shape=ENCODER)
    torch.manual_seed(0)
    for name, parameter in mixer.named_parameters():
        if name.startswith("residual"):
            torch.nn.init.normal_(parameter)
    whole = mixer(call)[0]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert close(mixer(call.map(lambda x: x[:, order]))[0], whole[:, order])
    lengths = torch.tensor([20, 9])
    padded = mixer(replace(call, lengths=lengths))[0]
    assert close(padded[0], whole[0]) and close(padded[1:, :9], mixer(call.map(lambda x: x[1:, :9]))[0])
    packed = mixer(replace(call, segments=(torch.arange(20) >= 9).long().expand(2, -1)))[0]
    parts = [mixer(call.map(lambda x, part=part: x[:, part]))[0] for part in (slice(0, 9), slice(9, 20))]
    assert close(packed, torch.cat(parts, 1))


def test_residuals_start_at_zero_and_move_queries_and_keys():
    call, plain = context(12, shape=ENCODER), build(kind="elu1")
    mixer = build({"residual": {}}, kind="elu1")
    assert mixer.needs == {"hidden_states"} and not plain.needs
    assert torch.equal(mixer(call)[0], plain(call)[0])
    with torch.no_grad():
        mixer.residual_q.up_bias.add_(1)
        mixer.residual_k.up_bias.add_(2)
    moved = replace(call, q=call.q + 1, k=call.k + 2)
    assert close(mixer(call)[0], plain(moved)[0])


def test_it_has_no_state():
    mixer, call = build(kind="hedgehog"), context(5, shape=ENCODER)
    assert mixer.init_state(2, device="cpu", dtype=torch.float32) == {} and mixer.state_bytes(torch.float32) == 0
    for arguments in ({"state": {}}, {"return_state": True}):
        with pytest.raises(TypeError, match="no state"):
            mixer(call, **arguments)
