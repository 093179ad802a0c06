"""What probes found, as rich tables: models one below another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.table import Table

from ..report import _bytes
from .result import Evaluation, Mean, Recall

TITLES = {
    "pairs": "pairs of tokens, all keys asked for again: nats a value (how often it is the likeliest)",
    "needle": "words in a text, and again so many tokens later: nats a word (how often it is the likeliest)",
}


def probe_tables(named: Mapping[str, Evaluation]) -> list[Table]:
    """Of all models by name, the last saying what there is to show."""
    made = [*(_recall(kind, title, named) for kind, title in TITLES.items()), _tasks(named), _running(named)]
    return [table for table in made if table is not None]


def with_error(value: float, error: float | None, form: str = ".3f") -> str:
    """A number, and its standard error in the same form."""
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form.lstrip('+')}}"


def shown(mean: Mean | None, form: str = ".3f") -> str:
    """A mean in a cell; None: a dash."""
    return "–" if mean is None else with_error(mean.value, mean.stderr, form)


def _table(title: str, first: str, others: Iterable[str]) -> Table:
    table = Table(title=title)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _recall(kind: str, title: str, named: Mapping[str, Evaluation]) -> Table | None:
    """Only of the same sequences: others would not compare."""
    *_, result = named.values()
    asked = [found for found in result.recall if found.kind == kind]
    if not asked:
        return None
    title = f"{title}; {asked[0].first.count} sequences, ± standard error over them"
    table = _table(title, "model", (f"{found.size}" for found in asked))
    table.add_row("the first time", *(shown(found.first) for found in asked))
    for name, evaluation in named.items():
        same = {found.sha256: found for found in evaluation.recall}
        table.add_row(name, *(_recalled(same.get(found.sha256)) for found in asked))
    return table


def _recalled(found: Recall | None) -> str:
    return "–" if found is None else f"{shown(found.second)} ({shown(found.accuracy, '.1%')})"


def _tasks(named: Mapping[str, Evaluation]) -> Table | None:
    *_, result = named.values()
    columns = [(task, metric) for task, found in result.tasks.items() for metric in found.metrics]
    if not columns:
        return None
    heads = [f"{task} {metric} ({result.tasks[task].rows})" for task, metric in columns]
    scorers = ", ".join(dict.fromkeys(found.scorer for found in result.tasks.values()))
    table = _table(f"tasks, scored by {scorers}, ± standard error over rows", "model", heads)
    for name, evaluation in named.items():
        cells = []
        for task, metric in columns:
            found = evaluation.tasks.get(task)
            same = found is not None and found.rows == result.tasks[task].rows
            form = ".2f" if metric == "perplexity" else ".1%"
            cells.append(shown(found.metrics.get(metric), form) if found is not None and same else "–")
        table.add_row(name, *cells)
    return table


def _running(named: Mapping[str, Evaluation]) -> Table | None:
    *_, result = named.values()
    parity, speed = result.parity, result.speed
    if parity is None and speed is None:
        return None
    parts, heads = [], []
    if parity is not None:
        parts.append(f"{parity.tokens} tokens decoded after {parity.prompt}, against reading all ({parity.kl.count})")
        heads += ["KL", "same token", "cost, nats", "greatest difference"]
    if speed is not None:
        parts.append(f"tokens a second, eager, batch {speed.batch}, prompts of {speed.prompt} ({speed.prefill.count})")
        heads += ["prefill", "decode", "peak memory"]
    table = _table("; ".join(parts), "model", heads)
    for name, evaluation in named.items():
        cells, own, fast = [], evaluation.parity, evaluation.speed
        if parity is not None:
            found = [] if own is None else [shown(own.kl, ".1e"), shown(own.agreement, ".1%")]
            found += [] if own is None else [shown(own.nll_difference, "+.1e"), f"{own.difference:.1e}"]
            cells += found or ["–"] * 4
        if speed is not None:
            found = [] if fast is None else [shown(fast.prefill, ",.0f"), shown(fast.decode, ",.0f")]
            found += [] if fast is None else ["–" if fast.peak_bytes is None else _bytes(fast.peak_bytes)]
            cells += found or ["–"] * 3
        table.add_row(name, *cells)
    return table


def branches_table(result: Evaluation) -> Table | None:
    """Of one model, with the share of each layer; None: it was not looked at."""
    found = {name: value for name, value in result.branches.items() if "/" not in name}
    if not found:
        return None
    count = next(iter(found.values())).count
    table = _table(f"branches of the converted model, {count} windows, ± standard error over them", "", found)
    table.add_row("all layers", *(shown(mean, ".1f" if "half" in name else ".3f") for name, mean in found.items()))
    layers = [name.partition("/")[2] for name in result.branches if name.startswith("linear_share/")]
    for layer in layers:
        share = shown(result.branches[f"linear_share/{layer}"])
        table.add_row(f"layer {layer}", *(share if name == "linear_share" else "" for name in found))
    return table
