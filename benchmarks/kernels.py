"""Our kernels beside their peers, in one process: `python -m benchmarks.kernels [--only NAME ...] [--out FOLDER]`.

Both sides are first compared with fp64 at a small size. Then their launches alternate, each after a flush of the cache,
timed by CUDA events; medians, of the GPU's own time and (eager) with what it waits for launches. Writes kernels.json,
kernels.md and kernels.png. A peer that refuses to run is said to.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.kernels_report import plot, table
from surgery import kernels
from surgery.evaluation.provenance import source
from surgery.kernels import Features, LogMass, Window

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64
SLEEP = 20_000_000
"""Clock cycles, some 10 ms."""
Inputs = dict[str, Any]
Function = Callable[..., Tensor]
IDENTITY = {"features_q": Features("identity"), "features_k": Features("identity")}


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.tokens} H{self.heads}/{self.kv_heads} D{self.dim}"


MAIN = [Shape(4, 8192, 32, 32, d) for d in (64, 128)]
GROUPED = [Shape(4, 8192, 32, 8, d) for d in (64, 128)]
OTHERS = [Shape(16, 2048, 32, 32, 128), Shape(1, 32768, 32, 32, 128), Shape(4, 32768, 32, 8, 128)]
HARD = [Shape(1, 1024, 8, 8, 64), Shape(2, 4096, 16, 16, 256)]


def qkv(s: Shape, dtype: torch.dtype) -> Inputs:
    heads = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
    return {n: torch.randn(s.batch, s.tokens, h, s.dim, device="cuda", dtype=dtype) for n, h in heads.items()}


def positive_inputs(s: Shape, dtype: torch.dtype) -> Inputs:
    inputs = qkv(s, dtype)
    return inputs | {"q": inputs["q"].sigmoid(), "k": inputs["k"].sigmoid()}


def linear_inputs(s: Shape, dtype: torch.dtype) -> Inputs:
    inputs = qkv(s, dtype)
    return inputs | {"q": inputs["q"] * s.dim**-0.5}


def with_gate(kind: str) -> Callable[[Shape, torch.dtype], Inputs]:
    def build(s: Shape, dtype: torch.dtype) -> Inputs:
        sizes = {"fixed": (s.kv_heads,), "scalar": (s.batch, s.tokens, s.kv_heads)}
        sizes["slots"] = (s.batch, s.tokens, s.kv_heads, SIZE)
        size = sizes.get(kind, (s.batch, s.tokens, s.kv_heads, s.dim))
        gate = torch.nn.functional.logsigmoid(torch.randn(size, device="cuda") + 2) / 16
        return linear_inputs(s, dtype) | {"gate": gate.to(dtype) if gate.ndim == 4 else gate}

    return build


def average_inputs(s: Shape, dtype: torch.dtype) -> Inputs:
    return {name: x for name, x in with_gate("channel")(s, dtype).items() if name != "k"}


def hybrid_inputs(s: Shape, dtype: torch.dtype) -> Inputs:
    maps = [torch.randn(h, s.dim, s.dim // 2, device="cuda") * s.dim**-0.5 for h in (s.heads, s.kv_heads)]
    sizes = ((s.heads, s.dim), (s.heads,), (s.kv_heads, s.dim), (s.kv_heads,))
    mass = tuple(torch.randn(size, device="cuda") * 0.1 for size in sizes)
    return qkv(s, dtype) | {"map_q": maps[0], "map_k": maps[1], "mass": mass}


def decayed(backend: str, normalize: bool = False) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
        if backend == "triton":
            from surgery.kernels.triton import channel_attention, decay_attention

            if gate is not None and gate.ndim == 4:
                return channel_attention(q, k, v, log_gate=gate, normalize=normalize)[0]
            return decay_attention(q, k, v, log_decay=gate, normalize=normalize)[0]
        if gate is None:
            gate = torch.zeros(k.shape[:3], device=k.device, dtype=q.dtype)
        gate = gate.expand(*k.shape[:2], -1) if gate.ndim == 1 else gate
        op = getattr(kernels.gated_linear_attention, backend)
        return op(q, k, v, gate, normalize=normalize, **IDENTITY)[0]

    return run


def averaged(backend: str) -> Function:
    run = decayed(backend)
    return lambda q, v, gate: run(q, -torch.expm1(gate).to(v.dtype), v, gate)


def slotted(backend: str) -> Function:
    return lambda q, k, v, gate: getattr(kernels.gated_slot_attention, backend)(q, k, v, gate, scaling=1.0)[0]


def normalised(backend: str) -> Function:
    return decayed(backend, True)


def windowed(backend: str) -> Function:
    return lambda q, k, v: getattr(kernels.window_attention, backend)(
        q, k, v, window=Window(SIZE), scaling=q.shape[-1] ** -0.5
    )[0]


def hybrid(backend: str) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, map_q: Tensor, map_k: Tensor, mass: tuple[Tensor, ...]) -> Tensor:
        return getattr(kernels.hybrid_attention, backend)(
            q, k, v, features_q=Features("hedgehog", map_q), features_k=Features("hedgehog", map_k), mix=LogMass(*mass),
            window=Window(SIZE), scaling=q.shape[-1] ** -0.5,
        )[0]  # fmt: skip

    return run


def liger(backend: str) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gate, softmax = torch.nn.functional.logsigmoid(k) / 16, Features("softmax")
        op = getattr(kernels.gated_linear_attention, backend)
        far = op(q, k, v, gate, features_q=softmax, features_k=softmax)[0]
        return torch.lerp(far, windowed(backend)(q, k, v), 0.5)

    return run


@dataclass(frozen=True)
class Case:
    """One operation: its inputs, ours by backend, and its peers by name, made for a shape."""

    inputs: Callable[[Shape, torch.dtype], Inputs]
    ours: Callable[[str], Function]
    peers: dict[str, Callable[[Shape], Function]]
    shapes: list[Shape]


SDPA = "SDPA flash, full attention"
FULL = {SDPA: lambda s: peers.flash}
CASES = {
    "linear": Case(
        linear_inputs, decayed, {"fla chunk_linear_attn": lambda s: peers.linear} | FULL, MAIN + OTHERS + HARD
    ),
    "linear normalised": Case(
        positive_inputs, normalised, {"fla chunk_linear_attn, normalised": lambda s: peers.normalised}, MAIN
    ),
    "lightning": Case(
        with_gate("fixed"), decayed, {"fla chunk_simple_gla(g_gamma)": lambda s: peers.lightning}, MAIN + GROUPED
    ),
    "scalar decay": Case(
        with_gate("scalar"), decayed, {"fla fused_chunk_simple_gla": lambda s: peers.scalar}, MAIN + GROUPED
    ),
    "gla": Case(with_gate("channel"), decayed, {"fla chunk_gla": lambda s: peers.channel}, MAIN + GROUPED),
    "hgrn2": Case(average_inputs, averaged, {"fla chunk_gla": lambda s: peers.averages}, MAIN + GROUPED),
    "gsa": Case(with_gate("slots"), slotted, {"fla chunk_gsa": lambda s: peers.slots}, MAIN + GROUPED),
    "window": Case(qkv, windowed, {"FlexAttention": lambda s: peers.window(SIZE, s.tokens)} | FULL, MAIN + GROUPED),
    "hybrid": Case(
        hybrid_inputs,
        hybrid,
        {
            "eager composition": lambda s: peers.Hybrid(SIZE, s.tokens, False),
            "compiled composition": lambda s: peers.Hybrid(SIZE, s.tokens, True),
        }
        | FULL,
        MAIN + GROUPED + OTHERS,
    ),
    "liger": Case(qkv, liger, {"composition": lambda s: peers.Liger(SIZE, s.tokens)}, GROUPED),
}


def leaves_of(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Fresh tensors that require gradients; of another dtype if asked for."""

    def fresh(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(fresh(y) for y in x)
        return x.detach().to(dtype or x.dtype).requires_grad_()

    return {name: fresh(x) for name, x in inputs.items()}


def flat(inputs: Inputs) -> list[Tensor]:
    return [y for x in inputs.values() for y in (x if isinstance(x, tuple) else (x,))]


def error(function: Function, case: Case, shape: Shape, dtype: torch.dtype) -> float:
    """The largest relative error of output and gradients against fp64, at a few hundred tokens."""
    # as many heads as will be timed, since peers tune themselves again for others
    small = Shape(1, 320, shape.heads, shape.kv_heads, shape.dim)
    torch.manual_seed(0)
    inputs = case.inputs(small, dtype)
    results = []
    for run, kind in ((function, None), (case.ours("chunked"), torch.float64)):
        leaves = leaves_of(inputs, kind)
        y = run(**leaves)
        dy = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)
        results.append([y, *torch.autograd.grad(y, flat(leaves), dy.to(y.dtype))])
    pairs = zip(*results, strict=True)
    return max(
        float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp(min=1e-3 * b.numel() ** 0.5))
        for a, b in pairs
    )


def launches(function: Function, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Forward without gradients, and forward with backward."""
    leaves = leaves_of(inputs)
    wanted = flat(leaves)
    with torch.no_grad():
        dy = torch.randn_like(function(**inputs))

    def forward() -> None:
        with torch.no_grad():
            function(**inputs)

    return {"fwd": forward, "fwd+bwd": lambda: torch.autograd.grad(function(**leaves), wanted, dy, allow_unused=True)}


def peak(launch: Callable[[], Any]) -> float:
    """MiB beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    launch()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def times(sides: list[Callable[[], Any]], repeats: int, ahead: bool = True) -> list[float]:
    """Median milliseconds of each, alternating, with a cold L2. ahead: the GPU first sleeps until all is launched, so
    that its own time is what is told; otherwise a launch that the GPU waits for counts too."""
    flush = torch.empty(64 * 2**20, device="cuda", dtype=torch.int32)
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, launch in enumerate(sides):
            flush.zero_()
            if ahead:
                torch.cuda._sleep(SLEEP)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            launch()
            end.record()
            torch.cuda.synchronize()
            found[side].append(start.elapsed_time(end))
    return [median(x) for x in found]


def bandwidth() -> float:
    """Bytes per second of a large copy, read and written."""
    x = torch.empty(2**30, device="cuda", dtype=torch.int16)
    y = torch.empty_like(x)
    return 2 * x.numel() * 2 / (times([lambda: y.copy_(x)], 11)[0] / 1000)


def floor(inputs: Inputs, shape: Shape, rate: float) -> dict[str, float]:
    """Milliseconds to move inputs and output once, and for the backward also their gradients and the inputs again."""
    read = sum(x.numel() * x.element_size() for x in flat(inputs))
    output = shape.batch * shape.tokens * shape.heads * shape.dim * 2
    return {"fwd": (read + output) / rate * 1e3, "fwd+bwd": (3 * read + 2 * output) / rate * 1e3}


def measure(name: str, shape: Shape, dtype: torch.dtype, rate: float, repeats: int, ours_only: bool) -> Iterator[dict]:
    case = CASES[name]
    row = {"op": name, "shape": str(shape), "dtype": str(dtype).removeprefix("torch.")}
    mine = case.ours("triton")
    ours_err = error(mine, case, shape, dtype)
    torch.manual_seed(0)
    inputs = case.inputs(shape, dtype)
    least = floor(inputs, shape, rate)
    our_launches = launches(mine, inputs)
    for peer, make in ({"": None} if ours_only else case.peers).items():
        peer_err, theirs, note = None, {}, ""
        if make is not None:
            plain_inputs = {n: inputs[n] for n in "qkv"} if peer == SDPA else inputs
            try:
                if peer != SDPA:
                    peer_err = error(make(Shape(1, 320, 0, 0, 0)), case, shape, dtype)
                    assert peer_err < 0.05, f"error {peer_err:.3f}"
                theirs = launches(make(shape), plain_inputs)
            except Exception as refused:
                note = f"{type(refused).__name__}: {str(refused).splitlines()[0][:160]}"
        for which, launch in our_launches.items():
            sides = [launch] + ([theirs[which]] if which in theirs else [])
            try:
                memory = [peak(side) for side in sides]
                spent, eager = times(sides, repeats), times(sides, repeats // 3, ahead=False)
            except Exception as refused:
                note, sides = f"{type(refused).__name__}: {str(refused).splitlines()[0][:160]}", [launch]
                memory, spent, eager = [peak(launch)], times(sides, repeats), times(sides, repeats // 3, ahead=False)
            found = row | {"pass": which, "ours_ms": spent[0], "peer": peer, "peer_ms": None, "ratio": None}
            if len(spent) > 1:
                found |= {"peer_ms": spent[1], "ratio": spent[1] / spent[0]}
            found |= {"ours_eager_ms": eager[0], "peer_eager_ms": eager[1] if len(eager) > 1 else None}
            found |= {"floor_ms": least[which], "ours_err": ours_err, "peer_err": peer_err}
            found |= {"peak_mib_ours": memory[0], "peak_mib_peer": memory[1] if len(memory) > 1 else None, "note": note}
            yield found


def tree_hash() -> str:
    """Of the sources of surgery/kernels."""
    digest = sha256()
    for path in sorted((ROOT / "surgery" / "kernels").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def environment() -> dict[str, str]:
    found = {"device": torch.cuda.get_device_name(), "kernels": tree_hash()}
    for package in ("torch", "triton", "flash-linear-attention", "fla-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"source": source()}


def save(rows: list[dict[str, Any]], rate: float, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    result = environment() | {"copy_bytes_per_second": rate, "rows": rows}
    (out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "kernels.md").write_text(table(rows))
    if any(row["ratio"] for row in rows):
        plot(rows, out / "kernels.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--shapes", nargs="*", help="leave out the others, as they are printed: B4 T8192 H32/32 D128")
    parser.add_argument("--ours", action="store_true", help="without peers")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    chosen = parser.parse_args()
    rate, rows = bandwidth(), []
    print(f"{torch.cuda.get_device_name()}, copies at {rate / 1e12:.2f} TB/s", flush=True)
    for name in chosen.only:
        for shape in CASES[name].shapes:
            if chosen.shapes and str(shape) not in chosen.shapes:
                continue
            try:
                for row in measure(name, shape, torch.bfloat16, rate, chosen.repeats, chosen.ours):
                    rows.append(row)
                    print(table([row]).splitlines()[-1], flush=True)
            except Exception as failed:
                print(name, shape, "FAILED", type(failed).__name__, str(failed)[:300], flush=True)
            torch.cuda.empty_cache()
        save(rows, rate, chosen.out)


if __name__ == "__main__":
    main()
