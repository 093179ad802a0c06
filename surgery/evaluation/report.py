"""Evaluations as rich tables, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from ..report import _bytes
from .comparison import Comparison
from .gap import GapClosed, Ratio
from .positions import above, by_position
from .probe_report import branches_table, probe_tables, shown, with_error
from .result import ENOUGH_WINDOWS, DomainResult, Evaluation


def tables(comparison: Comparison) -> list[Table]:
    """Losses of all models, the gap closed, and what else is known of the result."""
    result = comparison.result
    named = comparison.named
    parts = [_losses(comparison), _gaps(comparison.gaps, result), positions_table(named, comparison.softmax)]
    parts += [_domains(result), *probe_tables(named), branches_table(result), _memory(comparison)]
    return [table for table in parts if table is not None]


def markdown(comparison: Comparison) -> str:
    """What `tables` and `remarks` show, as Markdown, with where the numbers come from."""
    origin = ", ".join(f"{name} {value}" for name, value in comparison.result.provenance.items())
    lines = [f"# {comparison.result.model}", origin, *(str(remark) for remark in remarks(comparison.result))]
    lines += map(as_markdown, tables(comparison))
    return "\n\n".join(line for line in lines if line) + "\n"


def as_markdown(table: Table) -> str:
    """A rich table as Markdown, below its title."""
    rows = zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)
    heads = [str(column.header) for column in table.columns]
    dashes = ["---:" if column.justify == "right" else "---" for column in table.columns]
    return f"## {table.title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in (heads, dashes, *rows))


def remarks(result: Evaluation) -> list[Text]:
    """What a reader must know about the numbers, one sentence each."""
    found = []
    short = [domain for domain in result.domains if domain not in result.mean_over]
    if short:
        found.append(Text(f"not in the mean, with fewer than {ENOUGH_WINDOWS} windows: {', '.join(short)}"))
    if result.history_used is None:
        found.append(Text("no recurrent history to ablate: attention sees keys only"))
    elif result.history_used:
        found.append(Text("the history is used: emptying it costs loss", style="green"))
    else:
        text = "the history is NOT used: emptying it does not raise the loss, so the recurrence is dead at any loss"
        found.append(Text(text, style="bold red"))
    return found


def _losses(comparison: Comparison) -> Table:
    result = comparison.result
    table = Table(title=f"nats per token, windows of {result.length} tokens, ± standard error over windows")
    for name in ("model", "attention"):
        table.add_column(name)
    for domain, found in result.domains.items():
        table.add_column(f"{domain} ({found.windows})", justify="right")
    table.add_column("mean", justify="right")
    for name, evaluation in comparison.named.items():
        domains = [evaluation.domains.get(domain) for domain in result.domains]
        cells = ["–" if d is None else with_error(d.nll, d.stderr) for d in domains]
        mean = "–" if evaluation.nll is None else with_error(evaluation.nll, evaluation.stderr)
        table.add_row(name, evaluation.attention, *cells, mean)
    return table


def _gaps(gaps: tuple[GapClosed, ...], result: Evaluation) -> Table | None:
    if not gaps:
        return None
    table = Table(title="gap closed: 0 % as the control, 100 % as the softmax model")
    table.add_column("control")
    for domain in (*result.domains, "mean", "of mean loss"):
        table.add_column(domain, justify="right")
    for gap in gaps:
        table.add_row(gap.control, *map(_percent, (*gap.domains.values(), gap.mean, gap.of_mean)))
    return table


def positions_table(named: Mapping[str, Evaluation], softmax: Evaluation | None) -> Table:
    """Every model's losses, and below them how much higher they are than the softmax model's."""
    table = Table(title="nats per token by tokens before, mean of the domains, ± standard error over windows")
    table.add_column("model")
    for name in by_position(next(iter(named.values()))):
        table.add_column(name, justify="right")
    for name, evaluation in named.items():
        table.add_row(name, *map(shown, by_position(evaluation).values()))
    for name, evaluation in named.items():
        higher = {} if softmax is None or evaluation is softmax else above(evaluation, softmax)
        if higher:
            table.add_row(f"{name}, above softmax", *(shown(mean, "+.3f") for mean in higher.values()))
    return table


def _domains(result: Evaluation) -> Table | None:
    domains = result.domains.values()
    copies, ablated = any(d.copy for d in domains), any(d.history for d in domains)
    if not (copies or ablated):
        return None
    table = Table(title="copies of unseen text; second half with the history taken away or swapped")
    table.add_column("domain")
    for name, there in (("copy, 1st → 2nd", copies), ("emptied", ablated), ("swapped", ablated), ("used", ablated)):
        if there:
            table.add_column(name, justify="right")
    for domain, found in result.domains.items():
        table.add_row(domain, *([_copy(found)] if copies else []), *(_history(found) if ablated else []))
    return table


def _copy(found: DomainResult) -> str:
    copy = found.copy
    if copy is None:
        return "–"
    return f"{with_error(copy.first, copy.first_stderr)} → {with_error(copy.second, copy.second_stderr)}"


def _history(found: DomainResult) -> list[str | Text]:
    history = found.history
    if history is None:
        return ["–"] * 3
    swapped = "–"
    if history.swapped_difference is not None:
        swapped = with_error(history.swapped_difference, history.swapped_stderr, "+.3f")
    verdict = Text("yes", style="green") if history.history_used else Text("NO", style="bold red")
    return [with_error(history.emptied_difference, history.emptied_stderr, "+.3f"), swapped, verdict]


def _memory(comparison: Comparison) -> Table:
    lengths = [comparison.result.length * factor for factor in (1, 8, 64)]
    table = Table(title="bytes one sequence holds while decoding")
    table.add_column("after tokens")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    memory = comparison.result.memory
    table.add_row("this model", *(_bytes(memory.at(length)[0]) for length in lengths))
    table.add_row("keys and values of softmax", *(_bytes(memory.at(length)[1]) for length in lengths))
    return table


def _percent(ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio.value:.1%}" if ratio.stderr is None else f"{ratio.value:.1%} ± {ratio.stderr:.1%}"
