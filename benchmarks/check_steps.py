"""Compile the kernels of a decode step for several GPUs without one: `python -m benchmarks.check_steps`.

Takes each launch as the operation would make it, and fails if it spills registers or needs too much shared memory.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.check_kernels import SHARED, assembled
from surgery import kernels
from surgery.kernels import Features, Joint, LogMass, Window, linear_state, slot_state, window_state
from surgery.kernels.triton import decay, mixed_step, slot_step, steps

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
}  # fmt: skip
HEADS, KV_HEADS = 32, 8
"""As in Llama 3."""
LENGTHS = torch.ones(1, dtype=torch.int64)
SPILLS = 64
"""Bytes that may spill."""


def cases(dim: int, dtype: torch.dtype) -> dict[str, tuple[kernels.Op, dict[str, Any]]]:
    """Calls by name, with the state they write to."""

    def tokens(heads: int) -> Tensor:
        return torch.zeros(1, 1, heads, dim, dtype=dtype)

    def maps(heads: int, features: int) -> dict[str, Any]:
        counts = {"features_q": HEADS, "features_k": heads}
        return {
            name: Features("hedgehog", torch.zeros(h, dim, features), None, torch.ones(()))
            for name, h in counts.items()
        }

    options: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    qkv = {"q": tokens(HEADS), "k": tokens(KV_HEADS), "v": tokens(KV_HEADS)}
    sliding, terraced, sinks = Window(64), Window(64, "terraced"), Window(64, sinks=4)
    mass = LogMass(torch.zeros(HEADS, dim), torch.zeros(HEADS), torch.zeros(KV_HEADS, dim), torch.zeros(KV_HEADS))

    def near(window: Window) -> dict[str, Any]:
        return qkv | {"window": window, "scaling": 1.0, "state": window_state(1, window, KV_HEADS, dim, **options)}

    def hybrid(window: Window, mix: Joint | LogMass, heads: int = KV_HEADS, features: int = 64) -> dict[str, Any]:
        call = near(window) | maps(heads, features) | {"mix": mix}
        return call | {"state": call["state"] | linear_state(1, heads, 2 * features, dim, **options)}

    softmax = {name: Features("softmax", scale=torch.ones(())) for name in ("features_q", "features_k")}
    plain = linear_state(1, KV_HEADS, dim, dim, normalized=False, **options)
    silu = {name: Features("silu", scale=torch.ones(())) for name in softmax}
    beta = {"beta": torch.zeros(1, 1, KV_HEADS)}
    gate = {"log_gate": torch.zeros(1, 1, KV_HEADS, dim)}
    slots = slot_state(1, KV_HEADS, dim, dim, **options)
    joint = Joint(torch.ones(HEADS))
    return {
        "linear": (
            kernels.linear_attention,
            qkv | maps(KV_HEADS, dim) | {"state": linear_state(1, KV_HEADS, 2 * dim, dim, **options)},
        ),
        "gla": (kernels.gated_linear_attention, qkv | softmax | gate | {"state": plain}),
        "delta": (kernels.delta_attention, qkv | silu | beta | {"state": plain}),
        "kda": (kernels.delta_attention, qkv | silu | beta | gate | {"state": plain}),
        "slots": (kernels.gated_slot_attention, qkv | gate | {"scaling": 1.0, "state": slots}),
        "window": (kernels.window_attention, near(sliding)),
        "joint": (kernels.hybrid_attention, hybrid(sliding, joint)),
        "joint, wide": (kernels.hybrid_attention, hybrid(sliding, joint, features=dim)),
        "joint, head": (kernels.hybrid_attention, hybrid(sliding, joint, HEADS)),
        "joint, terraced": (kernels.hybrid_attention, hybrid(terraced, joint)),
        "logmass, sinks": (kernels.hybrid_attention, hybrid(sinks, mass)),
    }


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.args, self.kwargs = kernel, (), {}

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.args, self.kwargs = args, kwargs

        return launch

    def compiled(self, arch: int) -> Any:
        names = list(inspect.signature(self.kernel.fn).parameters)
        signature, attributes, constants = {}, {}, self.kwargs
        warps, self.kwargs = constants.pop("num_warps"), {}
        for i, (name, x) in enumerate(zip(names, self.args, strict=False)):
            if isinstance(x, Tensor):
                signature[name] = TYPES[x.dtype]
            elif x is None:
                constants[name] = None
            else:
                signature[name] = "fp32" if isinstance(x, float) else "i32"
            if not isinstance(x, float):
                attributes[(i,)] = [["tt.divisibility", 16]]
        signature = {name: signature.get(name, "constexpr") for name in names}
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED), choices=list(SHARED))
    parser.add_argument("--dim", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--dtype", nargs="*", default=["bf16", "fp16"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--step", nargs="*", help="the names in the table of those to compile")
    chosen = parser.parse_args(arguments)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    failed = 0
    recorders = [Recorder(x) for x in (steps.linear_kernel, mixed_step.mixed_kernel, slot_step.slot_kernel)]
    steps.linear_kernel, mixed_step.mixed_kernel, slot_step.slot_kernel = recorders
    # the interpreter's part of a machine without a GPU: nothing is launched
    decay.INTERPRET = True
    print("sm    D dtype step             registers spills smem/K")
    for arch in chosen.arch:
        for dim in chosen.dim:
            for dtype in chosen.dtype:
                for name, (op, call) in cases(dim, dtypes[dtype]).items():
                    if chosen.step and name not in chosen.step:
                        continue
                    with kernels.backend("triton"):
                        op.step(**call, lengths=LENGTHS)
                    recorder = next((x for x in recorders if x.kwargs), None)
                    if recorder is None:
                        continue  # too wide for a kernel
                    kernel = recorder.compiled(arch)
                    registers, spills = assembled(kernel.asm["ptx"], arch)
                    wrong = spills > SPILLS or kernel.metadata.shared > SHARED[arch]
                    line = f"{registers:9d} {spills:6d} {kernel.metadata.shared / 1024:6.0f}"
                    print(f"{arch} {dim:4} {dtype:5} {name:16} {line}", "fails" if wrong else "", flush=True)
                    failed += wrong
    print(f"{failed} failed" if failed else "all compile")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
