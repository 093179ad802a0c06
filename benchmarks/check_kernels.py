"""Compile the kernels' 16-bit configurations for several GPUs without one: `python -m benchmarks.check_kernels`.

For every sweep prints registers, bytes spilled and shared memory, as the assembler reports them, and fails if any
spills more than ALLOWED, needs more shared memory than the device has, does without tensor cores, or multiplies tiles
of several layouts, of which ptxas 12.8 mixes up the addresses.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from surgery.kernels.triton import (
    channel_configs,
    channel_far,
    channel_gradients,
    channel_sweeps,
    configs,
    delta,
    delta_backward,
    delta_forward,
    sweeps,
)
from surgery.kernels.triton.channel import Call
from surgery.kernels.triton.configs import GATE_GRADIENT, NORMALIZED, PLAIN, config, padded

# bytes of shared memory a program may have
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
POINTERS = {"gate_ptr": "*fp32", "document_ptr": "*i32", "states_ptr": "*bf16"}
SINGLE = ("S_ptr", "z_ptr", "mass_ptr", "S_after_ptr", "z_after_ptr", "excess_ptr", "factor_ptr", "dgate_ptr", "zs_ptr")
SINGLE += ("beta_ptr", "dbeta_ptr", "dS_after_ptr", "dz_after_ptr", "dS_ptr", "dz_ptr", "dzs_ptr", "near_ptr")
SINGLE += ("inverse_ptr", "total_ptr", "S_end_ptr", "z_end_ptr")
SCALARS = {"scale": "fp32", "eps": "fp32"}
SCALARS |= dict.fromkeys(("T", "stride_a", "stride_x", "span", "groups"), "i32")
CHANNEL, DELTA = 3, 4
"""A gate per channel, and the delta rule, among the kinds that --gate takes."""
FASTEST, UNTUNED, RARE, EARLIER = (
    "more warps or narrower tiles spill less and are slower on an H100: benchmarks/results/tune.json",
    "right on an H100, not tuned there yet",
    "only chunks that decay by more than 2^-128 come here",
    "compiled only, never run before Hopper: narrower tiles spill less and read everything more often",
)
ALLOWED: dict[str, tuple[int, str]] = {
    # of gated and linear attention and the delta rule; those of y and dv hold for all kinds of gates
    # normalised ones keep what rounding takes, which is most of it
    "y": (2500, UNTUNED), "dq": (1300, UNTUNED), "dk": (1600, FASTEST), "dv": (2000, UNTUNED), "dqk": (600, UNTUNED),
    "fused y": (300, UNTUNED), "dS": (100, UNTUNED),
    "far y": (10**6, RARE), "far dqk": (10**6, RARE), "far dv": (10**6, RARE),
    # of windows and hybrids
    "tile_outputs": (100, FASTEST), "query_gradients": (1100, FASTEST), "feature_gradients": (500, FASTEST),
    "key_gradients": (1000, FASTEST), "sink_gradients": (900, UNTUNED),
}  # fmt: skip
"""Bytes that a kernel may spill, stores and loads together, and why."""
BEFORE_HOPPER = ALLOWED | {"inverse": (100, EARLIER), "dqk": (1700, EARLIER), "row_gradients": (100, EARLIER)}


class Variant(NamedTuple):
    """One kernel as it is compiled: which of its options hold, its sizes and its launch options."""

    sweep: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, Any]


def variants(features: int, columns: int, groups: int, gate: int, normalize: bool) -> Iterator[Variant]:
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


def delta_variants(features: int, columns: int, groups: int) -> Iterator[Variant]:
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


def compiled(variant: Variant, arch: int, dtype: str) -> Any:
    """What Triton makes of it, with the alignment that launches have."""
    names = list(inspect.signature(variant.kernel.fn).parameters)
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        else:
            signature[name] = POINTERS.get(name, "*fp32" if name in SINGLE else f"*{dtype}")
            if name == "gate_ptr" and variant.constants.get("MAKE"):
                signature[name] = f"*{dtype}"
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, variant.constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)


def assembled(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled."""
    assembler = triton.knobs.nvidia.ptxas.path
    name = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", f"--gpu-name={name}", file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(x) for x in re.findall(r"(\d+) bytes spill", log))
    return max(int(x) for x in re.findall(r"Used (\d+) registers", log)), spills


def judge(kernel: Any, arch: int, name: str) -> tuple[str, list[str]]:
    """A line of the table, and what is wrong."""
    ptx = kernel.asm["ptx"]
    registers, spills = assembled(ptx, arch)
    product = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "none"
    shared = kernel.metadata.shared
    # of the operands of products: the highest bits of their descriptors
    layouts = {int(x) >> 62 & 3 for x in re.findall(r"or\.b64\s+%rd\d+, %rd\d+, (-?\d{10,});", ptx)}
    wrong = []
    allowed = ALLOWED if arch >= configs.HOPPER else BEFORE_HOPPER
    if spills > allowed.get(name, (0, ""))[0]:
        wrong.append(f"{spills} bytes spilled")
    if shared > SHARED[arch]:
        wrong.append("too much shared memory")
    if len(layouts) > 1:
        wrong.append("tiles of several layouts")
    if "tt.dot" in kernel.asm["ttir"] and product != ("wgmma" if arch == 90 else "mma"):
        wrong.append(f"products by {product}")
    return f"{registers:9d} {spills:6d} {shared / 1024:6.0f} {product:>6}", wrong


def found(features: int, columns: int, groups: int, gate: int, normalize: bool, arch: int) -> Iterator[Variant]:
    """Those of one kind of attention, as that GPU runs them."""
    with patch.object(configs, "architecture", lambda: arch):
        if gate == CHANNEL:
            yield from channel_variants(features, columns, groups, normalize)
        elif gate != DELTA:
            yield from variants(features, columns, groups, gate, normalize)
        elif not normalize:
            yield from delta_variants(features, columns, groups)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED), choices=list(SHARED))
    parser.add_argument("--dim", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--features", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--square", action="store_true", help="only as many features as columns")
    parser.add_argument("--dtype", nargs="*", default=["bf16", "fp16"])
    parser.add_argument("--group", type=int, nargs="*", default=[1, 4], help="query heads that share a state")
    parser.add_argument(
        "--gate",
        type=int,
        nargs="*",
        default=[0, 1, 2, 3, 4],
        help="0 none, 1 fixed, 2 scalar, 3 channel, 4 the delta rule with a scalar one",
    )
    parser.add_argument("--plain", action="store_true", help="leave normalised attention out")
    chosen = parser.parse_args(arguments)
    failed = 0
    print("sm  dtype    F    D group gate norm sweep chunk cols warps registers spills smem/K product")
    for arch in chosen.arch:
        for dtype in chosen.dtype:
            for features in chosen.features:
                for dim in chosen.dim:
                    if chosen.square and features != dim:
                        continue
                    for group in chosen.group:
                        for gate in chosen.gate:
                            for normalize in (False,) if chosen.plain else (False, True):
                                for v in found(features, dim, group, gate, normalize, arch):
                                    line, wrong = judge(compiled(v, arch, dtype), arch, v.sweep)
                                    c = v.constants
                                    cut = c.get("X", c.get("D" if v.sweep == "y" else "F"))
                                    head = f"{arch}  {dtype:5} {features:4} {dim:4} {group:5} {gate:4} {normalize:4}"
                                    head += f" {v.sweep:>5} {c['C']:5} {cut:4} {v.options['num_warps']:5}"
                                    print(head, line, "; ".join(wrong), flush=True)
                                    failed += bool(wrong)
    print(f"{failed} failed" if failed else "all compile")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
