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
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernel_variants import KINDS, Variant
from surgery.kernels.triton import configs, mesa

# bytes of shared memory a program may have
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
POINTERS = {"gate_ptr": "*fp32", "document_ptr": "*i32", "states_ptr": "*bf16"}
POINTERS |= {"valid_ptr": "*i1", "start_ptr": "*i32", "end_ptr": "*i32"}
POINTERS |= dict.fromkeys(("key_ptr", "key_rest_ptr", "before_ptr", "before_rest_ptr"), "*bf16")
SINGLE = ("S_ptr", "z_ptr", "mass_ptr", "S_after_ptr", "z_after_ptr", "excess_ptr", "factor_ptr", "dgate_ptr", "zs_ptr")
SINGLE += ("beta_ptr", "dbeta_ptr", "dS_after_ptr", "dz_after_ptr", "dS_ptr", "dz_ptr", "dzs_ptr", "near_ptr")
SINGLE += ("inverse_ptr", "total_ptr", "S_end_ptr", "z_end_ptr", "logit_ptr", "u_ptr", "du_ptr", "dr_ptr")
SINGLE += ("gain_ptr", "dgain_ptr", "q_since_ptr", "k_since_ptr", "k_until_ptr", "weight_ptr", "dA_ptr", "dW_ptr")
SINGLE += ("state_ptr", "dstate_ptr", "share_ptr")
SINGLE += ("dq_part_ptr", "dk_part_ptr", "dgate_part_ptr")
SINGLE += ("decay_ptr", "kept_ptr", "ridge_ptr", "given_ptr", "solved_ptr")
SCALARS = {"scale": "fp32", "eps": "fp32"}
SCALARS |= dict.fromkeys(("T", "stride_a", "stride_x", "span", "groups", "tiles", "steps"), "i32")
FASTEST, UNTUNED, UNTRIED, RARE, EARLIER = (
    "more warps or narrower tiles spill less and are slower on an H100: benchmarks/results/tune.json",
    "right on an H100, not tuned there yet",
    "not run on a GPU yet",
    "only chunks that decay by more than 2^-128 come here",
    "compiled only, never run before Hopper: narrower tiles spill less and read everything more often",
)
ALLOWED: dict[str, tuple[int, str]] = {
    # of gated and linear attention and the delta rule; those of y and dv hold for all kinds of gates
    # normalised ones keep what rounding takes, which is most of it
    "y": (2500, UNTUNED), "dq": (1300, UNTUNED), "dk": (1600, FASTEST), "dv": (2000, UNTUNED), "dqk": (700, UNTUNED),
    "logits": (5000, UNTRIED), "solved": (2500, UNTRIED), "fused y": (300, UNTUNED), "S": (100, UNTUNED),
    "dS": (900, UNTUNED), "kda inverse": (100, UNTRIED), "kda weights": (1000, UNTRIED), "kda dS": (1000, UNTRIED),
    "kda pairs": (50, UNTRIED), "kda states": (250, UNTRIED), "kda dqk": (2000, UNTRIED),
    "kda far dqk": (3000, UNTRIED),
    "far y": (10**6, RARE), "far dqk": (10**6, RARE), "far dv": (10**6, RARE), "far logits": (10**6, RARE),
    # of windows and hybrids
    "tile_outputs": (100, FASTEST), "query_gradients": (1100, FASTEST), "feature_gradients": (500, FASTEST),
    "key_gradients": (1000, FASTEST), "sink_gradients": (900, UNTUNED),
}  # fmt: skip
"""Bytes that a kernel may spill, stores and loads together, and why."""
BEFORE_HOPPER = ALLOWED | {
    "inverse": (100, EARLIER), "dqk": (1700, EARLIER), "packed y": (200, EARLIER), "packed dq": (600, EARLIER),
    "packed dk": (200, EARLIER), "packed dv": (200, EARLIER), "row_gradients": (100, EARLIER),
}  # fmt: skip


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED), choices=list(SHARED))
    parser.add_argument("--dim", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--features", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--square", action="store_true", help="only as many features as columns")
    parser.add_argument("--dtype", nargs="*", default=["bf16", "fp16"])
    parser.add_argument("--group", type=int, nargs="*", default=[1, 4], help="query heads that share a state")
    parser.add_argument("--kind", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--plain", action="store_true", help="leave normalised attention out")
    chosen = parser.parse_args(arguments)
    failed = 0
    print("sm  dtype    F    D group kind    norm sweep chunk cols warps registers spills smem/K product")
    for arch in chosen.arch:
        for dtype in chosen.dtype:
            for features in chosen.features:
                for dim in chosen.dim:
                    if chosen.square and features != dim:
                        continue
                    for group in chosen.group:
                        for kind in chosen.kind:
                            if kind == "solver" and not mesa.fits(dim, SHARED[arch]):
                                continue
                            for normalize in (False,) if chosen.plain else (False, True):
                                with patch.object(configs, "architecture", lambda arch=arch: arch):
                                    found = list(KINDS[kind](features, dim, group, normalize))
                                for v in found:
                                    line, wrong = judge(compiled(v, arch, dtype), arch, v.sweep)
                                    c = v.constants
                                    cut = next(c[n] for n in ("X", "M", "D" if v.sweep == "y" else "F", "D") if n in c)
                                    head = f"{arch}  {dtype:5} {features:4} {dim:4} {group:5} {kind:7} {normalize:4}"
                                    chunk, warps = c.get("C", c.get("R")), v.options.get("num_warps", 4)
                                    head += f" {v.sweep:>5} {chunk:5} {cut:4} {warps:5}"
                                    print(head, line, "; ".join(wrong), flush=True)
                                    failed += bool(wrong)
    print(f"{failed} failed" if failed else "all compile")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
