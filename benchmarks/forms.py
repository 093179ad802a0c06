"""The form search: which mix, gate, rotation, loss and stage split gives most, each row beside its own control.

    python -m benchmarks.forms run MODEL TOKENS OUT [--only NAME ...] [--jobs 4]    # TOKENS: *.train.*, *.val.* files
    python -m benchmarks.forms table OUT --save benchmarks/results/forms.json      # Markdown, from what is in OUT
    python -m benchmarks.forms table benchmarks/results/forms.json

Every row is one `surgery convert` and one `surgery evaluate`, as commands; `run` does several at a time on one GPU and
leaves out rows that are done. Budgets are those of the reference conversions: steps of 16 x 1,024 tokens, 150 of
attention transfer and 250 of language modelling, or 400 of the latter where there is nothing to transfer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEP = 16 * 1024
TRANSFER, LANGUAGE, ALL = 150 * STEP, 250 * STEP, 400 * STEP
COMMON = {"batch_size": 8, "accumulate": 2, "epochs": None, "sequence_length": 1024}
KL = {"loss": {"kl": 1}}


@dataclass(frozen=True)
class Row:
    """One conversion. changes: what differs from the recipe. control: name of the row that lacks the branch alone."""

    name: str
    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    control: str = "window-ce"
    seed: int = 0

    def command(self, model: Path, tokens: Path, out: Path) -> list[str]:
        values = {f"{key}": value for key, value in self.changes.items()}
        sets = [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        data = [part for file in sorted(tokens.glob("*.train.*")) for part in ("--data", str(file))]
        held = [part for file in sorted(tokens.glob("*.val.*")) for part in ("--validation", str(file))]
        return [
            *(sys.executable, "-m", "surgery.cli", "convert", "--model", str(model), "--recipe", self.recipe),
            *(*data, *held, "--out", str(out), "--seed", str(self.seed), "--save-every", "1000", *sets),
        ]


def stage(index: int, tokens: int, **more: Any) -> dict[str, Any]:
    """Changes that give a stage its budget."""
    return {f"stages.{index}.{key}": value for key, value in ({**COMMON, "tokens": tokens} | more).items()}


def two(**more: Any) -> dict[str, Any]:
    return stage(0, TRANSFER) | stage(1, LANGUAGE) | more


def kl(**more: Any) -> dict[str, Any]:
    return two(**{"stages.1.loss": {"kl": 1}, **more})


def paper(recipe: str) -> dict[str, Any]:
    """Budgets as above, everything else as the recipe has it, the plateau looking as often as 400 steps allow."""
    plateau = {f"stages.{i}.schedule.every": 25 for i in range(1 if recipe.endswith("gla") else 2)}
    plateau |= {f"stages.{i}.schedule.patience": 2 for i in range(len(plateau))}
    return plateau | (stage(0, ALL) if recipe.endswith("gla") else two())


LOGMASS, LIGER = "llama/logmass", "llama/liger-gla"
LIGER_LIKE = stage(0, ALL, rank=16, alpha=32, targets=["q", "k", "v", "o"], lr=3e-4, trains=["mixer"], mixer_lr=3e-3)
LIGER_LIKE |= {"stages.0.loss": {"kl": 1}, "stages.0.schedule": {"kind": "cosine", "warmup": 20}}
ROWS = [
    Row("softmax-ce", "control/softmax-lora", stage(0, LANGUAGE)),
    Row("window-ce", "control/window-lora", stage(0, LANGUAGE)),
    Row("window-kl", "control/window-lora", stage(0, LANGUAGE, **KL)),
    # the papers' own, and what lacks their branch
    Row("lolcats", "llama/lolcats", paper("llama/lolcats"), "window-lolcats"),
    Row("window-lolcats", "control/window-lora", stage(0, LANGUAGE, rank=8, alpha=16, lr=1e-4)
        | {"stages.0.schedule": {"kind": "plateau", "every": 25, "patience": 2, "min_lr": 1e-5}}),
    Row("liger-gla", LIGER, paper(LIGER), "window-liger"),
    Row("window-liger", "control/window-lora", stage(0, ALL, rank=8, alpha=8, targets=["q", "k", "v"], lr=1e-3)
        | {"stages.0.schedule": {"kind": "plateau", "every": 25, "patience": 2, "min_lr": 1e-5}}),
    # the reference conversions: every row with the adapters and rates of the controls
    Row("joint", LOGMASS, two(**{"mixer.mix": {"kind": "joint"}, "mixer.state": "head",
        "stages.0.loss": {"normalized_mse": 1}, "stages.1.trains": []})),
    Row("logmass", LOGMASS, two()),
    Row("logmass-kl", LOGMASS, kl(), "window-kl"),
    # one thing at a time, from logmass-kl
    Row("mse-transfer", LOGMASS, kl(**{"stages.0.loss": {"normalized_mse": 1}}), "window-kl"),
    Row("ce-transfer", LOGMASS, kl(**{"stages.0.loss": {"cross_entropy": 1}}), "window-kl"),
    Row("no-transfer", LOGMASS, stage(0, STEP) | stage(1, ALL, **KL), "window-kl-400"),
    Row("window-kl-400", "control/window-lora", stage(0, ALL, **KL)),
    Row("raw", LOGMASS, kl(**{"mixer.rope": "raw"}), "window-kl"),
    Row("per-head", LOGMASS, kl(**{"mixer.state": "head"}), "window-kl"),
    Row("exp-map", LOGMASS, kl(**{"mixer.feature_map.kind": "exp"}), "window-kl"),
    Row("features-128", LOGMASS, kl(**{"mixer.feature_map.features": 128}), "window-kl"),
    Row("sinks", LOGMASS, kl(**{"mixer.window.sinks": 4}), "window-sinks-kl"),
    Row("window-sinks-kl", "control/window-lora", stage(0, LANGUAGE, **KL) | {"mixer.window.sinks": 4}),
    Row("terraced", LOGMASS, kl(**{"mixer.window.layout": "terraced"}), "window-terraced-kl"),
    Row("window-terraced-kl", "control/window-lora", stage(0, LANGUAGE, **KL) | {"mixer.window.layout": "terraced"}),
    Row("fast-mixer", LOGMASS, kl(**{"stages.1.mixer_lr": 3e-3}), "window-kl"),
    Row("joint-kl", LOGMASS, kl(**{"mixer.mix": {"kind": "joint"}}), "window-kl"),
    Row("average-kl", LOGMASS, kl(**{"mixer.mix": {"kind": "average"},
        "stages.0.loss": {"normalized_mse": 1}}), "window-kl"),
    # gates, all with the same adapters, rates and loss
    Row("gate-key", LIGER, LIGER_LIKE | {"stages.0.trains": []}, "window-kl-400"),
    Row("gate-low-rank", LIGER, LIGER_LIKE | {"mixer.gate": {"kind": "low_rank"}}, "window-kl-400"),
    Row("gate-constant", LIGER, LIGER_LIKE | {"mixer.gate": {"kind": "constant"}}, "window-kl-400"),
    Row("gate-low-rank-rotated", LIGER, LIGER_LIKE | {"mixer.gate": {"kind": "low_rank"},
        "mixer.rope": "rotated"}, "window-kl-400"),
    # the same again from other seeds, where a difference decides something
    Row("softmax-ce-1", "control/softmax-lora", stage(0, LANGUAGE), seed=1),
    Row("window-ce-1", "control/window-lora", stage(0, LANGUAGE), seed=1),
    Row("lolcats-1", "llama/lolcats", paper("llama/lolcats"), "window-lolcats", seed=1),
    Row("liger-gla-1", LIGER, paper(LIGER), "window-liger", seed=1),
    Row("logmass-1", LOGMASS, two(), "window-ce-1", seed=1),
    Row("logmass-kl-1", LOGMASS, kl(), "window-kl", seed=1),
]  # fmt: skip


def run(model: Path, tokens: Path, out: Path, only: list[str], jobs: int, seconds: float, quick: bool) -> None:
    """Run the rows that are not done; none is started after `seconds`."""
    began, log = time.monotonic(), out / "logs"
    log.mkdir(parents=True, exist_ok=True)
    named = {row.name: row for row in ROWS}
    wanted = [named[name] for name in only or named if not (out / f"{name}.json").exists()]

    def one(row: Row) -> str:
        if time.monotonic() - began > seconds:
            return f"{row.name}: no time left"
        started, folder = time.monotonic(), out / "models" / row.name
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
        extra = []
        if quick:
            count = sum(key.endswith(".tokens") for key in row.changes)
            for index in range(count):
                small = {"tokens": 128, "batch_size": 2, "sequence_length": 64}
                extra += [p for k, v in small.items() for p in ("--set", f"stages.{index}.{k}={v}")]
        evaluation = [
            *(sys.executable, "-m", "surgery.cli", "evaluate", "--model", str(folder), "--batch-size", "16"),
            *(part for file in sorted(tokens.glob("*.val.*")) for part in ("--data", str(file))),
            *("--length", "128" if quick else "1024", "--copy-tokens", "60" if quick else "400"),
            *("--out", str(out / "models" / f"{row.name}-evaluation")),
        ]
        with (log / f"{row.name}.log").open("w") as stream:
            for command in (row.command(model, tokens, folder) + extra, evaluation):
                if subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode:
                    return f"{row.name}: FAILED\n" + (log / f"{row.name}.log").read_text()[-1500:]
        (found,) = (out / "models").glob(f"{row.name}-evaluation*.json")
        result = {
            "row": {"recipe": row.recipe, "changes": row.changes, "control": row.control, "seed": row.seed},
            "healing": json.loads((folder / "healing.json").read_text()),
            "evaluation": json.loads(found.read_text()),
        }
        (out / f"{row.name}.json").write_text(json.dumps(result))
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        return f"{row.name}: {time.monotonic() - started:.0f} s"

    with ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(one, wanted):
            print(line, f"({time.monotonic() - began:.0f} s)", flush=True)


def collect(out: Path) -> dict[str, Any]:
    """What the rows in `out` found, reduced to what a table needs; of a row not evaluated, its last validation loss."""
    rows: dict[str, Any] = {}
    for row in ROWS:
        described = {"recipe": row.recipe, "changes": row.changes, "control": row.control, "seed": row.seed}
        path, log = out / f"{row.name}.json", out / "logs" / f"{row.name}.log"
        if path.exists():
            found = json.loads(path.read_text())
            stages, result = found["healing"]["stages"], found["evaluation"]["result"]
            for domain in result["domains"].values():
                domain["position_nll"] = []
                domain["window_nll"] = [round(value, 5) for value in domain["window_nll"]]
            described |= {"changes": found["row"]["changes"], "stages": stages, "evaluation": result}
            described["validation"] = stages[-1]["losses"][-1][1]
        elif log.exists():
            last = re.findall(r"step (\d+)/\1  loss \S+  val_loss (\S+)", log.read_text())
            if not last:
                continue
            described["validation"] = float(last[-1][1])
        else:
            continue
        rows[row.name] = described
    return rows


def table(rows: dict[str, Any], softmax: str = "softmax-ce", common: str = "window-ce") -> str:
    """Markdown: losses, gap closed against the common control and the row's own, use of the history, minutes."""
    from surgery.evaluation.result import Evaluation

    found = {name: Evaluation.from_dict(row["evaluation"]) for name, row in rows.items() if "evaluation" in row}
    domains = list(found[softmax].domains)
    heads = ["row", *(d.removesuffix(".val") for d in domains), "validation", "gap, common", "gap, own"]
    heads += ["history emptied", "copy, 1st → 2nd", "minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        cells = [*["–"] * len(domains), f"{row['validation']:.4f}", *["–"] * 5]
        if name in found:
            own = None if row["recipe"].startswith("control/") else row["control"]
            cells = [*_losses(found[name], row["validation"]), _gap(found, name, common, softmax)]
            cells += [_gap(found, name, own, softmax), *_uses(found[name], domains[0])]
            cells.append(f"{sum(stage['seconds'] for stage in row['stages']) / 60:.1f}")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def _losses(result: Any, validation: float) -> list[str]:
    return [*(f"{domain.nll:.3f}" for domain in result.domains.values()), f"{validation:.4f}"]


def _gap(found: dict[str, Any], name: str, control: str | None, softmax: str) -> str:
    from surgery.evaluation.gap import gap_closed

    if control not in found or name in (control, softmax):
        return "–"
    mean = gap_closed(found[name], found[control], found[softmax]).mean
    return "–" if mean is None else f"{100 * mean.value:.1f} ± {100 * (mean.stderr or 0):.1f} %"


def _uses(result: Any, first: str) -> list[str]:
    histories = [result.domains[domain].history for domain in result.mean_over]
    used = f"{sum(h.emptied_difference for h in histories) / len(histories):+.3f}" if all(histories) else "–"
    copy = result.domains[first].copy
    return [used, "–" if copy is None else f"{copy.first:.3f} → {copy.second:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    for name in ("model", "tokens", "out"):
        runs.add_argument(name, type=Path)
    runs.add_argument("--only", nargs="*", default=[])
    runs.add_argument("--jobs", type=int, default=4)
    runs.add_argument("--seconds", type=float, default=1e9, help="start no row after these")
    runs.add_argument("--quick", action="store_true", help="two steps a stage, to see that every row runs")
    tables = commands.add_parser("table")
    tables.add_argument("out", type=Path, help="what `run` wrote, or what --save kept of it")
    tables.add_argument("--save", type=Path, help="keep the rows as one JSON file")
    arguments = parser.parse_args()
    if arguments.command == "table":
        rows = json.loads(arguments.out.read_text()) if arguments.out.is_file() else collect(arguments.out)
        if arguments.save:
            arguments.save.write_text(json.dumps(rows, separators=(",", ":")) + "\n")
        print(table(rows))
        return
    run(
        arguments.model,
        arguments.tokens,
        arguments.out,
        arguments.only,
        arguments.jobs,
        arguments.seconds,
        arguments.quick,
    )


if __name__ == "__main__":
    main()
