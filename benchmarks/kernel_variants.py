"""The kernels that `benchmarks.check_kernels` compiles, by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from surgery.kernels.triton import (
    bidirectional,
    bidirectional_kernels,
    channel_configs,
    channel_far,
    channel_gradients,
    channel_sweeps,
    delta,
    delta_backward,
    delta_channel,
    delta_channel_backward,
    delta_channel_forward,
    delta_forward,
    mesa,
    norm,
    slot_kernels,
    sweeps,
)
from surgery.kernels.triton.channel import Call
from surgery.kernels.triton.configs import GATE_GRADIENT, NORMALIZED, PLAIN, config, padded


class Variant(NamedTuple):
    """One kernel as it is compiled: which of its options hold, its sizes and its launch options."""

    sweep: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, Any]


def variants(gate: int, features: int, columns: int, groups: int, normalize: bool) -> Iterator[Variant]:
    """The four sweeps of one kind of attention, everything optional switched on."""
    heads = {"H": 8 * groups, "H_S": 8}
    flags = {"GATE": gate, "DOCUMENTS": True, "NORMALIZE": normalize, "PRECISION": "ieee", "INTERPRET": False}
    gradient = GATE_GRADIENT if gate else PLAIN
    widths = {"F_WIDTH": features, "D_WIDTH": columns, "H_KV": 8}

    def sized(kind: str, score: int, output: int, names: tuple[str, str]) -> tuple[dict[str, int], dict[str, int]]:
        chunk, cut, warps, stages = config(kind, score, output, 16)
        return {"C": chunk, names[0]: padded(score), names[1]: cut}, {"num_warps": warps, "num_stages": stages}

    sizes, options = sized(NORMALIZED if normalize else PLAIN, features, columns, ("F", "D"))
    yield Variant("y", sweeps.output_sweep, {**heads, **flags, **widths, **sizes, "CARRIED": True}, options)
    sizes, options = sized(gradient, columns, features, ("D", "F"))
    some = {"CARRIED": True, "GATE_GRADIENT": gate > 0}
    yield Variant("dq", sweeps.query_sweep, {**heads, **flags, **widths, **sizes, **some}, options)
    for name, score, output in (("dk", columns, features), ("dv", features, columns)):
        sizes, options = sized(gradient if name == "dk" else PLAIN, score, output, ("A", "X"))
        keys = name == "dk"
        some = {"H_A": 8, "A_WIDTH": score, "X_WIDTH": output, "EXCESS": keys and normalize, "DS_AFTER": True}
        some |= {"DZ_AFTER": keys and normalize, "DS": not keys, "DZ": keys and normalize}
        some |= {"GATE_GRADIENT": keys and gate > 0}
        yield Variant(name, sweeps.key_sweep, {**heads, **flags, **sizes, **some}, options)


def channel_variants(features: int, columns: int, groups: int, normalize: bool) -> Iterator[Variant]:
    """The same of the kernels with a gate per channel."""
    heads = {"q": 8 * groups, "k": 8, "v": 8}
    sizes = {n: (1, 64, h, columns if n == "v" else features) for n, h in heads.items()}
    q, k, v = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes.values())
    call = Call(q, k, v, k, torch.empty(1, 64, dtype=torch.int32, device="meta"), normalize)
    forward = {"CARRIED": True, "STATES": True, "REST": normalize, "MAKE": False}
    fused = {"CARRIED": True, "STATES": False, "REST": False, "MAKE": True, "DOCUMENTS": False}
    backward = {"DS_AFTER": True, "DZ_AFTER": normalize, "DS": True, "DZ": normalize, "GATE": True}
    for name, kernel, row, more in (
        ("made", channel_sweeps.prepare, channel_configs.PREPARE, {}),
        ("y", channel_sweeps.output_sweep, channel_configs.SWEEP, forward),
        ("fused y", channel_sweeps.output_sweep, channel_configs.SWEEP, fused),
        ("dv", channel_sweeps.value_sweep, channel_configs.SWEEP, backward),
        ("dqk", channel_gradients.key_query_gradients, channel_configs.GRADIENTS, backward),
        ("far y", channel_far.far_outputs, channel_configs.FAR, forward),
        ("far dqk", channel_far.far_key_query_gradients, channel_configs.GRADIENTS, backward),
        ("far dv", channel_far.far_value_gradients, channel_configs.FAR, {}),
    ):
        if more is fused and (groups > 1 or normalize):
            continue
        told = call.told(kernel, call.tile(row), INTERPRET=False, **more)
        options = {n: told.pop(n) for n in ("num_warps", "num_stages", "maxnreg")}
        yield Variant(name, kernel, told, options)


def delta_variants(features: int, columns: int, groups: int, _: bool) -> Iterator[Variant]:
    """The kernels of the delta rule with a gate per head, everything optional switched on."""
    sizes = {"q": (8 * groups, features), "k": (8, features), "v": (8, columns)}
    q, k, v = (torch.empty(1, 64, *sizes[n], dtype=torch.bfloat16, device="meta") for n in "qkv")
    beta = torch.empty(1, 64, 8, device="meta")
    call = delta.Call(q, k, v, beta, beta, beta.int(), 1.0)
    for name, kernel, cut in (
        ("inverse", delta_forward.inverses, "D"),
        ("S", delta_forward.state_sweep, "D"),
        ("y", delta_forward.outputs, "D"),
        ("du", delta_backward.local_gradients, "D"),
        ("dS", delta_backward.gradient_sweep, "D"),
        ("dqk", delta_backward.chunk_gradients, "F"),
    ):
        flags = {"CARRIED": True, "DS_AFTER": True, "DS": True, "GATE_GRADIENT": True, "INTERPRET": False}
        told = call.told(kernel, cut, **flags)
        options = {n: told.pop(n) for n in ("num_warps", "num_stages")}
        yield Variant(name, kernel, told, options)


def slot_variants(slots: int, columns: int, groups: int, _: bool) -> Iterator[Variant]:
    """What slots have beside attention with a gate per channel, everything optional switched on."""
    sizes = {"q": (8 * groups, slots), "k": (8, slots), "v": (8, columns)}
    q, k, v = (torch.empty(1, 64, *sizes[n], dtype=torch.bfloat16, device="meta") for n in "qkv")
    call = Call(q, k, v, k, torch.empty(1, 64, dtype=torch.int32, device="meta"), False)
    tile = channel_configs.tile(channel_configs.LOGITS, columns, slots, 16)
    widths = {"D_WIDTH": columns, "M_WIDTH": slots, "D": tile.channels, "M": tile.columns}
    for name, kernel in (("logits", slot_kernels.logit_sweep), ("far logits", slot_kernels.far_logits)):
        told = call.told(kernel, tile, CARRIED=True, INTERPRET=False, **widths)
        options = {n: told.pop(n) for n in ("num_warps", "num_stages", "maxnreg")}
        yield Variant(name, kernel, told, options)


def norm_variants(features: int, columns: int, groups: int, _: bool) -> Iterator[Variant]:
    """The kernels of a norm, which knows no features and no groups."""
    if features != columns:
        return
    told = norm.told(torch.empty(1, 64, 8 * groups, columns, dtype=torch.bfloat16, device="meta"))[1]
    for name, kernel in (("normed", norm.norm_rows), ("dy", norm.norm_gradients)):
        yield Variant(name, kernel, told | {"INTERPRET": False}, {})


def kda_variants(features: int, columns: int, groups: int, _: bool) -> Iterator[Variant]:
    """The same of the kernels with a gate per channel."""
    sizes = {"q": (8 * groups, features), "k": (8, features), "v": (8, columns)}
    q, k, v = (torch.empty(1, 64, *sizes[n], dtype=torch.bfloat16, device="meta") for n in "qkv")
    beta = torch.empty(1, 64, 8, device="meta")
    call = delta_channel.Call(q, k, v, beta, beta, beta.int(), 1.0)
    for name, kernel in (
        ("kda made", delta_channel_forward.decayed),
        ("kda inverse", delta_channel_forward.inverses),
        ("kda weights", delta_channel_forward.pair_weights),
        ("kda S", delta_channel_forward.state_sweep),
        ("kda y", delta_channel_forward.outputs),
        ("kda du", delta_channel_backward.local_gradients),
        ("kda dS", delta_channel_backward.gradient_sweep),
        ("kda pairs", delta_channel_backward.pair_gradients),
        ("kda states", delta_channel_backward.state_gradients),
        ("kda dqk", delta_channel_backward.feature_gradients),
        ("kda far dqk", delta_channel_backward.feature_gradients),
    ):
        flags = {"CARRIED": True, "DS_AFTER": True, "DS": True, "NEAR": "far" not in name, "INTERPRET": False}
        told = call.told(kernel, **flags)
        options = {n: told.pop(n) for n in ("num_warps", "num_stages")}
        yield Variant(name, kernel, told, options)


def both_variants(features: int, columns: int, groups: int, normalize: bool) -> Iterator[Variant]:
    """The passes of attention without causality, of padded rows, without documents and with them."""
    if not normalize:
        return
    sizes = {"q": (8 * groups, features), "k": (8, features), "v": (8, columns)}
    q, k, v = (torch.empty(1, 64, *sizes[n], dtype=torch.bfloat16, device="meta") for n in "qkv")
    start = torch.empty(1, 64, dtype=torch.int32, device="meta")
    for packed in (False, True):
        call = bidirectional.Call(q, k, v, start.bool(), *((start, start) if packed else (None, None)))
        for name, kernel, told in (
            ("S", bidirectional_kernels.sums, call.told_sums(False)),
            ("y", bidirectional_kernels.outputs, call.told_outputs()),
            ("dq", bidirectional_kernels.query_gradients, call.told_queries()),
            ("dS", bidirectional_kernels.sums, call.told_sums(True)),
            ("dk", bidirectional_kernels.key_gradients, call.told_keys(True)),
            ("dv", bidirectional_kernels.key_gradients, call.told_keys(False)),
        ):
            told |= {"INTERPRET": False}
            options = {n: told.pop(n) for n in ("num_warps", "num_stages")}
            yield Variant(f"{'packed' if packed else 'both'} {name}", kernel, told, options)


def solver_variants(features: int, columns: int, groups: int, _: bool) -> Iterator[Variant]:
    """The kernel of test-time regression, which knows no features."""
    if features != columns:
        return
    told = mesa.told(64, groups, columns, False) | {"INTERPRET": False}
    options = {n: told.pop(n) for n in ("num_warps", "num_stages")}
    yield Variant("solved", mesa.solve_kernel, told, options)


Variants = Callable[[int, int, int, bool], Iterator[Variant]]


def plain_alone(found: Variants) -> Variants:
    """Of what has no normaliser."""
    return lambda *sizes: iter(()) if sizes[-1] else found(*sizes)


KINDS: dict[str, Variants] = {
    "none": partial(variants, 0),
    "fixed": partial(variants, 1),
    "scalar": partial(variants, 2),
    "channel": channel_variants,
    "delta": plain_alone(delta_variants),
    "kda": plain_alone(kda_variants),
    "slots": plain_alone(slot_variants),
    "norm": plain_alone(norm_variants),
    "solver": plain_alone(solver_variants),
    "both": both_variants,
}
"""By the kind of gate or rule: features, columns, groups, normalised -> the kernels."""
