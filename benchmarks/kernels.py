"""Our kernels beside their peers, in one process: `python -m benchmarks.kernels [--only NAME ...] [--out FOLDER]`.

--merge joins the results of several runs in --out, without a GPU: of one operation, pass, shape and peer the row of the
run named last, which says itself what kernels it is of.

Both sides are first compared with fp64 at a small size. Then their launches alternate, each after a flush of the cache,
timed by CUDA events; medians, of the GPU's own time and (eager) with what it waits for launches. Writes kernels.json,
kernels.md and kernels.png. A peer that refuses to run is said to.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import CASES, SDPA, Case, Function, Inputs, Shape
from surgery.evaluation.provenance import source

ROOT = Path(__file__).resolve().parents[1]
SLEEP = 20_000_000
"""Clock cycles, some 10 ms."""


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
    row |= {"kernels": tree_hash(), "source": source()}
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
    found = {"device": torch.cuda.get_device_name()}
    for package in ("torch", "triton", "flash-linear-attention", "fla-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of runs on the same device with the same versions, the later ones' rows before the earlier ones'."""
    *_, last = results
    same = [{k: v for k, v in r.items() if k not in ("rows", "copy_bytes_per_second")} for r in results]
    if any(r != same[-1] for r in same):
        raise SystemExit(f"these runs are of different devices or versions: {same}")
    keys = ("op", "pass", "shape", "dtype", "peer")
    rows = {tuple(row[key] for key in keys): row for result in results for row in result["rows"]}
    order = {name: place for place, name in enumerate(CASES)}
    return last | {"rows": sorted(rows.values(), key=lambda row: (order[row["op"]], row["shape"], row["peer"]))}


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["op", "pass", "shape", "ours, ms", "peer", "peer, ms", "ratio", "× floor", "eager, ours / peer"]
    heads += ["error, ours / peer", "MiB, ours / peer"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in rows:
        ratio = "–" if r["ratio"] is None else f"{r['ratio']:.2f}"
        theirs = r["note"] or "–" if r["peer_ms"] is None else f"{r['peer_ms']:.3f}"
        errors = f"{r['ours_err']:.1e} / " + ("–" if r["peer_err"] is None else f"{r['peer_err']:.1e}")
        memory = f"{r['peak_mib_ours']:.0f} / " + ("–" if r["peak_mib_peer"] is None else f"{r['peak_mib_peer']:.0f}")
        eager = f"{r['ours_eager_ms']:.3f} / " + ("–" if r["peer_eager_ms"] is None else f"{r['peer_eager_ms']:.3f}")
        cells = [r["op"], r["pass"], r["shape"], f"{r['ours_ms']:.3f}", r["peer"], theirs, ratio]
        lines.append("| " + " | ".join([*cells, f"{r['ours_ms'] / r['floor_ms']:.1f}", eager, errors, memory]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in rows if r["ratio"] is not None]
    labels = [f"{r['op']} {r['pass']} · {r['shape']} · {r['peer']}" for r in shown]
    figure, axes = pyplot.subplots(figsize=(10, 0.22 * len(shown) + 1))
    colors = ["#4477aa" if r["ratio"] > 1 else "#cc6677" for r in shown]
    axes.barh(range(len(shown)), [r["ratio"] for r in shown], color=colors)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(yticks=range(len(shown)), yticklabels=labels, xlabel="peer's time / ours", xscale="log")
    axes.invert_yaxis()
    axes.tick_params(labelsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def save(rows: list[dict[str, Any]], rate: float, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write(environment() | {"copy_bytes_per_second": rate, "rows": rows}, out)


def write(result: dict[str, Any], out: Path) -> None:
    rows = result["rows"]
    (out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "kernels.md").write_text(table(rows))
    if any(row["ratio"] for row in rows):
        plot(rows, out / "kernels.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--shapes", nargs="*", help="leave out the others, as they are printed: B4 T8192 H32/32 D128")
    parser.add_argument("--merge", nargs="+", type=Path, help="kernels.json of earlier runs")
    parser.add_argument("--ours", action="store_true", help="without peers")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    chosen = parser.parse_args()
    if chosen.merge:
        write(merged([json.loads(path.read_text()) for path in chosen.merge]), chosen.out)
        return
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
