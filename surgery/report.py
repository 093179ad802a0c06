"""What a conversion did, or would do: one row a layer, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    new_parameters: number of parameters added. state_bytes: what one sequence holds while decoding, at any context; for
    a layer left alone, 0. cache_bytes_per_token: what its keys and values take for every token without conversion.
    break_even: tokens from which on the state is smaller than keys and values (None: not converted, or an encoder,
    which keeps neither).
    """

    path: str
    before: str
    after: str
    converted: bool
    new_parameters: int
    trainable: tuple[str, ...]
    state_bytes: int
    cache_bytes_per_token: int
    break_even: int | None


@dataclass(frozen=True)
class Report:
    """All layers of one model under one recipe.

    attention: the class of the attention modules that are converted. patcher: the module of `surgery.patchers` that
    knows it. leaves_out: what they do that no mixer does.
    """

    model: str
    layers: tuple[LayerReport, ...]
    attention: str = ""
    patcher: str = ""
    leaves_out: str = ""

    @property
    def converted(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.converted)

    @property
    def new_parameters(self) -> int:
        return sum(layer.new_parameters for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes one sequence holds in all converted layers together."""
        return sum(layer.state_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "model": self.model,
            "attention": self.attention,
            "patcher": self.patcher,
            "leaves_out": self.leaves_out,
            "new_parameters": self.new_parameters,
            "state_bytes": self.state_bytes,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def table(self) -> Table:
        """A rich table, one row a layer."""
        from rich.table import Table

        title = f"{self.model}: {len(self.converted)} of {len(self.layers)} attention layers converted"
        note = f"; leaves out {self.leaves_out}" if self.leaves_out else ""
        table = Table(title=title, caption=f"through {self.attention} ({self.patcher}){note}")
        for name in ("layer", "before", "after"):
            table.add_column(name)
        for name in ("new parameters", "state / sequence", "KV / token", "break-even"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            table.add_row(
                layer.path,
                layer.before,
                layer.after,
                f"{layer.new_parameters:,}" if layer.converted else "–",
                _bytes(layer.state_bytes) if layer.converted else "–",
                _bytes(layer.cache_bytes_per_token),
                f"{layer.break_even:,} tokens" if layer.break_even is not None else "–",
            )
        table.add_section()
        total = sum(layer.cache_bytes_per_token for layer in self.layers)
        table.add_row("total", "", "", f"{self.new_parameters:,}", _bytes(self.state_bytes), _bytes(total), "")
        return table


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""
