"""What conversions are worth: a list of configurations, each converted, evaluated, and put beside its controls.

    python -m benchmarks.quality ROWS.yaml MODEL TOKENS OUT [--tasks FILE ...] [--jobs 4]    # runs what is not done
    python -m benchmarks.quality --show benchmarks/results/quality.json                      # its Markdown

ROWS.yaml is a list; of each entry only the name is needed, and without a recipe it is the model itself:

    - {name: teacher}
    - {name: window, recipe: control/window-lora, tokens: 4_000_000}
    - {name: logmass, recipe: llama/logmass, set: {mixer.window.size: 32}, tokens: 4_000_000, seed: 1, control: window}

TOKENS has files *.train.* and *.val.*. Every row is one `surgery convert` and one `surgery evaluate`, as commands; a
killed run goes on where it was. OUT keeps models, logs and a JSON a row; `--results PREFIX` gathers them all in
PREFIX.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality_report import plot, report
from surgery.doctor import environment
from surgery.evaluation.comparison import replacing
from surgery.recipe import load_recipe
from surgery.training.convert import Options
from surgery.training.text import StageData, config_of

Summary = Callable[[dict[str, Any]], str]

RESULTS = Path(__file__).parent / "results" / "quality"
QUICK = {"tokens": 128, "batch_size": 2, "accumulate": 1, "sequence_length": 64}


@dataclass(frozen=True)
class Row:
    """One conversion. recipe: None: the model as it is. changes: what differs from the recipe. tokens: of all stages
    that train, in the proportions they have; None: as they are. control: name of the row that lacks the branch alone;
    None: the common one.
    """

    name: str
    recipe: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    control: str | None = None
    seed: int = 0
    tokens: int | None = None

    def settings(self, quick: bool) -> dict[str, Any]:
        """All that is given to --set."""
        recipe = load_recipe(self.recipe).override(self.changes)
        own = [stage.tokens for stage in recipe.training]
        parts = own if all(own) else [1] * len(own)
        changes = dict(self.changes)
        for index, part in enumerate(parts, len(recipe.stages) - len(own)):  # a calibration comes first
            if self.tokens is not None:
                changes |= {f"stages.{index}.tokens": self.tokens * part // sum(parts), f"stages.{index}.epochs": None}
            if quick:
                changes |= {f"stages.{index}.{key}": value for key, value in QUICK.items()}
        return changes


def read_rows(path: Path) -> list[Row]:
    rows = [{"changes": entry.pop("set", {}), **entry} for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]
    return [Row(**row) for row in rows]


def commands(row: Row, chosen: argparse.Namespace) -> list[list[str]]:
    """What is to be run, the conversion only if it is not there."""
    surgery, model = [sys.executable, "-m", "surgery.cli"], chosen.out / "models" / row.name
    train, held = (sorted(chosen.tokens.glob(f"*.{part}.*")) for part in ("train", "val"))
    sizes = ["--length", "1024", "--batch-size", "16"]
    if chosen.quick:
        sizes = ["--quick", "--length", "128", "--copy-tokens", "40"]
    sizes += ([] if chosen.windows is None else ["--windows", str(chosen.windows)]) + ["--no-probes"] * chosen.no_probes
    evaluation = [*surgery, "evaluate", str(model if row.recipe else chosen.model), *sizes]
    evaluation += [*_repeat("--data", held), *_repeat("--tasks", chosen.tasks)]
    evaluation += ["--out", str(chosen.out / "models" / f"{row.name}-evaluation")]
    if row.recipe is None or (model / "healing.json").exists():
        return [evaluation]
    sets = [f"{key}={json.dumps(value)}" for key, value in row.settings(chosen.quick).items()]
    conversion = [*surgery, "convert", "--model", str(chosen.model), "--recipe", row.recipe]
    conversion += [*_repeat("--data", train), *_repeat("--validation", held)]
    conversion += [*_repeat("--set", sets), "--out", str(model), "--seed", str(row.seed), "--save-every", "1000"]
    return [conversion, evaluation]


def _repeat(flag: str, values: Sequence[Any]) -> list[str]:
    return [part for value in values for part in (flag, str(value))]


def run(rows: Sequence[Row], chosen: argparse.Namespace) -> int:
    """Run the rows that are not done, none of them started after `minutes`; returns how many failed."""
    began, logs = time.monotonic(), chosen.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    variables = {"OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false", **os.environ}

    def one(row: Row) -> str:
        if time.monotonic() - began > 60 * chosen.minutes:
            return f"{row.name}: no time left"
        started, log = time.monotonic(), logs / f"{row.name}.log"
        with log.open("w") as stream:
            for command in commands(row, chosen):
                if subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=variables).returncode:
                    return f"{row.name}: FAILED\n{log.read_text()[-1500:]}"
        models, minutes = chosen.out / "models", (time.monotonic() - started) / 60
        healing = models / row.name / "healing.json"
        stages = json.loads(healing.read_text())["stages"] if row.recipe else []
        evaluation = json.loads((models / f"{row.name}-evaluation.json").read_text())["result"]
        for domain in evaluation["domains"].values():
            domain |= {"position_nll": [], "window_nll": [round(value, 5) for value in domain["window_nll"]]}
        found = {**asdict(row), "minutes": minutes, "stages": stages, "evaluation": evaluation}
        _write(chosen.out / f"{row.name}.json", json.dumps(found))
        return f"{row.name}: {60 * minutes:.0f} s"

    failed = 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for line in pool.map(one, [row for row in rows if not is_done(row, chosen.out)]):
            failed += ": FAILED" in line
            print(line, f"({time.monotonic() - began:.0f} s)", flush=True)
    return failed


def is_done(row: Row, out: Path) -> bool:
    """Whether its result is there; one of other settings under the same name is an error."""
    path = out / f"{row.name}.json"
    found = json.loads(path.read_text()) if path.exists() else None
    if found is not None and any(found[key] != value for key, value in asdict(row).items()):
        raise SystemExit(
            f"{path} is of other settings than the row has now: delete it and its model, or rename the row"
        )
    return found is not None


def gather(rows: Sequence[Row], chosen: argparse.Namespace, prefix: Path, summary: Summary = report) -> None:
    """All that is done, in PREFIX.json, .md and .png."""
    out = chosen.out
    done = {row.name: json.loads((out / f"{row.name}.json").read_text()) for row in rows if is_done(row, out)}
    if not done:
        return
    missing = [row.name for row in rows if row.name not in done]
    result = {"environment": environment(), "tokens": sizes(chosen), "rows": done, "missing": missing}
    _write(prefix.with_suffix(".json"), json.dumps(result, separators=(",", ":")) + "\n")
    _write(prefix.with_suffix(".md"), summary(result))
    plot(done, prefix.with_suffix(".png"))


def sizes(chosen: argparse.Namespace) -> dict[str, int]:
    """Tokens to train on, by domain."""
    files, config = sorted(chosen.tokens.glob("*.train.*")), config_of(str(chosen.model))
    found: dict[str, int] = {}
    for corpus in StageData(files, [], None, config, Options(), lambda line: None).corpora:
        found[corpus.domain] = found.get(corpus.domain, 0) + len(corpus.tokens)
    return found


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(
    given: list[str] | None = None,
    rows: Sequence[Row] | None = None,
    about: str | None = __doc__,
    summary: Summary = report,
) -> None:
    """rows: instead of a file. summary: makes the Markdown."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = sys.argv[1:] if given is None else given
    if "--show" in given:
        parser.add_argument("--show", type=Path)
        print(summary(json.loads(parser.parse_args(given).show.read_text())), end="")
        return
    for name in (*(["rows"] if rows is None else []), "model", "tokens", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--results", type=Path, help="prefix of the files to gather in")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no row after these")
    parser.add_argument("--windows", type=int, help="of each domain that are evaluated; all")
    parser.add_argument("--no-probes", action="store_true", help="evaluate losses, copies and history alone")
    parser.add_argument("--quick", action="store_true", help="two steps a stage, to see that every row runs")
    chosen = parser.parse_args(given)
    known = read_rows(chosen.rows) if rows is None else list(rows)
    failed = run([row for row in known if not chosen.only or row.name in chosen.only], chosen)
    gather(known, chosen, chosen.results or (RESULTS if rows is None else chosen.out / "results"), summary)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
