"""A plan as tables."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from .hardware import GIB
from .memory import Memory
from .plan import Plan, StagePlan

LINES = {
    "weights": "weights",
    "new_parameters": "mixers and adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "working": "working memory",
    "communication": "gathered weights, buckets",
    "reserved": "driver and allocator",
}


def tables(plan: Plan) -> list[Table]:
    """Memory of each device, then time and disk."""
    return [_memory(plan), _stages(plan)]


def headline(plan: Plan) -> str:
    """What is planned, in one line."""
    request = plan.request
    devices = f"{request.gpus} x {request.gpu.upper()} of {request.gpu_memory:g} GiB, {request.strategy}"
    return f"{plan.model}, {plan.converted} of {plan.layers} layers converted, {devices}"


def _memory(plan: Plan) -> Table:
    table = Table("GiB of each device")
    columns: list[Memory] = []
    for stage in plan.stages:
        table.add_column(f"{stage.index + 1} {stage.kind}", justify="right")
        columns.append(stage.memory)
        if stage.checkpointed is not None:
            table.add_column("with checkpointing", justify="right")
            columns.append(stage.checkpointed)
    rows = [asdict(column) for column in columns]
    for name, title in LINES.items():
        table.add_row(title, *(f"{row[name] / GIB:.2f}" for row in rows))
    table.add_section()
    table.add_row("total", *(f"{column.total / GIB:.1f}" for column in columns))
    table.add_row("fits", *("yes" if plan.fits(column) else "NO" for column in columns))
    return table


def _stages(plan: Plan) -> Table:
    table = Table("stage", "strategy")
    for name in ("trainable", "tokens", "steps", "GFLOP / token", "tokens / s", "time", "disk"):
        table.add_column(name, justify="right")
    for stage in plan.stages:
        table.add_row(*_row(stage))
    table.add_section()
    total = sum(stage.seconds for stage in plan.stages)
    table.add_row("all", *[""] * 6, duration(total), f"model {size(plan.disk)}")
    return table


def _row(stage: StagePlan) -> tuple[str, ...]:
    written = ", ".join(f"{name.replace('_', ' ')} {size(count)}" for name, count in stage.disk.items())
    return (
        f"{stage.index + 1} {stage.kind}",
        stage.strategy,
        f"{stage.trainable:,}",
        f"{stage.tokens:,}",
        f"{stage.steps:,}",
        f"{stage.flops_per_token / 1e9:,.1f}",
        f"{stage.tokens_per_second:,.0f}",
        duration(stage.seconds),
        written,
    )


def size(count: float) -> str:
    """Bytes in the largest unit of which there is one, decimal, as disks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """In words of at most two units."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
