"""What `benchmarks.kernels` found, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    heads = [
        "op",
        "pass",
        "shape",
        "ours, ms",
        "peer",
        "peer, ms",
        "ratio",
        "× floor",
        "eager, ours / peer",
        "error, ours / peer",
        "MiB, ours / peer",
    ]
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
