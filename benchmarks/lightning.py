"""Tokens a second at any length, which Lightning Attention-2 (arXiv 2401.04658) promises.

`python -m benchmarks.lightning`: linear attention with a fixed decay per head, its kernels beside flash attention, over
rows ever longer and fewer, so that all hold as many tokens. Launches alternate, timed by the GPU itself. How constant
their pace is, max / min over lengths tells. Writes lightning.json, lightning.md and lightning.png; `--quick` runs a toy
on any machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import decode, kernel_cases, kernels, peers
from surgery.doctor import environment
from surgery.evaluation.provenance import source
from surgery.mixers.base import AttentionShape
from surgery.mixers.decays import SlopesConfig

Row = dict[str, Any]
OURS, FLASH = "lightning", "SDPA flash"
PASSES = ("fwd", "fwd+bwd")
COLUMNS = ["pass", "model", "tokens a row", "rows", "ms", "tokens/s", "MiB"]


def sides(chosen: argparse.Namespace, length: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """What is launched, by model and pass."""
    shape = kernel_cases.Shape(chosen.tokens // length, length, chosen.heads, chosen.heads, chosen.head_dim)
    inputs = {
        n: torch.randn(shape.batch, length, shape.heads, shape.dim, device=chosen.device, dtype=chosen.dtype)
        for n in "qkv"
    }
    layer = AttentionShape(chosen.heads, chosen.heads, chosen.head_dim, chosen.heads * chosen.head_dim, 0, 24)
    gate = -SlopesConfig().decays(layer, chosen.heads).to(chosen.device)
    run = kernel_cases.decayed("triton" if chosen.device == "cuda" else "chunked")
    # decays are fixed: none gets a gradient
    functions = {OURS: lambda q, k, v: run(q, k, v, gate), FLASH: peers.flash}
    return {name: kernels.launches(function, inputs) for name, function in functions.items()}


def measure(chosen: argparse.Namespace, length: int) -> list[Row]:
    found, models = [], sides(chosen, length)
    for which in PASSES:
        launches = [model[which] for model in models.values()]
        if chosen.device == "cuda":
            memory: list[float | None] = [kernels.peak(launch) for launch in launches]
            spent = [ms / 1e3 for ms in kernels.times(launches, chosen.repeats)]
        else:
            memory, spent = [None] * len(launches), [decode.seconds(launch, 1) for launch in launches]
        for name, seconds, mib in zip(models, spent, memory, strict=True):
            row = {"pass": which, "model": name, "length": length, "rows": chosen.tokens // length}
            rate = chosen.tokens / seconds
            found.append(row | {"ms": seconds * 1e3, "tokens_per_second": rate, "peak_mib": mib})
    return found


def constancy(rows: list[Row]) -> list[Row]:
    """max / min of tokens a second over lengths, by pass and model."""
    found = []
    for which in PASSES:
        for name in (OURS, FLASH):
            rates = [r["tokens_per_second"] for r in rows if (r["pass"], r["model"]) == (which, name)]
            found.append({"pass": which, "model": name, "max_over_min": max(rates) / min(rates)})
    return found


def line(row: Row) -> str:
    peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    cells = [row["pass"], row["model"], row["length"], row["rows"], f"{row['ms']:.3f}"]
    return "| " + " | ".join(map(str, [*cells, f"{row['tokens_per_second']:.3g}", peak])) + " |"


def report(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    shape = ", ".join(f"{name} {value}" for name, value in result["shape"].items())
    constant = [f"| {x['pass']} | {x['model']} | {x['max_over_min']:.2f} |" for x in result["constancy"]]
    return (
        f"{versions}; {result['source']}; kernels {result['kernels']}.\n\n{shape}.\n\n"
        + decode.table(["pass", "model", "tokens/s, max / min over lengths"], constant)
        + "\n"
        + decode.table(COLUMNS, [line(row) for row in result["rows"]])
    )


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, color in ((OURS, "#4477aa"), (FLASH, "#cc6677")):
        for which, style in zip(PASSES, ("-", "--"), strict=True):
            shown = [r for r in rows if (r["pass"], r["model"]) == (which, name)]
            points = [r["length"] for r in shown], [r["tokens_per_second"] for r in shown]
            axes.plot(*points, style, color=color, marker="o", label=f"{name}, {which}")
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="tokens a row", ylabel="tokens a second")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**17, help="of all rows together")
    parser.add_argument("--lengths", nargs="*", type=int, default=[2**n for n in range(10, 18)])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=kernels.ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="a toy, to see that all of this runs")
    chosen = parser.parse_args(given)
    if chosen.quick:
        vars(chosen).update(tokens=256, lengths=[64, 128, 256], heads=2, head_dim=16, repeats=3)
    if wrong := [length for length in chosen.lengths if length < 1 or chosen.tokens % length]:
        parser.error(f"--tokens {chosen.tokens} is no multiple of --lengths {wrong}: choose lengths that divide it.")
    chosen.dtype = torch.bfloat16 if chosen.device == "cuda" else torch.float32
    return chosen


def main(given: list[str] | None = None) -> dict[str, Any]:
    chosen, rows = arguments(given), []
    print(decode.table(COLUMNS, []), end="", flush=True)
    for length in chosen.lengths:
        for row in measure(chosen, length):
            rows.append(row)
            print(line(row), flush=True)
    result = {
        "environment": environment(),
        "source": source(),
        "kernels": kernels.tree_hash(),
        "shape": {name: getattr(chosen, name) for name in ("tokens", "heads", "head_dim")}
        | {"dtype": str(chosen.dtype)},
        "constancy": constancy(rows),
        "rows": rows,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "lightning.json").write_text(json.dumps(result, indent=1) + "\n")
    (chosen.out / "lightning.md").write_text(report(result))
    plot(rows, chosen.out / "lightning.png")
    return result


if __name__ == "__main__":
    main()
