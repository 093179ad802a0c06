"""Conversions beside one another and beside their controls, as Markdown and as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from surgery.evaluation.comparison import replacing
from surgery.evaluation.gap import Ratio, gap_closed
from surgery.evaluation.positions import above
from surgery.evaluation.probe_report import probe_tables, shown, with_error
from surgery.evaluation.report import as_markdown, positions_table
from surgery.evaluation.result import Evaluation, Mean, mean_stderr
from surgery.report import _bytes


def evaluations(rows: dict[str, Any]) -> dict[str, Evaluation]:
    return {name: Evaluation.from_dict(row["evaluation"]) for name, row in rows.items() if "evaluation" in row}


def ends(rows: dict[str, Any]) -> tuple[str | None, str | None]:
    """Names of the softmax row, trained if there is one, and of the common control: the first of each."""

    def first(*recipes: str | None) -> str | None:
        return next((n for recipe in recipes for n, row in rows.items() if row["recipe"] == recipe), None)

    return first("control/softmax-lora", None), first("control/window-lora")


def gap(found: dict[str, Evaluation], name: str, control: str | None, softmax: str | None) -> Ratio | None:
    if control not in found or softmax not in found or name in (control, softmax):
        return None
    return gap_closed(found[name], found[control], found[softmax]).mean


def summary(rows: dict[str, Any]) -> str:
    """Markdown, one line a row: losses, gap closed against the common control and its own, history, memory, minutes."""
    found, (softmax, common) = evaluations(rows), ends(rows)
    domains = list(next(iter(found.values())).domains)
    heads = ["row", "recipe", "seed", "tokens", *(f"{domain.removesuffix('.val')}" for domain in domains)]
    heads += ["validation", "gap, common", "gap, own", "history emptied", "copy, 1st → 2nd", "state / KV", "minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        stages = row.get("stages", [])
        cells = [name, row["recipe"] or "–", row["seed"], f"{sum(stage['tokens'] for stage in stages) / 1e6:.1f} M"]
        if name not in found:  # stopped after training
            cells += [*["–"] * len(domains), f"{row['validation']:.4f}"]
        else:
            own = None if (row["recipe"] or "control/").startswith("control/") else row["control"] or common
            cells += [with_error(d.nll, d.stderr) for d in found[name].domains.values()]
            cells.append(f"{stages[-1]['losses'][-1][1]:.4f}" if stages else "–")
            cells += [_percent(gap(found, name, control, softmax)) for control in (common, own)]
            cells += [*_uses(found[name], domains[0]), f"{sum(stage['seconds'] for stage in stages) / 60:.1f}"]
        lines.append("| " + " | ".join(map(str, cells + ["–"] * (len(heads) - len(cells)))) + " |")
    return "\n".join(lines)


def course(rows: dict[str, Any]) -> str | None:
    """Markdown, one line a row: held-out loss while it was made, what that is worth, and how fast it went; None: rows
    made before losses were taken on the way."""
    found, (softmax, common) = evaluations(rows), ends(rows)
    heads = ["row", "calibrated", "at the start", "after transfer", "at the end", "gap, common", "copy, 2nd - 1st"]
    heads += ["tokens/s", "all finite"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        training = [stage for stage in row.get("stages", []) if stage["kind"] != "calibrate"]
        taken = [stage.get("nll") or [] for stage in training]
        if not any(taken):
            continue
        # what a transfer left is what adapters start from
        moved = taken[-1][:1] if len(training) > 1 and training[-1]["kind"] == "lora" else []
        cells = [name, "yes" if len(training) < len(row["stages"]) else "no"]
        cells += [f"{nll[0][1]:.3f}" if nll else "–" for nll in (taken[0][:1], moved, taken[-1][-1:])]
        domains = list(found[name].domains.values()) if name in found else []
        copy = domains[0].copy if domains else None
        cells += [_percent(gap(found, name, common, softmax))]
        cells += ["–" if copy is None else f"{copy.second - copy.first:+.3f}"]
        tokens, seconds = (sum(stage[key] for stage in training) for key in ("tokens", "seconds"))
        losses = [loss for stage, nll in zip(training, taken, strict=True) for _, loss in [*stage["losses"], *nll]]
        finite = all(map(math.isfinite, [*losses, *(domain.nll for domain in domains)]))
        cells += [f"{tokens / max(1e-9, seconds):,.0f}", "yes" if finite else "NO"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else None


def _percent(ratio: Ratio | None) -> str:
    return "–" if ratio is None else f"{100 * ratio.value:.1f} ± {100 * (ratio.stderr or 0):.1f} %"


def _uses(result: Evaluation, first: str) -> list[str]:
    histories = [result.domains[domain].history for domain in result.mean_over or result.domains]
    known = [history for history in histories if history is not None]
    risen = sum(h.emptied_difference for h in known) / max(1, len(known))
    used = shown(Mean(risen, mean_stderr(h.emptied_stderr for h in known), len(known)), "+.3f") if known else "–"
    copy, memory = result.domains[first].copy, result.memory
    recalled = "–" if copy is None else f"{copy.first:.3f} → {copy.second:.3f}"
    return [used, recalled, f"{_bytes(memory.held)} / {_bytes(memory.softmax)}"]


def report(result: dict[str, Any]) -> str:
    """Markdown: the summary, and below it every table of `surgery evaluate`, models one below another."""
    rows = result.get("rows", result)
    found, (softmax, _) = evaluations(rows), ends(rows)
    versions = ", ".join(f"{name} {value}" for name, value in result.get("environment", {}).items())
    sources = ", ".join(dict.fromkeys(f"{e.provenance['source']} on {e.provenance['device']}" for e in found.values()))
    tables = [positions_table(found, found.get(softmax or "")), *probe_tables(found)]
    note = "Losses are nats per token; ± is a standard error. State and KV are bytes of one sequence of a window."
    made = [part for part in (course(rows),) if part is not None]
    missing = result.get("missing", []) if "rows" in result else []
    made += [f"Not done, or failed: {', '.join(missing)}."] if missing else []
    return "\n\n".join([*made, summary(rows), note, *map(as_markdown, tables), f"{sources}; {versions}"]) + "\n"


def plot(rows: dict[str, Any], path: Path) -> None:
    """Gap closed of each row, and losses above the softmax row's by position."""
    from matplotlib.figure import Figure

    found, (softmax, common) = evaluations(rows), ends(rows)
    figure = Figure(figsize=(12, 2 + 0.3 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2)
    gaps = {name: ratio for name in found if (ratio := gap(found, name, common, softmax)) is not None}
    values = [100 * ratio.value for ratio in gaps.values()]
    left.barh(list(gaps), values, xerr=[100 * (ratio.stderr or 0) for ratio in gaps.values()])
    left.invert_yaxis()
    left.set_xlabel(f"gap closed between {common} and {softmax}, %")
    for name, evaluation in found.items():
        higher = above(evaluation, found[softmax]) if softmax in found and name != softmax else {}
        if higher:
            values = [mean.value for mean in higher.values()]
            errors = [mean.stderr or 0 for mean in higher.values()]
            right.errorbar(list(higher), values, errors, label=name, marker="o", capsize=3)
    right.set_xlabel("tokens before")
    right.set_ylabel(f"nats per token above {softmax}")
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False, fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
