"""Healing on 1, 2, … N devices: `python -m benchmarks.scaling --devices 2`.

Runs a recipe's stages, as `surgery convert` does, under DDP and FSDP2 through Lightning, on the shapes of
Llama-3.2-1B and Llama-3-8B with random weights and random tokens. Every device gets as many tokens a step however many
there are, so that perfect scaling keeps the time of a step. One device alone needs neither strategy and is what both
are compared with. Written to scaling.json after every measurement, then to scaling.md and scaling.png:

tokens a second, by the median step, and efficiency: that over the devices' number times that of one;
peak memory of the fullest device; the loss of every step;
communication: the part of a profiled step in which a collective runs (waiting for other processes included), and
exposed: in which nothing else does.

--curves does something else: every number of devices trains on the same rows, --steps of them all told, and the losses
of every step are compared with those of one device (curves.json; difference: the largest relative one).

--kill kills one process of a `surgery convert` under each strategy, and makes sure that the
run ends with one sentence that says so, and that the same command then goes on from a checkpoint to the end.

Each shape and strategy runs in processes of its own; what fails, or takes longer than --timeout, is noted and left out.
`--quick` is a toy on two CPU processes.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import scaling_kill
from surgery import doctor
from surgery.evaluation.provenance import source
from surgery.training.processes import environment

ROOT = Path(__file__).resolve().parents[1]
GRACE = 10
"""Seconds that the other processes have left when one has failed."""
KEY = ("shape", "strategy", "devices", "stage", "length")
Row = dict[str, Any]


def launch(command: list[str], world: int, folder: Path) -> list[subprocess.Popen]:
    """The processes of one host, as torchrun would start them; what they say goes to log files."""
    env = environment(world) | scaling_kill.variables()
    started = []
    for rank in range(world):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"{rank}.log").open("w") as log:
            started.append(subprocess.Popen(command, env=env | ranks, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    return started


def stop(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def run(cells: list[Row], given: dict[str, Any], timeout: float, found: Any) -> None:
    """Measure cells of one shape, strategy and number of devices; `found` gets each row, also of what failed."""
    while cells:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path, done = folder / "cells.json", 0
            path.write_text(json.dumps({**given, "cells": cells}))
            command = [sys.executable, "-m", "benchmarks.scaling_process", str(path)]
            processes = launch(command, cells[0]["devices"], folder)
            end = time.monotonic() + timeout
            try:
                while True:
                    codes = [process.poll() for process in processes]
                    lines = path.with_suffix(".jsonl")
                    rows = lines.read_text().split("\n")[:-1] if lines.exists() else []
                    for line in rows[done:]:
                        found(json.loads(line))
                    done = len(rows)
                    if None not in codes or time.monotonic() > end:
                        break
                    if any(codes):
                        end = min(end, time.monotonic() + GRACE)
                    time.sleep(0.2)
            finally:
                stop(processes)
            if done < len(cells):
                failed = next((rank for rank, code in enumerate(codes) if code), None)
                said = (folder / f"{failed or 0}.log").read_text().splitlines()
                tail = [line for line in said if "Error" in line] or said or [""]
                why = f"longer than {timeout:.0f} s" if failed is None else f"process {failed}: {tail[-1]}"
                found({**cells[done], "failed": why[:300]})
                done = len(cells) if failed is None else done + 1
            cells = cells[done:]


def efficiency(row: Row, rows: list[Row]) -> float | None:
    """Tokens a second of each device, over those of one alone."""
    same = ("shape", "stage", "length")
    alone = [r for r in rows if r["strategy"] == "single" and "failed" not in r and all(r[k] == row[k] for k in same)]
    if not alone or "failed" in row:
        return None
    return row["tokens_per_second"] / row["devices"] / alone[0]["tokens_per_second"]


def curves(chosen: argparse.Namespace, strategy: str, most: int) -> list[Row]:
    """Both stages of the first shape at the first length, every device's rows taken by one where there is one."""
    alone, length = strategy == "single", chosen.lengths[0]
    sizes = {"rows": max(1, chosen.tokens // length), "steps": chosen.steps, "parts": most if alone else 1}
    cells = [(chosen.shapes[0], strategy, 1 if alone else most, stage, length) for stage in chosen.stages]
    return [dict(zip(KEY, cell, strict=True)) | sizes for cell in cells]


def difference(row: Row, rows: list[Row]) -> float | None:
    """The largest relative difference of a step's loss from that of one device, where it was measured."""
    alone = [r for r in rows if r["strategy"] == "single" and r["stage"] == row["stage"] and "losses" in r]
    if not alone or "losses" not in row:
        return None
    return max(abs(a - b) / abs(b) for a, b in zip(row["losses"], alone[0]["losses"], strict=True))


def report(result: dict[str, Any]) -> str:
    rows = result["rows"]
    percent = lambda x: "–" if x is None or x != x else f"{x:.0%}"  # noqa: E731
    columns = [*KEY, "tokens/s", "efficiency", "peak GiB", "communication", "exposed", "loss"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        values = [row[key] for key in KEY]
        if "failed" in row:
            lines.append([*values, f"failed: {row['failed']}", *["–"] * 5])
            continue
        peak, losses = "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}", row["losses"]
        lines.append(
            [*values, f"{row['tokens_per_second']:,.0f}", percent(efficiency(row, rows)), peak]
            + [percent(row["communication"]), percent(row["exposed"]), f"{losses[0]:.4f} → {losses[-1]:.4f}"]
        )
    environment = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return f"{environment}; {result['source']}.\n\n{result['command']}\n\n{table}\n"


def plot(rows: list[Row], path: Path) -> None:
    """Tokens a second by devices, memory, and losses: one column for each shape and stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = [row for row in rows if "failed" not in row]
    groups = sorted({(row["shape"], row["stage"]) for row in good})
    if not groups:
        return
    figure = Figure(figsize=(4 * len(groups), 9), layout="constrained")
    FigureCanvasAgg(figure)
    for column, group in enumerate(zip(*figure.subplots(3, len(groups), squeeze=False), strict=True)):
        shape, stage = groups[column]
        own = [row for row in good if (row["shape"], row["stage"]) == (shape, stage)]
        labels = [f"{row['strategy']} × {row['devices']}\nT {row['length']}" for row in own]
        for axes, key, title in zip(group, ("tokens_per_second", "peak_gib"), ("tokens/s", "peak GiB"), strict=False):
            axes.bar(labels, [row[key] or 0 for row in own])
            axes.set_title(f"{shape}, stage {stage}: {title}")
            axes.tick_params(axis="x", labelsize=6)
        for row, label in zip(own, labels, strict=True):
            group[2].plot(row["losses"], label=label.replace("\n", ", "))
        group[2].set_title("loss by step")
        group[2].legend(fontsize=6)
    figure.savefig(path, dpi=120)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llama/logmass")
    parser.add_argument("--devices", type=int, help="At most so many; by default all GPUs.")
    parser.add_argument("--shapes", nargs="+", default=["1b", "8b"], help="1b, 8b, 70b, 405b, toy.")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--strategies", nargs="+", default=["single", "ddp", "fsdp"], choices=["single", "ddp", "fsdp"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--tokens", type=int, default=8192, help="Of a step, on every device.")
    parser.add_argument("--steps", type=int, default=4, help="That are timed.")
    parser.add_argument("--checkpointing", nargs="*", default=["8b", "70b", "405b"], help="Shapes, from stage 2 on.")
    parser.add_argument("--timeout", type=float, default=150, help="Seconds for one shape and strategy.")
    parser.add_argument("--budget", type=float, default=460, help="Seconds after which nothing more is begun.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--curves", action="store_true", help="Compare losses; see above.")
    parser.add_argument("--kill", action="store_true", help="Kill a process, and go on; see above.")
    parser.add_argument("--quick", action="store_true", help="A toy on two CPU processes.")
    chosen = parser.parse_args(given)
    if chosen.quick:
        chosen.shapes, chosen.lengths, chosen.tokens, chosen.steps, chosen.devices = (
            ["toy"],
            [80, 160],
            160,
            2,
            2,
        )  # beyond the window
    return chosen


def main(given: list[str] | None = None) -> dict[str, Any]:
    chosen = arguments(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    most = chosen.devices or torch.cuda.device_count()
    counts = sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})
    command = "python -m benchmarks.scaling " + " ".join(sys.argv[1:] if given is None else given)
    result = {"environment": doctor.environment(), "source": source(), "command": command, "rows": []}
    chosen.out.mkdir(parents=True, exist_ok=True)

    def found(row: Row) -> None:
        result["rows"].append(row)
        print({key: value for key, value in row.items() if key != "losses"}, flush=True)
        name = "kill" if chosen.kill else "curves" if chosen.curves else "scaling"
        (chosen.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")

    if chosen.kill:
        for strategy in chosen.strategies:
            if strategy != "single":
                found(scaling_kill.kill(chosen.recipe, strategy, max(most, 2), chosen.quick, chosen.timeout))
        return result
    shared = {"recipe": chosen.recipe, "cpu": chosen.quick, "checkpointing": chosen.checkpointing}
    if chosen.curves:
        for strategy in chosen.strategies:
            cells = curves(chosen, strategy, most)
            run(cells, shared, chosen.timeout, lambda row: found(row | {"difference": difference(row, result["rows"])}))
        return result
    end = time.monotonic() + chosen.budget
    for shape in chosen.shapes:
        for devices, strategy in ((n, s) for n in counts for s in chosen.strategies if (n == 1) == (s == "single")):
            cells = [
                dict(zip(KEY, (shape, strategy, devices, stage, length), strict=True))
                | {"rows": max(1, chosen.tokens // length), "steps": chosen.steps}
                for stage in chosen.stages
                for length in chosen.lengths
            ]
            left = end - time.monotonic()
            if left > 0:
                run(cells, shared, min(chosen.timeout, left), found)
                (chosen.out / "scaling.md").write_text(report(result))
                plot(result["rows"], chosen.out / "scaling.png")
    return result


if __name__ == "__main__":
    main()
