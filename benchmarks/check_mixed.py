"""Compile window and hybrid attention, the hedgehog map and the attention-weight cross-entropy for several GPUs without
one: `python -m benchmarks.check_mixed`.

Takes each launch of a call and its gradients as the operation would make it, and judges it as `check_kernels` does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.check_kernels import SHARED, judge
from benchmarks.launches import Launch, recorded
from surgery import kernels
from surgery.kernels import Features, Joint, LogMass, Window, linear_state, window_state
from surgery.kernels.triton import hedgehog, hybrid, mixed, transfer

HEADS, KV_HEADS, TOKENS = 32, 8, 192
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SLIDING, TERRACED, SINKS = Window(64), Window(64, "terraced"), Window(64, sinks=4)


def tensors(dim: int, features: int, dtype: torch.dtype) -> dict[str, Any]:
    def draw(heads: int) -> Tensor:
        return torch.zeros(1, TOKENS, heads, dim, dtype=dtype, requires_grad=True)

    def parameter(*size: int) -> Tensor:
        return torch.zeros(size, requires_grad=True)

    options: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    state = window_state(1, SINKS, KV_HEADS, dim, **options) | linear_state(1, KV_HEADS, features, dim, **options)
    return {
        "qkv": {"q": draw(HEADS), "k": draw(KV_HEADS), "v": draw(KV_HEADS)},
        "maps": {
            "features_q": Features("hedgehog", parameter(HEADS, dim, features // 2)),
            "features_k": Features("hedgehog", parameter(KV_HEADS, dim, features // 2)),
        },
        "joint": Joint(parameter(HEADS)),
        "logmass": LogMass(parameter(HEADS, dim), parameter(HEADS), parameter(KV_HEADS, dim), parameter(KV_HEADS)),
        "segments": torch.zeros(1, TOKENS, dtype=torch.int64),
        "state": {n: x.requires_grad_() if x.is_floating_point() else x for n, x in state.items()},
    }


def calls(dim: int, features: int, dtype: torch.dtype) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, operation and arguments; `more` is everything optional."""
    t = tensors(dim, features, dtype)
    near = t["qkv"] | {"scaling": 1.0, "window": SLIDING}
    joint, logmass = t["maps"] | {"mix": t["joint"]}, t["maps"] | {"mix": t["logmass"]}
    packed = {"segments": t["segments"], "softcap": 30.0}
    more = packed | {"window": SINKS, "state": t["state"], "return_state": True}
    yield "window", kernels.window_attention, near
    yield "window, more", kernels.window_attention, near | more
    for name, mix in (("joint", joint), ("logmass", logmass), ("logmass, swept", logmass)):
        yield name, kernels.hybrid_attention, near | mix
        yield f"{name}, more", kernels.hybrid_attention, near | mix | more
    yield "terraced", kernels.hybrid_attention, near | logmass | {"window": TERRACED}
    pairs = {"q": t["qkv"]["q"].detach(), "k": t["qkv"]["k"].detach(), "scaling": 1.0}
    yield "transfer", kernels.attention_cross_entropy, pairs | t["maps"]
    yield "transfer, joint", kernels.attention_cross_entropy, pairs | joint | {"window": SLIDING}
    limited = packed | {"window": TERRACED, "limit": 64}
    yield "transfer, more", kernels.attention_cross_entropy, pairs | logmass | limited


def launches(
    dim: int, features: int, dtype: torch.dtype, room: int, only: list[str] | None = None
) -> Iterator[tuple[str, Launch]]:
    """Every kernel once in each way it is compiled. room: of shared memory, in bytes. only: names of calls."""
    seen = set()
    for name, op, arguments in calls(dim, features, dtype):
        if only and name not in only:
            continue
        # on a machine without a GPU operations take tensors only for the interpreter
        free, roomy = patch.object(hybrid, "INTERPRET", True), patch.object(transfer, "room", lambda _: room)
        swept = patch.object(mixed, "FEW", 0 if "swept" in name else mixed.FEW)
        with free, roomy, swept, recorded(mixed, hedgehog, transfer) as found:
            result = op.triton(**arguments)
            y = result if isinstance(result, Tensor) else result[0]
            y.sum().backward()
        for launch in found:
            key = launch.name, str(launch.source.constants), str(launch.source.signature), str(launch.options)
            if key not in seen:
                seen.add(key)
                yield name, launch


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED), choices=list(SHARED))
    parser.add_argument("--dim", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--features", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--square", action="store_true", help="only as many features as columns")
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--call", nargs="*", help="the names in the table of those to compile")
    chosen = parser.parse_args(arguments)
    failed = 0
    print("sm  dtype    F    D call            kernel            warps stages registers spills smem/K product")
    for arch in chosen.arch:
        for dtype in chosen.dtype:
            for features in chosen.features:
                for dim in chosen.dim:
                    if chosen.square and features != dim:
                        continue
                    room = SHARED[arch] + 1024
                    for name, launch in launches(dim, features, DTYPES[dtype], room, chosen.call):
                        line, wrong = judge(launch.compiled(arch), arch, launch.name)
                        head = f"{arch}  {dtype:5} {features:4} {dim:4} {name:15} {launch.name:17}"
                        options = "".join(f" {launch.options.get(x, 0):5}" for x in ("num_warps", "num_stages"))
                        print(head, options, line, "; ".join(wrong), flush=True)
                        failed += bool(wrong)
    print(f"{failed} failed" if failed else "all compile")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
