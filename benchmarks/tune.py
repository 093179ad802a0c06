"""Find the rows of `surgery/kernels/triton/configs.py` on a GPU.

    python -m benchmarks.tune OUT.json [--only NAME ...]

Every candidate is launched once by one of several processes, so that all are compiled side by side and cached, and one
that crashes takes no other with it; then, alone on the GPU, each kernel of each candidate is timed. Prints the fastest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

BATCH, TOKENS, HEADS = 4, 8192, 32
Launch = Callable[[], None]
Candidate = tuple[int, ...]


def _draw(batch: int, tokens: int, heads: int, dim: int) -> Tensor:
    return torch.randn(batch, tokens, heads, dim, device="cuda", dtype=torch.bfloat16).requires_grad_()


def decay(kind: str, dim: int, kv_heads: int, batch: int, tokens: int) -> Launch:
    """Forward and backward of linear attention with no, a fixed or a scalar decay."""
    from surgery.kernels.triton import decay_attention

    q, k, v = (_draw(batch, tokens, h, dim) for h in (HEADS, kv_heads, kv_heads))
    dy, gate = torch.randn_like(q), None
    if kind == "linear":
        q, k = (x.detach().sigmoid().requires_grad_() for x in (q, k))
    if kind == "lightning":
        gate = -torch.rand(kv_heads, device="cuda") / 64
    if kind == "scalar":
        gate = (-torch.rand(batch, tokens, kv_heads, device="cuda") / 64).requires_grad_()

    def launch() -> None:
        y, _, _ = decay_attention(q, k, v, log_decay=gate, normalize=kind == "linear")
        y.backward(dy)

    return launch


def mixed(kind: str, dim: int, kv_heads: int, batch: int, tokens: int) -> Launch:
    """Forward and backward of hybrid attention, or of a window alone."""
    from surgery import kernels
    from surgery.kernels import Features, Joint, LogMass, Window

    q, k, v = (_draw(batch, tokens, h, dim) for h in (HEADS, kv_heads, kv_heads))
    dy, window, width = torch.randn_like(q), Window(64), dim // 2
    maps = [torch.randn(h, dim, width, device="cuda").div(dim**0.5).requires_grad_() for h in (HEADS, kv_heads)]
    sizes = ((HEADS, dim), (HEADS,), (kv_heads, dim), (kv_heads,))
    mix = LogMass(*(torch.zeros(size, device="cuda").requires_grad_() for size in sizes))
    if kind == "joint":
        mix = Joint(torch.full((HEADS,), 0.1, device="cuda").requires_grad_())

    def launch() -> None:
        with kernels.backend("triton"):
            if kind == "window":
                y, _ = kernels.window_attention(q, k, v, window=window, scaling=dim**-0.5)
            else:
                y, _ = kernels.hybrid_attention(
                    q, k, v, window=window, mix=mix, scaling=dim**-0.5, features_q=Features("hedgehog", maps[0]),
                    features_k=Features("hedgehog", maps[1]),
                )  # fmt: skip
        y.backward(dy)

    return launch


def use_decay(candidate: Candidate) -> None:
    from surgery.kernels.triton import configs

    for key in configs.TABLE:
        chosen = configs.Config(*candidate)
        configs.TABLE[key] = chosen._replace(columns=min(chosen.columns, key[2]))


def use_mixed(candidate: Candidate) -> None:
    from surgery.kernels.triton import configs

    for key in configs.LAUNCH:
        configs.LAUNCH[key] = candidate


# chunk, columns, warps, stages; one stage with 32 columns is miscompiled (illegal addresses at 128 columns in all)
DECAY = [(64, c, w, s) for c, w, s in product((32, 64, 128), (4, 8), (2, 3)) if c * 64 // w <= 1024]
MIXED = list(product((4, 8), (1, 2, 3)))  # warps, stages
FAMILIES: dict[str, tuple[Any, Any, list[Any]]] = {
    "linear": (decay, use_decay, DECAY),
    "lightning": (decay, use_decay, DECAY),
    "scalar": (decay, use_decay, DECAY),
    "window": (mixed, use_mixed, MIXED),
    "joint": (mixed, use_mixed, MIXED),
    "logmass": (mixed, use_mixed, MIXED),
}
PROBLEMS = {
    f"{kind}-{dim}" + ("" if heads == HEADS else "-gqa"): (kind, dim, heads)
    for kind in FAMILIES
    for dim in (64, 128)
    for heads in (HEADS, HEADS // 4)
}


def build(name: str, batch: int = BATCH, tokens: int = TOKENS) -> Launch:
    kind, dim, heads = PROBLEMS[name]
    return FAMILIES[kind][0](kind, dim, heads, batch, tokens)


def kernels_of(launch: Launch, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of each kernel; several of one name are numbered in the order they ran."""
    from torch.profiler import ProfilerActivity, profile

    launch()
    flush = torch.empty(64 * 2**20, device="cuda")
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        flush.zero_()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            launch()
            torch.cuda.synchronize()
        seen: dict[str, int] = defaultdict(int)
        for event in sorted(trace.events(), key=lambda e: e.time_range.start):
            if not event.device_time or event.name.startswith("Mem"):
                continue
            name = "torch" if event.name.startswith("void") else event.name
            seen[name] += 1
            found[f"{name} {seen[name]}"].append(event.device_time / 1000)
    return {name: median(times) for name, times in found.items()}


def compile_each(jobs: list[tuple[str, Candidate]], failed: Path) -> None:
    """Launch each once. After an error the process starts anew, since the device may answer no more."""
    for done, (name, candidate) in enumerate(jobs):
        try:
            FAMILIES[PROBLEMS[name][0]][1](candidate)
            build(name, batch=1, tokens=192)()
            torch.cuda.synchronize()
        except Exception as error:
            print(name, candidate, str(error).splitlines()[0][:100], flush=True)
            with failed.open("a") as stream:
                stream.write(json.dumps([name, candidate]) + "\n")
            rest = json.dumps(jobs[done + 1 :])
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.tune", str(failed), "--compile", rest])


def time_each(name: str, failed: Path, out: Path) -> None:
    bad = [json.loads(line) for line in failed.read_text().splitlines()] if failed.exists() else []
    _, use, candidates = FAMILIES[PROBLEMS[name][0]]
    launch = build(name)
    table: dict[str, list] = defaultdict(list)
    for candidate in candidates:
        if [name, list(candidate)] not in bad:
            use(candidate)
            for kernel, ms in kernels_of(launch).items():
                table[kernel].append((ms, candidate))
    found = {kernel: sorted(rows) for kernel, rows in table.items() if sorted(rows)[0][0] > 0.005}
    for kernel, rows in found.items():
        print(
            name, kernel, *(f"{ms:.3f} {c}" for ms, c in rows[:3]), f"worst {rows[-1][0]:.3f} {rows[-1][1]}", flush=True
        )
    out.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--time", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    chosen = parser.parse_args()
    failed = chosen.out.with_suffix(".failed")
    if chosen.compile:
        compile_each([(name, tuple(c)) for name, c in json.loads(chosen.compile)], chosen.out)
        return
    if chosen.time:
        time_each(chosen.time, failed, chosen.out.with_suffix(f".{chosen.time}"))
        return
    command = [sys.executable, "-m", "benchmarks.tune"]
    jobs = [(name, c) for name in chosen.only for c in FAMILIES[PROBLEMS[name][0]][2]]
    workers = [
        subprocess.Popen([*command, str(failed), "--compile", json.dumps(jobs[i :: chosen.processes])])
        for i in range(chosen.processes)
    ]
    for worker in workers:
        worker.wait()
    results = {}
    for name in chosen.only:
        subprocess.run([*command, str(chosen.out), "--time", name])
        part = chosen.out.with_suffix(f".{name}")
        if part.exists():
            results[name] = json.loads(part.read_text())
            part.unlink()
    chosen.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
